"""Images: what is read and how, what is refused, and the resize against independent formulas."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from turbo_backend.errors import InvalidArgument
from turbo_backend.image import (
    crop_box,
    decode_image,
    read_header,
    resize_image,
    to_unit_range,
)
from turbo_backend.parameters import MAX_IMAGE_BYTES

GRADIENT = np.stack(np.broadcast_arrays(np.arange(40)[:, None] * 6, np.arange(60)[None] * 4, 90), 2).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return decode_image(content).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95, "subsampling": 0})]
)
def test_formats(kind: str, options: dict[str, object]) -> None:
    content = encode(GRADIENT, kind, **options)
    header = read_header(content)
    assert (header.format, header.width, header.height) == (kind, 60, 40)
    tolerance = 6 if kind == "JPEG" else 0
    assert np.abs(decoded(content).astype(int) - GRADIENT).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    upright = GRADIENT
    stored = {  # the picture as a camera held that way stores it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(np.ascontiguousarray(stored), "PNG", exif=exif)
    header = read_header(content)
    assert (header.width, header.height) == (60, 40)
    np.testing.assert_array_equal(decoded(content), upright)


def test_transparency_is_laid_over_white() -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 0], rgba[:8, :, 3], rgba[8:, 8:, 3] = 200, 255, 128
    pixels = decoded(encode(rgba))
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[15, 0].tolist() == [255, 255, 255]
    assert pixels[15, 15].tolist() == pytest.approx([227, 127, 127], abs=1)
    palette = Image.fromarray(np.zeros((16, 16), np.uint8), "L").convert("P")
    assert decoded(encode(palette, transparency=0))[0, 0].tolist() == [255, 255, 255]


def test_other_pixel_kinds() -> None:
    grey16 = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    np.testing.assert_array_equal(decoded(encode(grey16))[..., 0].reshape(-1), np.arange(256))
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decoded(encode(grey)), grey[..., None].repeat(3, 2))
    one_bit = Image.fromarray(grey > 128)
    assert set(np.unique(decoded(encode(one_bit)))) == {0, 255}
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    assert np.abs(decoded(encode(cmyk, "JPEG", quality=95)).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    first, second = (Image.new("RGB", (32, 24), colour) for colour in ((250, 10, 10), (10, 10, 250)))
    content = encode(
        first, kind, save_all=True, append_images=[second], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert np.abs(decoded(content)[5, 5].astype(int) - [250, 10, 10]).max() <= 1


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


BAD = {
    "nothing": (b"", "no bytes"),
    "text": (b"not an image at all", "JPEG, PNG or WebP"),
    "gif": (encode(GRADIENT, "GIF"), "JPEG, PNG or WebP"),
    "bmp": (encode(GRADIENT, "BMP"), "JPEG, PNG or WebP"),
    "tiff": (encode(GRADIENT, "TIFF"), "JPEG, PNG or WebP"),
    "truncated jpeg": (encode(GRADIENT, "JPEG")[:-200], "can be decoded"),
    "truncated png": (encode(GRADIENT)[:-40], "can be decoded"),
    "truncated webp": (encode(GRADIENT, "WEBP")[:-20], "IMAGE"),
    "one pixel": (encode(GRADIENT[:1, :1]), "at least 16 pixels a side"),
    "15 pixels": (encode(GRADIENT[:15]), "at least 16 pixels a side"),
    "a long line": (png_of(20_001, 16), "at most 20000 pixels a side"),
    "64 megapixels": (png_of(8001, 8000), "at most 64000000 pixels"),
    "a bomb": (png_of(20_000, 20_000), "at most 64000000 pixels"),
    "a large bomb": (png_of(2**31 - 1, 2**31 - 1), "IMAGE"),
    "too many bytes": (encode(GRADIENT) + bytes(MAX_IMAGE_BYTES), f"at most {MAX_IMAGE_BYTES} bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_by_name(name: str) -> None:
    content, says = BAD[name]
    with pytest.raises(InvalidArgument, match=says) as caught:
        decode_image(content)
    assert caught.value.field == "IMAGE"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@given(data=st.data())
def test_damage_gives_pixels_or_a_refusal(kind: str, data: st.DataObject) -> None:
    content = bytearray(encode(GRADIENT, kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_image(bytes(content[: data.draw(st.integers(0, len(content)))]))
    except InvalidArgument as error:
        assert error.field == "IMAGE"  # noqa: PT017 - either outcome is right
    else:
        assert pixels.shape[0] == 3


def triangle_resize(pixels_CHW: np.ndarray, width: int, height: int) -> np.ndarray:
    """The antialiased bilinear resize by its formula, in float64 and without rounding."""
    weights = []
    for size, target in ((pixels_CHW.shape[1], height), (pixels_CHW.shape[2], width)):
        scale = size / target
        support = max(scale, 1.0)
        centres = (np.arange(target)[:, None] + 0.5) * scale
        w = np.clip(1 - np.abs((np.arange(size)[None] + 0.5 - centres) / support), 0, None)
        weights.append(w / w.sum(1, keepdims=True))
    return np.einsum("yh,xw,chw->cyx", weights[0], weights[1], pixels_CHW.astype(np.float64))


@pytest.mark.oracle
@pytest.mark.parametrize(("source", "target"), [((37, 53), (16, 48)), ((100, 80), (32, 16)), ((16, 20), (64, 48))])
def test_resize_is_the_antialiased_triangle_filter_within_a_level(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, *source), np.uint8)
    height, width = target
    ours = resize_image(torch.from_numpy(pixels), width=width, height=height, fit="stretch")
    assert ours.dtype == torch.uint8
    # Each of two passes rounds to a whole level, with weights of 1/2^15 or so.
    assert np.abs(ours.numpy() - triangle_resize(pixels, width, height)).max() <= 1.1
    pillow = Image.fromarray(pixels.transpose(1, 2, 0)).resize((width, height), Image.Resampling.BILINEAR)
    assert np.abs(ours.numpy().astype(int) - np.asarray(pillow).transpose(2, 0, 1)).max() <= 1


def test_crop_keeps_the_middle_and_the_aspect_ratio() -> None:
    assert crop_box(4032, 3024, 1280, 720) == (0, 378, 4032, 2268)
    assert crop_box(1000, 4000, 480, 480) == (0, 1500, 1000, 1000)
    assert crop_box(1920, 1080, 1280, 720) == (0, 0, 1920, 1080)
    pixels = torch.zeros(3, 40, 120, dtype=torch.uint8)
    pixels[:, :, 40:80] = 200
    assert (resize_image(pixels, width=16, height=16, fit="crop") == 200).all()
    stretched = resize_image(pixels, width=16, height=16, fit="stretch")
    assert stretched[0, 0, 0] == 0
    assert stretched[0, 0, 8] == 200
    with pytest.raises(InvalidArgument, match="FIT"):
        resize_image(pixels, width=16, height=16, fit="pad")


def test_unit_range() -> None:
    values = to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(values, torch.tensor([-1.0, -0.6, 1.0]))
