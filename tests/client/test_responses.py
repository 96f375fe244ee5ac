"""Responses: what they say, and that malformed ones are refused in words."""

import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from fake_triton import FRAMES, REPORT, empty_final, respond
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from turbo_client import MalformedResponseError
from turbo_client._responses import OUTPUTS, decode_response
from turbo_client._video import Video

REQUEST = service_pb2.ModelInferRequest(model_name="text_to_video", id="r1")


def decode(message: Any) -> Any:
    return decode_response(message.infer_response, request_id="r1")


def replaced(name: str, *, datatype: str | None = None, shape: list[int] | None = None, content: bytes | None = None):
    """The last response of a request with one tensor changed."""
    message = respond(REQUEST, "done", 1, 1, video=b"mp4", frames=FRAMES, report=REPORT)
    inner = message.infer_response
    place = [output.name for output in inner.outputs].index(name)
    if datatype is not None:
        inner.outputs[place].datatype = datatype
    if shape is not None:
        del inner.outputs[place].shape[:]
        inner.outputs[place].shape.extend(shape)
    if content is not None:
        inner.raw_output_contents[place] = content
    return message


def test_progress() -> None:
    response = decode(respond(REQUEST, "denoiser", 2, 4, preview=b"jpeg"))
    assert (response.stage, response.step, response.num_steps) == ("denoiser", 2, 4)
    assert (response.preview, response.video, response.frames, response.report) == (b"jpeg", b"", None, None)


def test_last_response() -> None:
    response = decode(respond(REQUEST, "done", 1, 1, frames=FRAMES, report=REPORT))
    assert response.report == REPORT
    np.testing.assert_array_equal(response.frames, FRAMES)


def test_zero_size_tensors_are_empty() -> None:
    message = replaced("VIDEO", shape=[1, 0], content=b"")
    assert decode(message).video == b""


def test_empty_final_response_says_nothing() -> None:
    assert decode(empty_final(REQUEST)) is None


def test_outputs_of_a_newer_server_are_passed_over() -> None:
    message = respond(REQUEST, "denoiser", 1, 4)
    message.infer_response.outputs.add(name="AUDIO", datatype="FP32", shape=[1])
    message.infer_response.raw_output_contents.append(b"0000")
    assert decode(message).step == 1


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (replaced("STEP", datatype="INT64"), "STEP of type INT64, not INT32"),
        (replaced("STEP", shape=[1, 2]), "STEP of shape"),
        (replaced("STEP", content=b"12"), "STEP of shape"),
        (replaced("STAGE", content=b""), "STAGE of shape"),
        (replaced("STAGE", content=struct.pack("<I", 2) + b"\xff\xff"), "STAGE that is not UTF-8"),
        (replaced("VIDEO", content=struct.pack("<I", 2**32 - 1) + b"abc"), "VIDEO cut short: 3 of 4294967295"),
        (replaced("FRAMES", shape=[1, 5, 16, 32, 4]), "not .1, F, H, W, 3."),
        (replaced("FRAMES", shape=[1, -5, -16, 32, 3]), "not .1, F, H, W, 3."),
        (replaced("FRAMES", shape=[1, 10**6, 10**6, 10**6, 3]), "in 7680 bytes"),
        (replaced("REPORT", content=struct.pack("<I", 3) + b"[1]"), "REPORT that is not a JSON object"),
        (replaced("REPORT", content=struct.pack("<I", 1) + b"{"), "REPORT that is not JSON"),
        (replaced("REPORT", content=struct.pack("<I", 200_000) + b"[" * 200_000), "REPORT that is not JSON"),
    ],
)
def test_malformed_responses_are_refused_in_words(message: Any, says: str) -> None:
    with pytest.raises(MalformedResponseError, match=f"text_to_video.*{says}.*r1") as caught:
        decode(message)
    assert caught.value.request_id == "r1"


def test_missing_outputs_and_contents_are_refused() -> None:
    message = service_pb2.ModelStreamInferResponse()
    message.infer_response.outputs.add(name="STAGE", datatype="BYTES", shape=[1, 1])
    with pytest.raises(MalformedResponseError, match="1 outputs but 0 raw contents"):
        decode(message)
    message.infer_response.raw_output_contents.append(struct.pack("<I", 4) + b"done")
    with pytest.raises(MalformedResponseError, match="has no STEP, STEP_COUNT"):
        decode(message)


@pytest.mark.parametrize("lost", ["seed", "video"])
def test_a_report_that_describes_no_video_is_refused(lost: str) -> None:
    report = {key: value for key, value in REPORT.items() if key != lost}
    with pytest.raises(MalformedResponseError, match="REPORT lacks"):
        Video.of(decode(respond(REQUEST, "done", 1, 1, video=b"x", report=report)), request_id="r1")


def test_a_last_response_without_video_is_refused() -> None:
    with pytest.raises(MalformedResponseError, match="neither VIDEO nor FRAMES"):
        Video.of(decode(respond(REQUEST, "done", 1, 1, report=REPORT)), request_id="r1")


@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from([*OUTPUTS, "OTHER"]),
            st.sampled_from(["BYTES", "INT32", "UINT8"]),
            st.lists(st.integers(-2, 5), max_size=5),
            st.binary(max_size=24),
        )
    )
)
def test_any_tensors_give_a_response_or_a_typed_error(tensors: list[Any]) -> None:
    message = service_pb2.ModelStreamInferResponse()
    for name, datatype, shape, content in tensors:
        message.infer_response.outputs.add(name=name, datatype=datatype, shape=shape)
        message.infer_response.raw_output_contents.append(content)
    with contextlib.suppress(MalformedResponseError):
        decode(message)


def test_report_survives_as_sent() -> None:
    report = REPORT | {"notes": ["提示"]}
    assert json.dumps(decode(respond(REQUEST, "done", 1, 1, report=report)).report) == json.dumps(report)
