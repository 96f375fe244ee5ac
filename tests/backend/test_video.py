"""MP4 in memory: decodable, index first, deterministic, with its manifest."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch

from turbo_backend.errors import TurboError
from turbo_backend.video import MP4Encoder, encode_jpeg, to_uint8, to_yuv420


def make_frames(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A square that moves over a gradient."""
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = np.linspace(30, 220, width).astype(np.uint8)[:, None]
    for index in range(num_frames):
        frames[index, 8:24, index : index + 16] = (220, 30, 40)
    return frames


def encode(frames: np.ndarray, *, chunk: int, comment: str = "{}", fps: int = 16) -> bytes:
    num_frames, height, width, _ = frames.shape
    planes = to_planes(frames)
    encoder = MP4Encoder(width=width, height=height, fps=fps, num_frames=num_frames, comment=comment)
    for first in range(0, num_frames, chunk):
        encoder.add(planes[first : first + chunk])
    return encoder.finish()


def to_planes(frames_FHWC: np.ndarray) -> np.ndarray:
    frames_BCFHW = torch.from_numpy(frames_FHWC).permute(3, 0, 1, 2)[None] / 127.5 - 1
    return to_yuv420(frames_BCFHW)[0].numpy()


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 16), (5, 1), (33, 24)])
def test_every_frame_comes_back_in_its_colours(num_frames: int, fps: int) -> None:
    frames = make_frames(num_frames)
    with av.open(io.BytesIO(encode(frames, chunk=4, fps=fps))) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == fps
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == num_frames
    errors = [np.abs(a.astype(int) - b).mean() for a, b in zip(frames, decoded, strict=True)]
    assert max(errors) < 6


def test_index_lies_before_the_frames_even_with_a_long_comment() -> None:
    comment = "永" * 20_000
    mp4 = encode(make_frames(81), chunk=4, comment=comment)
    assert 0 < mp4.index(b"moov") < mp4.index(b"mdat")
    with av.open(io.BytesIO(mp4)) as container:
        assert container.metadata["comment"] == comment


def test_chunks_do_not_change_the_bytes() -> None:
    frames = make_frames(17)
    assert encode(frames, chunk=1) == encode(frames, chunk=4) == encode(frames, chunk=17)


def test_sections_follow_each_other_and_each_begins_anew() -> None:
    frames = make_frames(81, width=160)
    with av.open(io.BytesIO(encode(frames, chunk=4))) as container:
        decoded = list(container.decode(video=0))
    assert [frame.pts * frame.time_base * 16 for frame in decoded] == list(range(81))
    assert [index for index, frame in enumerate(decoded) if frame.key_frame] == [0, 24, 48, 72]
    errors = [np.abs(a.astype(int) - b.to_ndarray(format="rgb24")).mean() for a, b in zip(frames, decoded, strict=True)]
    assert max(errors) < 6


def test_equal_frames_give_equal_bytes() -> None:
    noise = np.random.default_rng(5).integers(0, 256, (21, 192, 192, 3), dtype=np.uint8)
    assert len({encode(noise, chunk=4) for _ in range(20)}) == 1


def test_encoder_failure_is_told() -> None:
    encoder = MP4Encoder(width=64, height=48, fps=16, num_frames=2, comment="")
    encoder.add(np.zeros((2, 71, 64), np.uint8))
    with pytest.raises(TurboError, match="MP4 encoding failed"):
        encoder.finish()


def test_abandoned_encoder_ends_its_threads() -> None:
    encoder = MP4Encoder(width=96, height=48, fps=16, num_frames=40, comment="")
    encoder.add(to_planes(make_frames(40, width=96)))
    encoder.abandon()
    assert not any(section.is_alive() for section in encoder._sections)


def test_to_uint8_clamps_and_rounds_half_up() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 1 / 255])
    frames = values.view(1, 1, 1, 1, -1).expand(1, 3, 1, 1, -1)
    assert to_uint8(frames)[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]


@pytest.mark.oracle
def test_planes_are_those_of_bt709() -> None:
    """Against the standard's own matrix in float64, chroma by its taps at each place."""
    generator = torch.Generator().manual_seed(3)
    frames = torch.randn(2, 3, 3, 8, 12, generator=generator)
    planes = to_yuv420(frames).numpy()
    assert planes.shape == (2, 3, 12, 12)
    rgb = (frames.double().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 4, 1).numpy()
    matrix = np.array(
        [[0.2126, 0.7152, 0.0722], [-0.114572, -0.385428, 0.5], [0.5, -0.454153, -0.045847]]
    )  # BT.709: y, c_b, c_r
    y, cb, cr = np.moveaxis(rgb @ matrix.T, -1, 0)
    assert np.abs(planes[:, :, :8] - (16 + 219 * y)).max() <= 0.5001
    for chroma, lies in ((cb, planes[:, :, 8:10]), (cr, planes[:, :, 10:])):
        for row in range(4):
            for column in range(6):
                taps = (max(2 * column - 1, 0), 2 * column, 2 * column + 1)
                lines = chroma[:, :, 2 * row : 2 * row + 2].mean(2)
                exact = 128 + 224 * (lines[:, :, taps] @ np.array([0.25, 0.5, 0.25]))
                assert np.abs(lies.reshape(2, 3, 4, 6)[:, :, row, column] - exact).max() <= 0.501


def test_grey_stays_grey_and_the_range_is_limited() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 0.5])
    planes = to_yuv420(values.view(1, 1, -1, 1, 1).expand(1, 3, -1, 2, 2))[0]
    assert planes[:, 0, 0].tolist() == [16, 16, 126, 235, 235, 180]
    assert (planes[:, 2] == 128).all()


def test_jpeg_begins_like_one() -> None:
    assert encode_jpeg(make_frames(1)[0]).startswith(b"\xff\xd8\xff")
