"""Frames to MP4 in memory (H.264, yuv420p, BT.709, index first), encoded in threads while later frames are decoded."""

from __future__ import annotations

import io
import queue
import threading
import time
from fractions import Fraction

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from turbo_backend.errors import TurboError

#: Equal requests must give equal bytes. So one thread count on every machine, since x264's output depends on it; and no
#: look-ahead: with it x264 164 gave up to five different files for the same 192x192 frames, even with one thread.
#: The last frame is to be out soon after the decoder's last: so the threads share each frame in slices (with a frame
#: each they wait for one another, and for frames to come), and there are no B-frames. Without these crf 19 gives the
#: size and the PSNR of crf 18 (0.447 MB at 41.97 dB for 0.464 MB at 42.18 on a moving texture).
_X264_OPTIONS = {"preset": "veryfast", "crf": "19", "threads": "8", "x264-params": "rc-lookahead=0:bframes=0"}
#: Frames from one refresh to the next. What lies between is encoded by itself, and so beside its neighbour: where one
#: encoder falls behind the decoder, it has the time of two sections for one. At 16 frames a second it is 1.5 seconds.
_SECTION = 24
_BT709 = 1
#: Shares of red and blue in the luma of BT.709.
_KR, _KB = 0.2126, 0.0722
_LIMITED_RANGE = 1


def to_uint8(frames_BCFHW: torch.Tensor) -> torch.Tensor:
    """`[B, 3, F, H, W]` in [-1, 1] to uint8 `[B, F, H, W, 3]`: clamp, then floor(255 (x + 1) / 2 + 0.5)."""
    scaled = frames_BCFHW.float().clamp(-1, 1).add(1).mul(127.5).add(0.5)
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def to_yuv420(frames_BCFHW: torch.Tensor) -> torch.Tensor:
    """`[B, 3, F, H, W]` RGB in [-1, 1] to planes uint8 `[B, F, 3 H / 2, W]`, as an encoder reads them.

    H rows of Y, then U and V of half the height and width, H / 4 rows each. BT.709 in limited range, from clamped
    values, rounded once to the nearest: Y' = 16 + 219 y, C = 128 + 224 c. Chroma lies where H.264 expects it, on
    every second column and between two rows: weights 1 2 1 along a row, the mean of two rows.
    """
    red, green, blue = frames_BCFHW.float().clamp(-1, 1).mul(0.5).add(0.5).unbind(1)
    luma = _KR * red + (1 - _KR - _KB) * green + _KB * blue
    planes = [16.5 + 219 * luma]
    for colour, weight in ((blue, _KB), (red, _KR)):
        chroma = (colour - luma) * (112 / (1 - weight))
        chroma = (chroma[..., 0::2, :] + chroma[..., 1::2, :]) * 0.5
        even, odd = chroma[..., 0::2], chroma[..., 1::2]
        before = torch.cat((even[..., :1], odd[..., :-1]), dim=-1)
        planes.append(128.5 + 0.5 * even + 0.25 * (before + odd))
    joint = torch.cat([plane.to(torch.uint8).flatten(2) for plane in planes], dim=2)
    return joint.view(*joint.shape[:2], -1, frames_BCFHW.shape[-1])


def encode_jpeg(frame_HWC: NDArray[np.uint8], *, quality: int = 80) -> bytes:
    """One uint8 RGB frame as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


class MP4Encoder:
    """Encodes one video in threads of its own; `add` returns at once, `finish` waits for the file.

    Args:
        width, height: pixels, even.
        fps: frames a second.
        num_frames: length of the video, which sizes the index at the front of the file.
        comment: text kept in the file's metadata (the replay manifest).
    """

    def __init__(self, *, width: int, height: int, fps: int, num_frames: int, comment: str) -> None:
        self._size, self._fps = (width, height), fps
        self._buffer = io.BytesIO()
        self._container = av.open(
            self._buffer,
            mode="w",
            format="mp4",
            # Reserves room for the index in front of the frames, so that a browser plays while it loads.
            options={"moov_size": str(4096 + 48 * num_frames + 2 * len(comment.encode()))},
        )
        self._container.metadata["comment"] = comment
        # Its own encoder is opened for the file's header; frames go to those of the sections.
        self._stream = self._container.add_stream("libx264", rate=fps, options=_X264_OPTIONS)
        _describe(self._stream.codec_context, self._size, fps)
        self._sections: list[_Section] = []
        self._num_frames = 0

    @property
    def milliseconds(self) -> float:
        """Spent encoding, by all threads together."""
        return sum(section.milliseconds for section in self._sections)

    def add(self, planes: NDArray[np.uint8]) -> None:
        """Queues frames `[F, 3 H / 2, W]` as `to_yuv420` gives them."""
        for frame in planes:
            if self._num_frames % _SECTION == 0:
                self._end_section()
                self._sections.append(_Section(self._num_frames, self._size, self._fps))
            self._sections[-1].frames.put(frame)
            self._num_frames += 1

    def finish(self) -> bytes:
        """Waits for the last frame and gives the file.

        Raises:
            TurboError: the encoder failed.
        """
        self.abandon()
        for section in self._sections:
            if section.error is not None:
                raise TurboError(f"MP4 encoding failed: {section.error}") from section.error
            for packet in section.packets:
                packet.stream = self._stream
                self._container.mux(packet)
        self._container.close()
        return self._buffer.getvalue()

    def abandon(self) -> None:
        """Ends the threads; again does nothing."""
        self._end_section()
        for section in self._sections:
            section.join()

    def _end_section(self) -> None:
        if self._sections:
            self._sections[-1].frames.put(None)


class _Section(threading.Thread):
    """Encodes the frames from one refresh to the next, the first of which is frame `first` of the video.

    Attributes:
        frames: planes of one frame each, None after the last.
        packets, milliseconds, error: what became of them; to be read when the thread has ended.
    """

    def __init__(self, first: int, size: tuple[int, int], fps: int) -> None:
        super().__init__(name="mp4-encoder", daemon=True)
        self.frames: queue.SimpleQueue[NDArray[np.uint8] | None] = queue.SimpleQueue()
        self.packets: list[av.Packet[av.VideoStream]] = []
        self.milliseconds = 0.0
        self.error: Exception | None = None
        self._first, self._size, self._fps = first, size, fps
        self.start()

    def run(self) -> None:
        try:
            self._encode()
        except (av.FFmpegError, ValueError, MemoryError) as error:
            self.error = error

    def _encode(self) -> None:
        context = av.CodecContext.create("libx264", "w")
        context.options = _X264_OPTIONS
        context.flags |= av.codec.context.Flags.global_header
        _describe(context, self._size, self._fps)
        index = self._first
        while (planes := self.frames.get()) is not None:
            started = time.perf_counter()
            picture = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            picture.colorspace, picture.color_range = _BT709, _LIMITED_RANGE
            picture.pts, picture.time_base = index, context.time_base
            self.packets += context.encode(picture)
            index += 1
            self.milliseconds += (time.perf_counter() - started) * 1000
        self.packets += context.encode(None)


def _describe(context: av.VideoCodecContext, size: tuple[int, int], fps: int) -> None:
    context.width, context.height = size
    context.pix_fmt = "yuv420p"
    context.thread_type = "SLICE"
    context.framerate, context.time_base = Fraction(fps), Fraction(1, fps)
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
