"""Image in, the denoiser's conditioning out: the image as first frame of a video, its VAE latents, and their mask."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from turbo_backend.config import ModelConfig
from turbo_backend.errors import InvalidArgument, TurboError
from turbo_backend.image import ImageHeader, crop_box, decode_image, read_header, resize_image, to_unit_range
from turbo_backend.memory import FreeMemory, as_turbo_error, encoder_bytes, gpu_peak, release_workspace
from turbo_backend.nets.vae import WanVAE
from turbo_backend.parameters import GenerationParameters, make_parameters
from turbo_backend.planner import check_request

#: An image whose aspect ratio is changed by more than this is said to be distorted.
_DISTORTION = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One request as it arrived: the image file, and the wire values by name, not yet checked."""

    content: bytes
    values: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """What one image became.

    Attributes:
        latents: float32 `[4 + 16, T, h, w]` on the CPU: mask, then the VAE's latents.
        facts: of the image, for the report and the replay manifest.
        notes: what a caller should know about it.
        milliseconds: of this image, decoding included.
        cache_hit: the latents are those of an earlier request.
        fingerprint: of the VAE's weights.
    """

    latents: torch.Tensor
    facts: Mapping[str, object]
    notes: tuple[str, ...]
    milliseconds: float
    cache_hit: bool
    fingerprint: str

    def report(self) -> dict[str, object]:
        """What later stages pass on to the caller."""
        stage = {"milliseconds": round(self.milliseconds, 2), "cache_hit": self.cache_hit, **gpu_peak()}
        return {
            "image": dict(self.facts),
            "notes": list(self.notes),
            "stages": {"image_encoder": stage},
            "weights": {"vae": self.fingerprint},
        }


class ImageEncoderStage:
    """Encodes images in float32; the latents of recent images are kept and given out again.

    The encoded video is the image followed by frames of 0 (mid-grey), and the mask is 1 on the first latent frame and
    0 on the others, on 4 channels (Wan2.2 I2V).

    Args:
        vae: network on its device; None for a model that takes no image, whose requests are all refused.
        model: the served model.
        cache_entries: encoded images kept (0 turns the cache off).
        fingerprint: of the weights, for the report.
        room: bytes of GPU memory that shall be free for others between batches.
    """

    def __init__(
        self, vae: WanVAE | None, model: ModelConfig, *, cache_entries: int, fingerprint: str, room: int = 0
    ) -> None:
        self._vae = vae
        self._model = model
        self._cache_entries = cache_entries
        self._fingerprint = fingerprint
        self._room = room
        self._free = None if vae is None else FreeMemory(vae.conv1.weight.device)
        self._cache: OrderedDict[tuple[str, int, int, int, str], torch.Tensor] = OrderedDict()
        self._headers: dict[str, ImageHeader] = {}

    def encode(self, requests: Sequence[ImageRequest]) -> list[EncodedImage | TurboError]:
        """Encodes images one after another; one that cannot be encoded yields its error and harms no neighbour."""
        outcomes: list[EncodedImage | TurboError] = []
        for request in requests:
            try:
                outcomes.append(self._encode(request))
            except Exception as error:
                outcomes.append(as_turbo_error(error, "image_encoder"))
        if any(isinstance(outcome, EncodedImage) and not outcome.cache_hit for outcome in outcomes):
            assert self._vae is not None
            release_workspace(self._vae.conv1.weight.device, room=self._room)
        return outcomes

    def _encode(self, request: ImageRequest) -> EncodedImage:
        started = time.perf_counter()
        if self._vae is None:
            fits = f"left out: this server runs {self._model.name}, which makes videos from text alone"
            raise InvalidArgument("IMAGE", f"{len(request.content)} bytes", fits)
        digest = hashlib.sha256(request.content).hexdigest()
        # Pillow decodes a whole PNG to look for its orientation: known images are not asked again.
        header = self._headers.get(digest) or read_header(request.content)
        size = (header.width, header.height)
        parameters = make_parameters(self._model, request.values, seed=1, image_size=size)
        key = (digest, parameters.width, parameters.height, parameters.num_frames, parameters.fit)
        latents = self._cache.get(key)
        hit = latents is not None
        if latents is None:
            latents = self._run(self._vae, request.content, parameters)
        self._cache[key] = latents
        self._cache.move_to_end(key)
        self._headers[digest] = header
        while len(self._cache) > self._cache_entries:
            (oldest, *_), _ = self._cache.popitem(last=False)
            if not any(digest == oldest for digest, *_ in self._cache):
                del self._headers[oldest]
        facts: dict[str, object] = {
            "sha256": digest,
            "format": header.format,
            "width": header.width,
            "height": header.height,
            "fit": parameters.fit,
            "scaled_to": [parameters.width, parameters.height],
        }
        if parameters.fit == "crop":
            facts["crop"] = list(crop_box(*size, parameters.width, parameters.height))
        return EncodedImage(
            latents=latents,
            facts=facts,
            notes=_notes(size, parameters),
            milliseconds=(time.perf_counter() - started) * 1000,
            cache_hit=hit,
            fingerprint=self._fingerprint,
        )

    @torch.inference_mode()
    def _run(self, vae: WanVAE, content: bytes, parameters: GenerationParameters) -> torch.Tensor:
        """float32 `[20, T, h, w]` on the CPU."""
        device = vae.conv1.weight.device
        assert self._free is not None
        check_request(
            self._model,
            parameters,
            lambda candidate: encoder_bytes(self._model.vae, candidate, device=device),
            free=self._free.look(),
            what="encoding the image for",
        )
        width, height = parameters.width, parameters.height
        pixels_CHW = resize_image(decode_image(content), width=width, height=height, fit=parameters.fit)
        latents_CThw = vae.encode_image(to_unit_range(pixels_CHW).to(device), num_frames=parameters.num_frames).cpu()
        if not torch.isfinite(latents_CThw).all():
            raise TurboError("image_encoder gave latents that are not finite")
        mask = latents_CThw.new_zeros(self._model.num_mask_channels, *latents_CThw.shape[1:])
        mask[:, 0] = 1
        return torch.cat((mask, latents_CThw))


def _notes(size: tuple[int, int], parameters: GenerationParameters) -> tuple[str, ...]:
    distortion = (parameters.width / parameters.height) / (size[0] / size[1])
    if parameters.fit != "stretch" or abs(distortion - 1) <= _DISTORTION:
        return ()
    how = f"{size[0]}x{size[1]} image to {parameters.width}x{parameters.height}"
    return (f"the aspect ratio was changed, {how}: FIT = crop or ADAPTIVE_RESOLUTION keeps it",)
