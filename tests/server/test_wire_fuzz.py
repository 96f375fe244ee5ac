"""Whatever arrives on the wire: an answer or a clear error, and a server that goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from turbo_client import Client

if TYPE_CHECKING:
    from turbo_backend.server.process import TritonServer

pytestmark = pytest.mark.server

TYPES = {
    "SEED": ("INT64", np.int64),
    "NUM_STEPS": ("INT32", np.int32),
    "NUM_FRAMES": ("INT32", np.int32),
    "SIGMA_MAX": ("FP64", np.float64),
    "SLA_TOPK": ("FP64", np.float64),
    "ODE": ("BOOL", np.bool_),
}
TEXTS = ("RESOLUTION", "ASPECT_RATIO", "ATTENTION_TYPE")
EXPLAINED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAVAILABLE,  # does not fit into memory
    grpc.StatusCode.INTERNAL,  # Triton's own word for malformed raw contents
}


def bytes_tensor(values: list[bytes]) -> bytes:
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def call(
    url: str, tensors: list[tuple[str, str, list[int], bytes]], parameters: dict[str, object] | None = None
) -> tuple[grpc.StatusCode, str]:
    """Status and message of one request; an error inside the stream counts as INVALID_ARGUMENT."""
    request = service_pb2.ModelInferRequest(model_name="text_to_video", id="fuzz")
    for name, datatype, shape, raw in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    for key, value in (parameters or {}).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[key], kind, value)
    with grpc.insecure_channel(url, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            for answer in stub.ModelStreamInfer(iter([request]), timeout=60, metadata=[("triton_grpc_error", "true")]):
                if answer.error_message:
                    return grpc.StatusCode.INVALID_ARGUMENT, answer.error_message
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""


shapes = st.sampled_from([[1, 1], [1], [1, 2], [2, 1], [0, 1], [1, 0], []])
# Frame counts stay invalid or small, so that a lucky draw does not render for minutes.
integers = st.one_of(st.sampled_from([-(2**31), -1, 0, 1, 2, 5, 17, 2**31 - 1]), st.integers(-(2**31), 16))
reals = st.floats(width=64)
texts = st.one_of(st.binary(max_size=40), st.sampled_from([b"144p", b"16:9", b"sla", b"480p", b"original"]))


@st.composite
def fuzzed_tensors(draw: st.DrawFn) -> list[tuple[str, str, list[int], bytes]]:
    tensors = [("PROMPT", "BYTES", [1, 1], bytes_tensor([draw(st.binary(max_size=300))]))]
    for name in draw(st.lists(st.sampled_from([*TYPES, *TEXTS]), unique=True, max_size=4)):
        shape = draw(shapes)
        count = int(np.prod(shape))
        if name in TEXTS:
            tensors.append((name, "BYTES", shape, bytes_tensor([draw(texts) for _ in range(count)])))
        else:
            datatype, dtype = TYPES[name]
            value = draw(reals if dtype is np.float64 else st.booleans() if dtype is np.bool_ else integers)
            tensors.append((name, datatype, shape, np.full(count, value, dtype).tobytes()))
    if draw(st.integers(0, 9)) == 0:
        name, datatype, shape, raw = tensors.pop()
        tensors.append((name, draw(st.sampled_from(["FP32", "INT8", "BYTES", datatype])), shape, raw[:-1]))
    return tensors


parameters = st.dictionaries(
    st.sampled_from(["container", "fps", "preview", "unknown"]),
    st.one_of(st.booleans(), st.integers(-(2**40), 2**40), st.text(max_size=10)),
    max_size=2,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(tensors=fuzzed_tensors(), extra=parameters)
def test_any_request_is_answered_or_explained(
    triton: TritonServer, tensors: list[tuple[str, str, list[int], bytes]], extra: dict[str, object]
) -> None:
    code, message = call(triton.grpc_url, tensors, extra)
    assert code is grpc.StatusCode.OK or (code in EXPLAINED and message), (code, message)


def test_server_still_serves_after_the_fuzzing(triton: TritonServer) -> None:
    with Client(triton.grpc_url) as client:
        assert client.generate("still here", num_steps=1, num_frames=17, timeout=60).data


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("PROMPT", "BYTES", [1, 1], bytes_tensor([b"\xff\xfe"]))], "UTF-8"),
        ([("PROMPT", "FP32", [1, 1], b"\0\0\0\0")], "PROMPT"),
        (
            [
                ("PROMPT", "BYTES", [1, 1], bytes_tensor([b"a"])),
                ("NUM_STEPS", "INT64", [1, 1], np.int64(2).tobytes()),
            ],
            "NUM_STEPS",
        ),
        ([], "PROMPT"),
    ],
    ids=["utf8", "prompt-dtype", "steps-dtype", "no-prompt"],
)
def test_wire_mistakes_are_named(
    triton: TritonServer, tensors: list[tuple[str, str, list[int], bytes]], words: str
) -> None:
    code, message = call(triton.grpc_url, tensors)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in message


@pytest.mark.parametrize("report", [b"{", b"[1]", b""], ids=["torn", "array", "empty"])
def test_broken_report_sent_straight_to_a_stage_is_named(triton: TritonServer, report: bytes) -> None:
    request = service_pb2.ModelInferRequest(model_name="denoiser")
    tensors = [
        ("TEXT_EMBEDDINGS", "FP32", [1, 512, 128], bytes(4 * 512 * 128)),
        ("TEXT_LENGTH", "INT32", [1, 1], np.int32(3).tobytes()),
        ("TEXT_REPORT", "BYTES", [1, 1], bytes_tensor([report])),
    ]
    for name, datatype, shape, raw in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    with grpc.insecure_channel(triton.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ModelStreamInfer(iter([request]), timeout=60, metadata=[("triton_grpc_error", "true")]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "TEXT_REPORT" in caught.value.details()
