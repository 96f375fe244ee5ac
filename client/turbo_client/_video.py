"""The result of a generation."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbo_client._errors import MalformedResponseError, MissingExtraError
from turbo_client._files import atomic_file
from turbo_client._responses import StageResponse


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Video:
    """A generated video and the report of how it was made.

    Attributes:
        data: MP4 bytes; None when raw frames were asked for.
        report: the server's REPORT: timings per stage, attention provider that ran, sizes, versions, weights.
        request_id: the request's id.
        seed: the seed used, also where 0 asked for a random one.
        width, height: pixels.
        num_frames: frames.
        fps: frames a second.
    """

    data: bytes | None = field(repr=False)
    report: dict[str, Any] = field(repr=False)
    request_id: str
    seed: int
    width: int
    height: int
    num_frames: int
    fps: int
    _raw_frames: NDArray[np.uint8] | None = field(repr=False)

    @classmethod
    def of(cls, response: StageResponse, *, request_id: str) -> Video:
        """The video of a stream's last response.

        Raises:
            MalformedResponseError: it has no video, or a report that does not describe one.
        """
        if response.report is None:
            raise MalformedResponseError("the last response has no REPORT", request_id=request_id)
        if not response.video and response.frames is None:
            raise MalformedResponseError("the last response has neither VIDEO nor FRAMES", request_id=request_id)
        try:
            described = response.report["video"]
            sizes = {name: _whole(described[name]) for name in ("width", "height", "num_frames", "fps")}
            seed = _whole(response.report["seed"])
        except (KeyError, TypeError):
            raise MalformedResponseError(
                "REPORT lacks the seed or the video's width, height, num_frames or fps", request_id=request_id
            ) from None
        return cls(
            data=response.video or None,
            report=response.report,
            request_id=request_id,
            seed=seed,
            **sizes,
            _raw_frames=response.frames,
        )

    @property
    def container(self) -> str:
        """ "mp4" or "raw"."""
        return "raw" if self.data is None else "mp4"

    def frames(self) -> NDArray[np.uint8]:
        """Frames as uint8 [F, H, W, 3] in RGB: as received for raw, decoded anew at each call for MP4.

        Raises:
            MissingExtraError: decoding an MP4 needs PyAV.
        """
        if self.data is None:
            assert self._raw_frames is not None
            return self._raw_frames
        try:
            import av
        except ImportError:
            raise MissingExtraError(
                'decoding MP4 needs PyAV: pip install "turbodiffusion-server[frames]"; or ask for container="raw"'
            ) from None
        with av.open(io.BytesIO(self.data), "r") as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        return np.stack(frames).astype(np.uint8, copy=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the MP4, or raw frames as a .npy array, whole or not at all; an existing file is replaced.

        Raises:
            OSError: it cannot be written.
        """
        with atomic_file(path) as file:
            if self.data is None:
                np.save(file, self.frames(), allow_pickle=False)
            else:
                file.write(self.data)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value
