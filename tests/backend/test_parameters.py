"""Request parameters: used as given or refused by name, never rounded."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo_backend.config import MODELS
from turbo_backend.errors import InvalidArgument
from turbo_backend.parameters import MAX_SIDE, RESOLUTIONS, adaptive_size, make_delivery, make_parameters

TINY, WAN, IMAGE_WAN = MODELS["tiny"], MODELS["Wan2.1-1.3B"], MODELS["Wan2.2-A14B"]


def test_defaults_depend_on_the_model() -> None:
    tiny, wan = (make_parameters(model, {}, seed=5) for model in (TINY, WAN))
    assert (tiny.width, tiny.height, tiny.num_frames, tiny.num_tokens) == (256, 144, 33, 1296)
    assert (wan.width, wan.height, wan.num_frames, wan.num_tokens) == (832, 480, 81, 32760)
    assert (wan.sigma_max, MODELS["Wan2.2-A14B"].default_sigma_max) == (80.0, 200.0)


@pytest.mark.parametrize(
    ("resolution", "aspect_ratio", "tokens"),
    [
        ("480p", "1:1", 33600),
        ("480p", "4:3", 25200),
        ("480p", "16:9", 32760),
        ("720p", "16:9", 75600),
        ("720p", "3:4", 56700),
        ("720", "16:9", 73920),
        ("512", "1:1", 21504),
        ("512", "16:9", 20160),
        ("480", "9:16", 27216),
    ],
)
def test_published_sizes_have_the_published_token_counts(resolution: str, aspect_ratio: str, tokens: int) -> None:
    given_values = {"RESOLUTION": resolution, "ASPECT_RATIO": aspect_ratio}
    assert make_parameters(WAN, given_values, seed=1).num_tokens == tokens


def test_every_size_fits_patches_and_positions() -> None:
    for sizes in RESOLUTIONS.values():
        for width, height in sizes.values():
            assert width % 16 == height % 16 == 0
            assert max(width, height) <= MAX_SIDE


def test_seed_zero_takes_the_drawn_one() -> None:
    assert make_parameters(TINY, {"SEED": 0}, seed=77).seed == 77
    assert make_parameters(TINY, {"SEED": 2**63 - 1}, seed=77).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("NUM_STEPS", 0),
        ("NUM_STEPS", True),
        ("NUM_STEPS", 2.0),
        ("NUM_FRAMES", 80),
        ("NUM_FRAMES", -3),
        ("NUM_FRAMES", 513),
        ("SEED", -1),
        ("SEED", 2**63),
        ("SIGMA_MAX", math.nan),
        ("SIGMA_MAX", math.inf),
        ("SIGMA_MAX", 0.0),
        ("SIGMA_MAX", 14.0),
        ("SIGMA_MAX", "80"),
        ("SLA_TOPK", 0.0),
        ("SLA_TOPK", 1.0000001),
        ("BOUNDARY", 0.49),
        ("BOUNDARY", 1.01),
        ("RESOLUTION", "1080p"),
        ("RESOLUTION", "144p"),
        ("ASPECT_RATIO", "21:9"),
        ("ATTENTION_TYPE", "Sagesla"),
        ("ODE", 1),
    ],
)
def test_what_does_not_fit_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make_parameters(IMAGE_WAN if field == "BOUNDARY" else WAN, {field: value}, seed=1)
    assert caught.value.field == field
    assert field in str(caught.value)
    assert caught.value.fits in str(caught.value)


def test_refused_frame_count_names_the_nearest() -> None:
    with pytest.raises(InvalidArgument, match="81 or 85"):
        make_parameters(WAN, {"NUM_FRAMES": 83}, seed=1)


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=9))


@given(st.dictionaries(st.sampled_from(["SEED", "NUM_STEPS", "NUM_FRAMES", "SIGMA_MAX", "SLA_TOPK", "ODE"]), scalars))
def test_anything_is_valid_or_refused(values: dict[str, object]) -> None:
    try:
        parameters = make_parameters(TINY, values, seed=1)
    except InvalidArgument as error:
        assert error.field in values  # noqa: PT017
    else:
        assert parameters.num_frames % 4 == 1
        assert math.isfinite(parameters.sigma_max)


@pytest.mark.parametrize("values", [{"fps": 0}, {"fps": 61}, {"fps": "16"}, {"container": "avi"}, {"preview": 1}])
def test_bad_delivery_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        make_delivery(values)


def test_delivery_ignores_parameters_of_others() -> None:
    assert make_delivery({"traceparent": "00-abc", "fps": 24}).fps == 24


@pytest.mark.parametrize("values", [{"BOUNDARY": 0.9}, {"ADAPTIVE_RESOLUTION": True}, {"FIT": "crop"}])
def test_what_belongs_to_an_image_is_refused_without_one(values: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match=r"left out: Wan2\.1-1\.3B makes videos from text alone"):
        make_parameters(WAN, values, seed=1)
    make_parameters(IMAGE_WAN, values, seed=1, image_size=(100, 100))


#: Worked out apart from the code, in whole numbers: k with (k - 1/2)^2 < area * aspect / 256 < (k + 1/2)^2.
ADAPTIVE = [
    # preset at 16:9, image width and height, video width and height
    ("720p", 4032, 3024, 1104, 832),
    ("720p", 3024, 4032, 832, 1104),
    ("720p", 1920, 1080, 1280, 720),
    ("720p", 1080, 1920, 720, 1280),
    ("720p", 1000, 1000, 960, 960),
    ("720p", 6000, 4000, 1168, 784),
    ("720p", 4000, 6000, 784, 1168),
    ("720p", 2560, 1080, 1472, 624),
    ("720p", 1179, 2556, 656, 1408),
    ("720p", 4096, 2160, 1328, 704),
    ("720p", 3000, 1000, 1664, 560),
    ("720p", 1000, 4000, 480, 1920),
    ("720p", 64, 48, 1104, 832),
    ("720p", 1200, 628, 1328, 688),
    ("480p", 4032, 3024, 736, 544),
    ("480p", 1920, 1080, 848, 480),
    ("480p", 1080, 1350, 560, 704),
    ("480p", 1000, 1000, 624, 624),
    ("480p", 2000, 3000, 512, 768),
    ("480p", 3440, 1440, 976, 416),
    ("480p", 500, 2000, 320, 1264),
    ("720", 1920, 1080, 1264, 704),
    ("720", 3000, 2000, 1168, 768),
    ("512", 1920, 1080, 656, 368),
    ("512", 1024, 1024, 496, 496),
    ("480", 1920, 1080, 768, 432),
    ("480", 1080, 1920, 432, 768),
    ("144p", 1920, 1080, 256, 144),
    ("144p", 1000, 1000, 192, 192),
    ("144p", 3000, 1500, 272, 128),
]


@pytest.mark.oracle
@pytest.mark.parametrize(("resolution", "image_width", "image_height", "width", "height"), ADAPTIVE)
def test_adaptive_size(resolution: str, image_width: int, image_height: int, width: int, height: int) -> None:
    area = math.prod(RESOLUTIONS[resolution]["16:9"])
    assert adaptive_size(area, image_width, image_height) == (width, height)
    if resolution != "144p":
        values = {"RESOLUTION": resolution, "ADAPTIVE_RESOLUTION": True}
        parameters = make_parameters(IMAGE_WAN, values, seed=1, image_size=(image_width, image_height))
        assert (parameters.width, parameters.height) == (width, height)


@pytest.mark.parametrize("size", [(5000, 1000), (1000, 5000), (20000, 16)])
def test_panoramas_beyond_the_positions_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match=r"IMAGE = .*at most 4\.55:1 with ADAPTIVE_RESOLUTION"):
        make_parameters(IMAGE_WAN, {"ADAPTIVE_RESOLUTION": True}, seed=1, image_size=size)
    assert make_parameters(IMAGE_WAN, {}, seed=1, image_size=size).width == 1280


@given(st.integers(16, 20000), st.integers(16, 20000), st.sampled_from(["480p", "720p", "512"]))
def test_adaptive_sizes_fit_the_network_or_are_refused(image_width: int, image_height: int, resolution: str) -> None:
    area = math.prod(RESOLUTIONS[resolution]["16:9"])
    try:
        width, height = adaptive_size(area, image_width, image_height)
    except InvalidArgument as error:
        assert error.field == "IMAGE"  # noqa: PT017
        return
    assert width % 16 == height % 16 == 0
    assert 16 <= min(width, height) <= max(width, height) <= MAX_SIDE
    ratio = image_height / image_width
    assert abs(width - math.sqrt(area / ratio)) <= 8
    assert abs(height - math.sqrt(area * ratio)) <= 8
