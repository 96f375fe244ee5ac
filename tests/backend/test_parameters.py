"""Request parameters: used as given or refused by name, never rounded."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo_backend.config import MODELS
from turbo_backend.errors import InvalidArgument
from turbo_backend.parameters import MAX_SIDE, RESOLUTIONS, make_delivery, make_parameters

TINY, WAN = MODELS["tiny"], MODELS["Wan2.1-1.3B"]


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
        make_parameters(WAN, {field: value}, seed=1)
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
