"""Latents in, video out: chunk by chunk through the causal VAE, encoded to MP4 while the next chunk is decoded.

What leaves the device are the bytes that the encoder reads, 1.5 a pixel, one chunk behind: while the host waits for
one, the kernels of the next are queued already.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from turbo_backend.cancellation import Cancellations
from turbo_backend.errors import Cancelled, InvalidArgument, TurboError
from turbo_backend.host_copy import HostCopy
from turbo_backend.manifest import make_manifest
from turbo_backend.memory import as_turbo_error, gpu_peak, release_workspace
from turbo_backend.nets.vae import WanVAE
from turbo_backend.parameters import Delivery
from turbo_backend.video import MP4Encoder, encode_jpeg, to_uint8, to_yuv420

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """Finished latents `[16, T, h, w]` float32, the denoiser's report on them, and what it is cancelled by."""

    latents: torch.Tensor
    report: Mapping[str, object]
    delivery: Delivery
    cancel_keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedChunk:
    """Chunk `step` of `step_count` is decoded."""

    step: int
    step_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedVideo:
    """The finished video: MP4 bytes, or raw frames uint8 `[F, H, W, 3]`, and the whole report."""

    step_count: int
    report: dict[str, object]
    mp4: bytes = b""
    frames: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 0, 0, 3), np.uint8))


#: What became of the request with that index.
_Update: TypeAlias = "tuple[int, DecodedChunk | DecodedVideo | TurboError]"
_Updates: TypeAlias = "Generator[_Update, None, None]"


class VAEDecoderStage:
    """Decodes groups of requests that share a latent shape.

    Args:
        vae: network on its device, in its dtype.
        max_batch_size: most requests that one batch may decode together.
        max_batch_pixels: most pixels (frames x height x width, all members) that one batch may decode together.
        fingerprint: of the weights, for the report.
        room: bytes of GPU memory that shall be free for others between batches.
        cancellations: where requests are given up; None where nobody can.
    """

    def __init__(
        self,
        vae: WanVAE,
        *,
        max_batch_size: int,
        max_batch_pixels: int,
        fingerprint: str,
        room: int = 0,
        cancellations: Cancellations | None = None,
    ) -> None:
        self._vae = vae
        self._fingerprint = fingerprint
        self._max_batch_size = max_batch_size
        self._max_batch_pixels = max_batch_pixels
        self._room = room
        self._cancellations = cancellations

    @torch.inference_mode()
    def preview(self, latents: torch.Tensor) -> bytes:
        """JPEG of one latent frame `[16, 1, h, w]` (float32)."""
        frames_BCFHW = self._vae.decode_frame(latents[None].to(self._device))
        return encode_jpeg(to_uint8(frames_BCFHW)[0, 0].cpu().numpy())

    def decode(self, requests: Sequence[DecodeRequest]) -> Iterator[_Update]:
        """Decodes a batch; yields (index, update), for each request ending in a video or an error."""
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            if request.latents.ndim == 4:
                groups[request.latents.shape].append(index)
            else:
                yield index, InvalidArgument("LATENTS", list(request.latents.shape), "of shape [16, T, h, w]")
        for shape, members in groups.items():
            _, t, h, w = shape
            at_once = max(1, min(self._max_batch_size, self._max_batch_pixels // ((4 * t - 3) * h * w * 64)))
            for first in range(0, len(members), at_once):
                group = {index: requests[index] for index in members[first : first + at_once]}
                yield from self._heed_cancellations(group, self._decode_group(list(group), list(group.values())))
        release_workspace(self._device, room=self._room)

    def is_cancelled(self, request: DecodeRequest) -> bool:
        """Whether a request has been given up."""
        cancellations = self._cancellations
        return cancellations is not None and any(map(cancellations.is_requested, request.cancel_keys))

    def _heed_cancellations(
        self, group: Mapping[int, DecodeRequest], updates: Generator[_Update, None, None]
    ) -> Iterator[_Update]:
        """The updates of a group, without those of its cancelled members; decoding stops when none other is left."""
        live = dict(group)
        while live:
            for index in [index for index, request in live.items() if self.is_cancelled(request)]:
                self._forget(live.pop(index))
                yield index, Cancelled("the request was cancelled while its video was decoded")
            if live:
                index, update = next(updates)
                if index in live:
                    if not isinstance(update, DecodedChunk):
                        self._forget(live.pop(index))
                    yield index, update
        updates.close()

    def _forget(self, request: DecodeRequest) -> None:
        """Removes the cancellations of a request that has ended."""
        if self._cancellations is not None:
            self._cancellations.forget(*request.cancel_keys)

    def _decode_group(self, indices: Sequence[int], requests: Sequence[DecodeRequest]) -> _Updates:
        sinks: list[_VideoSink] = []
        started = time.perf_counter()
        num_chunks = requests[0].latents.shape[1]
        try:
            sinks += [_VideoSink(request, self._fingerprint) for request in requests]
            with torch.inference_mode():
                latents_BCThw = torch.stack([request.latents for request in requests]).to(self._device)
                # One latent frame at a time: more decode no faster and leave the encoder more at the end.
                chunks = self._copy_out(self._vae.decode_chunks(latents_BCThw), sinks)
                for chunk, arrived in enumerate(_one_behind(chunks), start=1):
                    for sink, frames in zip(sinks, arrived, strict=True):
                        sink.add(frames.wait())
                    for index in indices:
                        yield index, DecodedChunk(step=chunk, step_count=num_chunks)
            milliseconds = (time.perf_counter() - started) * 1000
            for index, sink in zip(indices, sinks, strict=True):
                yield index, _finish(sink, num_chunks, milliseconds, len(requests))
            return
        except Exception as error:
            if is_alone := len(requests) == 1:
                failure = as_turbo_error(error, "vae_decoder")
            else:  # what fails together may do alone
                _log.warning("%d requests failed as one batch, each now runs alone: %s", len(requests), error)
        finally:  # also where nobody asks for the rest, because all that is left was cancelled
            for sink in sinks:
                sink.abandon()
        if is_alone:
            yield indices[0], failure
            return
        for index, request in zip(indices, requests, strict=True):
            yield from self._decode_group([index], [request])

    @property
    def _device(self) -> torch.device:
        return self._vae.conv2.weight.device

    @staticmethod
    def _copy_out(chunks: Iterator[torch.Tensor], sinks: Sequence[_VideoSink]) -> Iterator[list[HostCopy]]:
        """Of each chunk every sink's frames as it wants them, on their way to the host."""
        for frames_BCFHW in chunks:
            yield [HostCopy(sink.convert(one)) for sink, one in zip(sinks, frames_BCFHW[:, None], strict=True)]


def _one_behind(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, each only once the one after it is begun."""
    for item, _ in itertools.pairwise(itertools.chain(items, [None])):
        assert item is not None
        yield item


def _finish(sink: _VideoSink, num_chunks: int, milliseconds: float, batch_size: int) -> DecodedVideo | TurboError:
    try:
        return sink.finish(num_chunks, milliseconds, batch_size)
    except Exception as error:
        return as_turbo_error(error, "video encoder")


class _VideoSink:
    """Collects the frames of one request, as MP4 or raw."""

    def __init__(self, request: DecodeRequest, fingerprint: str) -> None:
        self._request = request
        self._report = dict(request.report)
        # fps is delivery, but without it a replay would not give the same file.
        self._report["parameters"] = {**request.report["parameters"], "fps": request.delivery.fps}  # type: ignore[dict-item]
        self._report["weights"] = {**request.report.get("weights", {}), "vae": fingerprint}  # type: ignore[dict-item]
        self._encoder: MP4Encoder | None = None
        self._raw: list[NDArray[np.uint8]] = []
        self._shape: tuple[int, ...] = (0, 0)
        self._num_frames = 0

    def convert(self, frames_1CFHW: torch.Tensor) -> torch.Tensor:
        """Network output to what `add` takes: planes for an MP4, RGB for raw frames."""
        self._shape = frames_1CFHW.shape[-2:]
        return (to_yuv420 if self._request.delivery.container == "mp4" else to_uint8)(frames_1CFHW)[0]

    def add(self, frames: NDArray[np.uint8]) -> None:
        self._num_frames += len(frames)
        if self._request.delivery.container != "mp4":
            self._raw.append(frames)
            return
        if self._encoder is None:
            self._encoder = self._open()
        self._encoder.add(frames)

    def finish(self, num_chunks: int, decode_milliseconds: float, batch_size: int) -> DecodedVideo:
        started = time.perf_counter()
        mp4 = self._encoder.finish() if self._encoder else b""
        frames = np.concatenate(self._raw) if self._raw else np.empty((0, 0, 0, 3), np.uint8)
        waited = (time.perf_counter() - started) * 1000
        delivery = self._request.delivery
        report = dict(self._report)
        report["stages"] = {
            **report["stages"],  # type: ignore[dict-item]
            "vae_decoder": {"milliseconds": round(decode_milliseconds, 2), "batch_size": batch_size, **gpu_peak()},
            "video_encoder": {
                "milliseconds": round(self._encoder.milliseconds, 2) if self._encoder else 0.0,
                "milliseconds_after_decode": round(waited, 2),
            },
        }
        report["video"] = {
            "container": delivery.container,
            "width": self._shape[1],
            "height": self._shape[0],
            "num_frames": self._num_frames,
            "fps": delivery.fps,
            "bytes": len(mp4) or frames.nbytes,
        }
        return DecodedVideo(step_count=num_chunks, report=report, mp4=mp4, frames=frames)

    def abandon(self) -> None:
        """Ends the encoder's threads, if it has not finished."""
        if self._encoder is not None:
            self._encoder.abandon()

    def _open(self) -> MP4Encoder:
        t = self._request.latents.shape[1]
        height, width = self._shape
        return MP4Encoder(
            width=width,
            height=height,
            fps=self._request.delivery.fps,
            num_frames=4 * t - 3,
            comment=make_manifest(self._report),
        )
