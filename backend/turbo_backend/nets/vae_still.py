"""Encoding an image as the first frame of a video whose other frames are one constant: what repeats is computed once.

Every layer of the encoder is causal and sees a few past frames, so from some frame on its output is constant as well:
2 frames later than its input for each convolution over time. The wide layers at high resolution come to rest after a
quarter of 81 frames; from then on a chunk begins with the kept output of the last layer at rest. Equal inputs give
equal bits, so the latents are those of encoding every frame.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from turbo_backend.nets.vae_encoder import Downsample, Encoder
from turbo_backend.nets.vae_layers import CausalConv3d, FrameHistory


class StillEncoder:
    """Runs an `Encoder` over an image and the chunks of constant frames behind it, one sample.

    Args:
        encoder: whose layers run.
        image_1HWC: the first frame.
        chunk_THWC: 4 frames, those of every later chunk.
    """

    def __init__(self, encoder: Encoder, image_1HWC: Tensor, chunk_THWC: Tensor) -> None:
        self._layers: list[nn.Module] = [encoder.conv1, *encoder.downsamples, encoder.middle, encoder.head]
        self._rests = list(_chunks_at_rest(self._layers, len(chunk_THWC)))
        self._image, self._chunk = image_1HWC, chunk_THWC

    def __call__(self, num_chunks: int) -> Iterator[Tensor]:
        """What the encoder gives for the image, then for each of `num_chunks` chunks: [1, H/8, W/8, 2 z_dim] each."""
        history = FrameHistory()
        kept, num_skipped = self._chunk, 0
        for chunk in range(num_chunks + 1):
            if chunk == num_chunks:
                history.finish()
            x_THWC = kept if chunk else self._image
            # At rest in this chunk, too: the next one may begin behind these.
            num_resting = sum(rest <= chunk for rest in self._rests)
            for i, layer in enumerate(self._layers[num_skipped:], start=num_skipped + 1):
                x_THWC = layer(x_THWC, history)
                if i == num_resting:
                    kept = x_THWC
            num_skipped = num_resting
            yield x_THWC


def _chunks_at_rest(layers: list[nn.Module], num_frames: int) -> Iterator[int]:
    """Of each layer the first chunk whose output all later ones repeat; the image is chunk 0.

    Args:
        num_frames: of a chunk at the first layer.
    """
    first = 1  # frame of the layer's output from which on it is constant; its input's is 1, behind the image
    for layer in layers:
        if isinstance(layer, Downsample):
            if layer.time_conv is not None:
                # Output frame j sees 2j - 2 to 2j of its input.
                first, num_frames = -(-(first + 2) // 2), num_frames // 2
        else:
            first += 2 * sum(_sees_past(module) for module in layer.modules())
        # Chunk k holds the frames from num_frames (k - 1) + 1 on.
        yield 1 + -(-(first - 1) // num_frames)


def _sees_past(module: nn.Module) -> bool:
    return isinstance(module, CausalConv3d) and module.depth > 0
