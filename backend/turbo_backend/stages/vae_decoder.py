"""Latents in, video out: chunk by chunk through the causal VAE, encoded to MP4 while the next chunk is decoded.

One video after another: several at once are decoded no faster, would all be done with the last of them, and would take
as much more memory.

What leaves the device are the bytes that the encoder reads, 1.5 a pixel, one chunk behind: while the host waits for
one, the kernels of the next are queued already.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
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


_Update: TypeAlias = "DecodedChunk | DecodedVideo | TurboError"


class VAEDecoderStage:
    """Decodes videos.

    Args:
        vae: network on its device, in its dtype.
        fingerprint: of the weights, for the report.
        room: bytes of GPU memory that shall be free for others between videos.
        cancellations: where requests are given up; None where nobody can.
    """

    def __init__(
        self, vae: WanVAE, *, fingerprint: str, room: int = 0, cancellations: Cancellations | None = None
    ) -> None:
        self._vae = vae
        self._fingerprint = fingerprint
        self._room = room
        self._cancellations = cancellations

    @torch.inference_mode()
    def preview(self, latents: torch.Tensor) -> bytes:
        """JPEG of one latent frame `[16, 1, h, w]` (float32)."""
        frames_BCFHW = self._vae.decode_frame(latents[None].to(self._device))
        return encode_jpeg(to_uint8(frames_BCFHW)[0, 0].cpu().numpy())

    def decode(self, waiting: dict[int, DecodeRequest]) -> Iterator[tuple[int, _Update]]:
        """Decodes requests in their order; yields (number, update), for each ending in a video or an error.

        One that is given up is answered after the running chunk, whether that is its own or not.

        Args:
            waiting: by number. Each is taken out before it is answered; more may be put in meanwhile, by any thread.
        """
        while waiting:
            current, request = next(iter(list(waiting.items())))
            with closing(self._decode(request)) as updates:
                while current in waiting:
                    for number, other in list(waiting.items()):
                        if self._is_cancelled(other):
                            self._forget(waiting.pop(number))
                            yield number, Cancelled("the request was cancelled while its video was decoded")
                    if current in waiting:
                        update = next(updates)
                        if not isinstance(update, DecodedChunk):
                            self._forget(waiting.pop(current))
                        yield current, update
            release_workspace(self._device, room=self._room)

    def _is_cancelled(self, request: DecodeRequest) -> bool:
        cancellations = self._cancellations
        return cancellations is not None and any(map(cancellations.is_requested, request.cancel_keys))

    def _forget(self, request: DecodeRequest) -> None:
        """Removes the cancellations of a request that has ended."""
        if self._cancellations is not None:
            self._cancellations.forget(*request.cancel_keys)

    def _decode(self, request: DecodeRequest) -> Generator[_Update, None, None]:
        shape = tuple(request.latents.shape)
        if len(shape) != 4:
            yield InvalidArgument("LATENTS", list(shape), "of shape [16, T, h, w]")
            return
        num_chunks, sink = shape[1], None
        started = time.perf_counter()
        try:
            sink = _VideoSink(request, self._fingerprint)
            with torch.inference_mode():
                latents_1CThw = request.latents[None].to(self._device)
                # One latent frame at a time: more decode no faster and leave the encoder more at the end.
                chunks = (HostCopy(sink.convert(frames)) for frames in self._vae.decode_chunks(latents_1CThw))
                for chunk, frames in enumerate(_one_behind(chunks), start=1):
                    sink.add(frames.wait())
                    yield DecodedChunk(step=chunk, step_count=num_chunks)
            yield _finish(sink, num_chunks, (time.perf_counter() - started) * 1000)
        except Exception as error:
            yield as_turbo_error(error, "vae_decoder")
        finally:  # also where nobody asks for the rest, because the request was cancelled
            if sink is not None:
                sink.abandon()

    @property
    def _device(self) -> torch.device:
        return self._vae.conv2.weight.device


def _one_behind(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, each only once the one after it is begun."""
    for item, _ in itertools.pairwise(itertools.chain(items, [None])):
        assert item is not None
        yield item


def _finish(sink: _VideoSink, num_chunks: int, milliseconds: float) -> DecodedVideo | TurboError:
    try:
        return sink.finish(num_chunks, milliseconds)
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

    def finish(self, num_chunks: int, decode_milliseconds: float) -> DecodedVideo:
        started = time.perf_counter()
        mp4 = self._encoder.finish() if self._encoder else b""
        frames = np.concatenate(self._raw) if self._raw else np.empty((0, 0, 0, 3), np.uint8)
        waited = (time.perf_counter() - started) * 1000
        delivery = self._request.delivery
        report = dict(self._report)
        report["stages"] = {
            **report["stages"],  # type: ignore[dict-item]
            "vae_decoder": {"milliseconds": round(decode_milliseconds, 2), **gpu_peak()},
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
