"""Requests: what they refuse, and their bytes on the wire."""

from pathlib import Path

import numpy as np
import pytest
from fake_triton import read_inputs, read_parameters
from hypothesis import given
from hypothesis import strategies as st

from turbo_client import GenerationRequest


def encode(request: GenerationRequest):
    return request.encode_stream(model="text_to_video", request_id="r1")


def test_defaults_that_depend_on_the_model_are_not_sent() -> None:
    message = encode(GenerationRequest("a fox"))
    assert (message.model_name, message.id) == ("text_to_video", "r1")
    assert read_inputs(message) == {
        "PROMPT": "a fox",
        "SEED": 0,
        "NUM_STEPS": 4,
        "ASPECT_RATIO": "16:9",
        "ATTENTION_TYPE": "sagesla",
        "SLA_TOPK": 0.1,
        "ODE": False,
    }
    assert read_parameters(message) == {
        "container": "mp4",
        "fps": 16,
        "preview": False,
        "triton_enable_empty_final_response": True,
    }


def test_everything_that_is_set_is_sent() -> None:
    request = GenerationRequest(
        "狐狸", seed=2**63 - 1, num_steps=2, num_frames=33, resolution="144p", aspect_ratio="1:1", sigma_max=80,
        attention_type="sla", sla_topk=0.5, ode=True, container="raw", fps=24, preview=True, priority_level=2,
    )  # fmt: skip
    message = encode(request)
    assert read_inputs(message) == {
        "PROMPT": "狐狸",
        "SEED": 2**63 - 1,
        "NUM_STEPS": 2,
        "NUM_FRAMES": 33,
        "RESOLUTION": "144p",
        "ASPECT_RATIO": "1:1",
        "SIGMA_MAX": 80.0,
        "ATTENTION_TYPE": "sla",
        "SLA_TOPK": 0.5,
        "ODE": True,
    }
    assert message.parameters["priority_level"].int64_param == 2
    assert read_parameters(message)["container"] == "raw"
    assert read_parameters(message)["fps"] == 24


def test_ranges_are_left_to_the_server() -> None:
    message = encode(GenerationRequest("", seed=-5, num_steps=0, num_frames=-1, sigma_max=float("nan"), fps=0))
    assert read_inputs(message)["SEED"] == -5
    assert read_inputs(message)["SIGMA_MAX"] != read_inputs(message)["SIGMA_MAX"]


def test_numpy_scalars_are_python_scalars() -> None:
    request = GenerationRequest("a", seed=np.int64(7), sla_topk=np.float32(0.5), ode=np.bool_(True))
    assert request == GenerationRequest("a", seed=7, sla_topk=0.5, ode=True)
    assert type(request.seed) is int
    assert type(request.ode) is bool


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", b"a"), ("prompt", None), ("seed", 1.5), ("seed", "1"), ("seed", True), ("num_steps", None),
     ("num_frames", 3.0), ("sigma_max", "80"), ("sigma_max", True), ("sla_topk", None), ("ode", 1), ("ode", "no"),
     ("preview", 0), ("resolution", 480), ("container", None), ("priority_level", 1.0), ("timeout", "1")],
)  # fmt: skip
def test_wrong_types_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{field} = "):
        GenerationRequest(**({"prompt": "a"} | {field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 2**63), ("seed", -(2**63) - 1), ("num_steps", 2**31), ("num_frames", -(2**31) - 1),
     ("priority_level", 2**63), ("prompt", "\ud800"), ("timeout", 0.0), ("timeout", -1), ("timeout", float("nan"))],
)  # fmt: skip
def test_values_that_the_wire_cannot_hold_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}\b"):
        GenerationRequest(**({"prompt": "a"} | {field: value}))


def test_arguments_make_the_same_request() -> None:
    request = GenerationRequest("a", seed=3, num_frames=5, preview=True)
    assert GenerationRequest(**request.arguments()) == request


@given(prompt=st.text(), seed=st.integers(-(2**63), 2**63 - 1), sigma=st.none() | st.floats(allow_nan=False))
def test_values_survive_the_wire(prompt: str, seed: int, sigma: float | None) -> None:
    found = read_inputs(encode(GenerationRequest(prompt, seed=seed, sigma_max=sigma)))
    assert (found["PROMPT"], found["SEED"], found.get("SIGMA_MAX")) == (prompt, seed, sigma)


def test_image_from_bytes_or_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG and more \xff")
    requests = [
        GenerationRequest("a", image=source)
        for source in (b"\x89PNG and more \xff", tmp_path / "a.png", str(tmp_path / "a.png"))
    ]
    assert requests[0] == requests[1] == requests[2]
    message = requests[0].encode_stream(model="image_to_video", request_id="r1")
    found = dict(zip([tensor.name for tensor in message.inputs], message.raw_input_contents, strict=True))
    assert found["IMAGE"] == b"\x0f\0\0\0\x89PNG and more \xff"
    assert set(found) >= {"BOUNDARY", "ADAPTIVE_RESOLUTION", "FIT"}
    assert requests[0].ensemble == "image_to_video"
    assert b"PNG" not in repr(requests[0]).encode()
    with pytest.raises(FileNotFoundError):
        GenerationRequest("a", image=tmp_path / "absent.png")
    with pytest.raises(TypeError, match=r"^image: must be bytes or a path"):
        GenerationRequest("a", image=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"boundary": 0.8}, {"adaptive_resolution": True}, {"fit": "crop"}])
def test_what_belongs_to_an_image_is_refused_without_one(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="belongs to an image, and there is none"):
        GenerationRequest("a", **values)
    GenerationRequest("a", image=b"x", **values)


@pytest.mark.parametrize(
    ("values", "remarked"),
    [({}, False), ({"num_steps": 3}, False), ({"num_steps": 2}, True), ({"num_steps": 1}, True),
     ({"num_steps": 2, "boundary": 0.95}, False), ({"num_steps": 4, "boundary": 0.5}, True),
     ({"num_steps": 1, "sigma_max": 5.0}, False), ({"num_steps": 9}, False)],
)  # fmt: skip
def test_remark_on_a_low_noise_expert_that_never_runs(values: dict[str, object], remarked: bool) -> None:
    remark = GenerationRequest("a", image=b"x", **values).remark()
    assert (remark is not None) == remarked
    assert GenerationRequest("a", num_steps=1).remark() is None
