"""What a request may ask for, checked once: every field is used as given or refused, never rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from turbo_backend.config import ModelConfig
from turbo_backend.errors import InvalidArgument

#: (width, height) in pixels by resolution key and aspect ratio (SPEC section 2.5; 144p belongs to `tiny`).
RESOLUTIONS: dict[str, dict[str, tuple[int, int]]] = {
    key: {"1:1": one, "4:3": four_three, "3:4": four_three[::-1], "16:9": wide, "9:16": wide[::-1]}
    for key, one, four_three, wide in (
        ("144p", (192, 192), (208, 160), (256, 144)),
        ("480p", (640, 640), (640, 480), (832, 480)),
        ("720p", (960, 960), (960, 720), (1280, 720)),
        ("720", (960, 960), (960, 704), (1280, 704)),
        ("512", (512, 512), (640, 512), (640, 384)),
        ("480", (480, 480), (640, 480), (768, 432)),
    )
}
ASPECT_RATIOS = ("1:1", "4:3", "3:4", "16:9", "9:16")
ATTENTION_TYPES = ("original", "sla", "sagesla")
MAX_SEED = 2**63 - 1
#: How an image is brought to the video's size: as upstream does, or cut to its aspect ratio.
FITS = ("stretch", "crop")
#: Fields that every model takes, and those that only an image model does, by their names on the wire.
TEXT_FIELDS = (
    "SEED",
    "NUM_STEPS",
    "NUM_FRAMES",
    "RESOLUTION",
    "ASPECT_RATIO",
    "SIGMA_MAX",
    "ATTENTION_TYPE",
    "SLA_TOPK",
    "ODE",
)
IMAGE_FIELDS = ("BOUNDARY", "ADAPTIVE_RESOLUTION", "FIT")
#: RoPE positions reach 128 patches on each axis, so 128 latent frames and 2048 pixels a side.
MAX_LATENT_FRAMES = 128
MAX_SIDE = 2048
#: The second step of the schedule stands at sigma = tan(1.5); the first must lie above it.
MIN_SIGMA_MAX = 14.2
#: Longer prompts are refused before they are tokenized; no 512-token prompt comes near it.
MAX_PROMPT_BYTES = 64 * 1024
MAX_IMAGE_BYTES = 20 * 2**20
#: A week.
MAX_DEADLINE_MS = 7 * 24 * 3600 * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParameters:
    """One request's parameters, valid by construction.

    Attributes:
        seed: 0 < seed <= 2**63 - 1 (a request's 0 is drawn before this is built).
        num_steps: denoising steps, 1 to 4.
        num_frames: pixel frames, 4k + 1.
        width, height: pixels, multiples of 16.
        sigma_max: highest noise level, > 0.
        sla_topk: share of key blocks that the sparse branch attends to, in (0, 1].
        boundary: RF time below which the low-noise expert takes over (two-expert models).
        ode: deterministic sampling instead of fresh noise at each step.
        adaptive_resolution: width and height follow the image's aspect ratio (image models).
        fit: how the image is brought to width and height, `stretch` or `crop` (image models).
    """

    seed: int
    num_steps: int
    num_frames: int
    resolution: str
    aspect_ratio: str
    width: int
    height: int
    sigma_max: float
    attention_type: str
    sla_topk: float
    boundary: float
    ode: bool
    adaptive_resolution: bool = False
    fit: str = "stretch"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(T, h, w) of the latents."""
        return (1 + (self.num_frames - 1) // 4, self.height // 8, self.width // 8)

    @property
    def num_tokens(self) -> int:
        """Length L of the denoiser's token sequence."""
        t, h, w = self.latent_shape
        return t * (h // 2) * (w // 2)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def check_image_given(model: ModelConfig, *, given: bool) -> None:
    """Refuses an image that `model` does not take, and a request without the one that it starts from.

    Raises:
        InvalidArgument: naming the model.
    """
    if model.takes_image and not given:
        raise InvalidArgument("IMAGE", None, f"given: {model.name} starts from an image ({model.ensemble})")
    if given and not model.takes_image:
        raise InvalidArgument("IMAGE", "an image", f"left out: {model.name} makes videos from text alone")


def make_parameters(
    model: ModelConfig, values: Mapping[str, object], *, seed: int, image_size: tuple[int, int] | None = None
) -> GenerationParameters:
    """Checks a request's values against what `model` serves; absent fields take the model's defaults.

    Args:
        values: by wire name (`NUM_STEPS`, `SIGMA_MAX`, ...), as Python scalars.
        seed: used when SEED is absent or 0.
        image_size: (width, height) of the image, which ADAPTIVE_RESOLUTION follows.

    Raises:
        InvalidArgument: naming field, value and what fits.
    """
    for field in IMAGE_FIELDS:
        if field in values and not model.takes_image:
            raise InvalidArgument(field, values[field], f"left out: {model.name} makes videos from text alone")
    num_steps = _integer(values, "NUM_STEPS", 4)
    if not 1 <= num_steps <= 4:
        raise InvalidArgument("NUM_STEPS", num_steps, "1, 2, 3 or 4")
    num_frames = _integer(values, "NUM_FRAMES", model.default_num_frames)
    max_frames = 4 * (MAX_LATENT_FRAMES - 1) + 1
    if not 1 <= num_frames <= max_frames or num_frames % 4 != 1:
        below = max(1, min(max_frames, num_frames - (num_frames - 1) % 4))
        near = f"{below} or {below + 4}" if 1 <= num_frames <= max_frames - 4 else f"{below}"
        raise InvalidArgument("NUM_FRAMES", num_frames, f"4k + 1 and at most {max_frames}; nearest: {near}")
    given_seed = _integer(values, "SEED", 0)
    if not 0 <= given_seed <= MAX_SEED:
        raise InvalidArgument("SEED", given_seed, f"0 (draw one) to {MAX_SEED}")

    sigma_max = _real(values, "SIGMA_MAX", model.default_sigma_max, low=0.0, high=1e6, fits="over 0, at most 1e6")
    if num_steps > 1 and sigma_max < MIN_SIGMA_MAX:
        raise InvalidArgument("SIGMA_MAX", sigma_max, f"at least {MIN_SIGMA_MAX} with more than one step")

    resolution = _choice(values, "RESOLUTION", model.resolutions, model.default_resolution)
    aspect_ratio = _choice(values, "ASPECT_RATIO", ASPECT_RATIOS, "16:9")
    width, height = RESOLUTIONS[resolution][aspect_ratio]
    adaptive_resolution = _boolean(values, "ADAPTIVE_RESOLUTION", False)
    if adaptive_resolution and image_size is not None:
        width, height = adaptive_size(width * height, *image_size)
    return GenerationParameters(
        seed=given_seed or seed,
        num_steps=num_steps,
        num_frames=num_frames,
        resolution=resolution,
        aspect_ratio=aspect_ratio,
        width=width,
        height=height,
        sigma_max=sigma_max,
        attention_type=_choice(values, "ATTENTION_TYPE", ATTENTION_TYPES, "sagesla"),
        sla_topk=_real(values, "SLA_TOPK", 0.1, low=0.0, high=1.0, fits="over 0, at most 1"),
        boundary=_real(values, "BOUNDARY", 0.9, low=0.5 - 1e-12, high=1.0, fits="0.5 to 1"),
        ode=_boolean(values, "ODE", False),
        adaptive_resolution=adaptive_resolution,
        fit=_choice(values, "FIT", FITS, "stretch"),
    )


def adaptive_size(area: int, image_width: int, image_height: int) -> tuple[int, int]:
    """(width, height) with the aspect ratio of an image and about `area` pixels, both multiples of 16.

    With a = image_height / image_width, upstream's rule: width = 16 round(sqrt(area / a) / 16) and
    height = 16 round(sqrt(area a) / 16), halves rounded to even.

    Raises:
        InvalidArgument: naming IMAGE, where a side falls outside the network's positions.
    """
    ratio = image_height / image_width
    width = 16 * round(math.sqrt(area / ratio) / 16)
    height = 16 * round(math.sqrt(area * ratio) / 16)
    if max(width, height) > MAX_SIDE or min(width, height) < 16:
        # The long side reaches MAX_SIDE at area = MAX_SIDE^2 / aspect ratio.
        widest = min(MAX_SIDE**2 / area, area / 16**2)
        raise InvalidArgument(
            "IMAGE",
            f"{image_width}x{image_height} pixels",
            f"at most {math.floor(widest * 100) / 100:g}:1 with ADAPTIVE_RESOLUTION: "
            f"{width}x{height} has a side outside 16 to {MAX_SIDE} pixels",
        )
    return width, height


def _integer(values: Mapping[str, object], field: str, default: int) -> int:
    value = values.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(field, value, "an integer")
    return value


def _real(values: Mapping[str, object], field: str, default: float, *, low: float, high: float, fits: str) -> float:
    value = values.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(field, value, "a number")
    if not (math.isfinite(value) and low < value <= high):
        raise InvalidArgument(field, value, fits)
    return float(value)


def _choice(values: Mapping[str, object], field: str, choices: tuple[str, ...], default: str) -> str:
    value = values.get(field, default)
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgument(field, value, f"one of {', '.join(choices)}")
    return value


def _boolean(values: Mapping[str, object], field: str, default: bool) -> bool:
    value = values.get(field, default)
    if not isinstance(value, bool):
        raise InvalidArgument(field, value, "true or false")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How the caller wants the result; none of it changes a pixel.

    Attributes:
        container: `mp4` (H.264) or `raw` (uint8 RGB frames).
        fps: frames a second that the MP4 plays at.
        preview: send a small JPEG of the denoised estimate with each step.
    """

    container: str = "mp4"
    fps: int = 16
    preview: bool = True


def make_delivery(values: Mapping[str, object]) -> Delivery:
    """Checks the request parameters that concern delivery; parameters of other names are not ours to judge.

    Raises:
        InvalidArgument: naming parameter, value and what fits.
    """
    fps = _integer(values, "fps", 16)
    if not 1 <= fps <= 60:
        raise InvalidArgument("fps", fps, "1 to 60")
    return Delivery(
        container=_choice(values, "container", ("mp4", "raw"), "mp4"),
        fps=fps,
        preview=_boolean(values, "preview", True),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """When a request runs beside others; none of it changes a pixel.

    Attributes:
        priority_level: 0, the most urgent, to 9.
        deadline_ms: milliseconds from the request's arrival at the denoiser in which its latents must be done; None
            for no limit.
        durable: keep the state after each step, and go on from what is kept.
    """

    priority_level: int = 5
    deadline_ms: int | None = None
    durable: bool = False


def make_scheduling(values: Mapping[str, object]) -> Scheduling:
    """Checks the request parameters that concern scheduling, as `make_delivery` does those of delivery.

    Triton keeps the parameter names `priority` and `timeout` to itself: they never reach a model.

    Raises:
        InvalidArgument: naming parameter, value and what fits.
    """
    priority_level = _integer(values, "priority_level", 5)
    if not 0 <= priority_level <= 9:
        raise InvalidArgument("priority_level", priority_level, "0 (most urgent) to 9")
    deadline_ms = _integer(values, "deadline_ms", 0) if "deadline_ms" in values else None
    if deadline_ms is not None and not 1 <= deadline_ms <= MAX_DEADLINE_MS:
        raise InvalidArgument("deadline_ms", deadline_ms, f"1 to {MAX_DEADLINE_MS} milliseconds")
    return Scheduling(
        priority_level=priority_level, deadline_ms=deadline_ms, durable=_boolean(values, "durable", False)
    )
