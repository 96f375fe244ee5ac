"""An uploaded image to the pixels that an image-to-video model starts from.

JPEG, PNG and WebP are read. What a caller sees on a screen is what the model sees: EXIF orientation is applied,
transparency is laid over white, CMYK and palettes become RGB, of 16 bits the upper eight are kept, of an animation
(WebP, APNG) the first frame. Colour profiles are not applied. GIF and everything else is refused.

Size and format are read from the header first, so that a small file that claims a huge image costs nothing.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from turbo_backend.errors import InvalidArgument
from turbo_backend.parameters import FITS, MAX_IMAGE_BYTES

#: Transparent pixels show this colour.
BACKGROUND = (255, 255, 255)
MIN_IMAGE_SIDE = 16
MAX_IMAGE_SIDE = 20_000
#: A decoded image takes four bytes a pixel in Pillow and three here.
MAX_IMAGE_PIXELS = 64_000_000

_FORMATS = ("JPEG", "PNG", "WEBP")
_READABLE = "a JPEG, PNG or WebP image"
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """What a file says about its image: format, and width and height once EXIF orientation is applied."""

    format: str
    width: int
    height: int


def read_header(content: bytes) -> ImageHeader:
    """Format and size, without decoding a pixel.

    Raises:
        InvalidArgument: naming IMAGE: too many bytes, no image that is read, sides or pixels out of range.
    """
    with _opened(content) as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
            width, height = height, width
        # Phones' multi-picture files are JPEGs with more pictures behind the first.
        return ImageHeader(format="JPEG" if image.format == "MPO" else str(image.format), width=width, height=height)


def decode_image(content: bytes) -> torch.Tensor:
    """RGB pixels, uint8 `[3, H, W]`; see the module's description for how other kinds of pixels become RGB.

    Raises:
        InvalidArgument: as `read_header`, and a file that breaks off or is damaged.
    """
    with _opened(content) as image:
        image.load()
        rgb = _to_rgb(ImageOps.exif_transpose(image))
        pixels_HWC = torch.from_numpy(np.array(rgb))
    return pixels_HWC.permute(2, 0, 1).contiguous()


def resize_image(pixels_CHW: torch.Tensor, *, width: int, height: int, fit: str) -> torch.Tensor:
    """Pixels of the video's size, uint8 `[3, height, width]`.

    Bilinear with antialiasing, computed on uint8 values by PyTorch's own kernel as upstream TurboDiffusion does
    (through torchvision): a triangle filter, widened by the scale where the image shrinks, with fixed-point weights,
    so that a value may lie one level beside the correctly rounded one.

    Args:
        fit: `stretch` changes the aspect ratio (upstream's way); `crop` cuts the sides that stand over, equally.
    """
    if fit == "crop":
        left, top, crop_width, crop_height = crop_box(pixels_CHW.shape[2], pixels_CHW.shape[1], width, height)
        pixels_CHW = pixels_CHW[:, top : top + crop_height, left : left + crop_width].contiguous()
    elif fit != "stretch":
        raise InvalidArgument("FIT", fit, f"one of {', '.join(FITS)}")
    return F.interpolate(pixels_CHW[None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def crop_box(image_width: int, image_height: int, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the largest centred part of an image with the aspect ratio width : height."""
    if image_width * height > image_height * width:
        part = max(1, round(image_height * width / height))
        return (image_width - part) // 2, 0, part, image_height
    part = max(1, round(image_width * height / width))
    return 0, (image_height - part) // 2, image_width, part


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 in [-1, 1], by upstream's order of operations: (x / 255 - 0.5) / 0.5."""
    return (pixels.float() / 255 - 0.5) / 0.5


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """The image, its header checked; whatever Pillow raises on it becomes InvalidArgument."""
    if not content:
        raise InvalidArgument("IMAGE", "no bytes", _READABLE)
    if len(content) > MAX_IMAGE_BYTES:
        raise InvalidArgument("IMAGE", f"{len(content)} bytes", f"at most {MAX_IMAGE_BYTES} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning comes later than our limit
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                _check_size(*image.size)
                yield image
    except Image.DecompressionBombError:
        raise InvalidArgument("IMAGE", "more pixels", f"at most {MAX_IMAGE_PIXELS} pixels in all") from None
    except UnidentifiedImageError:
        raise InvalidArgument("IMAGE", f"{len(content)} bytes of another kind", _READABLE) from None
    except (InvalidArgument, MemoryError):
        raise
    except Exception as error:  # decoders of hostile files raise anything
        raise InvalidArgument("IMAGE", f"{len(content)} bytes", f"{_READABLE} that can be decoded ({error})") from None


def _check_size(width: int, height: int) -> None:
    size = f"{width}x{height} pixels"
    if min(width, height) < MIN_IMAGE_SIDE:
        raise InvalidArgument("IMAGE", size, f"at least {MIN_IMAGE_SIDE} pixels a side")
    if max(width, height) > MAX_IMAGE_SIDE:
        raise InvalidArgument("IMAGE", size, f"at most {MAX_IMAGE_SIDE} pixels a side")
    if width * height > MAX_IMAGE_PIXELS:
        raise InvalidArgument("IMAGE", size, f"at most {MAX_IMAGE_PIXELS} pixels in all")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, in whichever mode this Pillow opens it
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
