"""A Triton server of this process: the real protocol over loopback, with answers that each test writes."""

from __future__ import annotations

import io
import json
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import av
import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

Answer = Callable[[Any, grpc.ServicerContext], Iterator[Any]]

REPORT: dict[str, Any] = {
    "request_id": "set by the answer",
    "model": "tiny",
    "seed": 4242,
    "parameters": {"num_steps": 2},
    "stages": {
        "text_encoder": {"milliseconds": 3.5},
        "denoiser": {"milliseconds": 20.0, "step_milliseconds": [10.0, 10.0]},
        "vae_decoder": {"milliseconds": 9.0},
        "video_encoder": {"milliseconds": 2.0},
    },
    "attention": {"type": "sagesla", "provider": "reference", "block_q": 128, "block_k": 64},
    "video": {"width": 32, "height": 16, "num_frames": 5, "fps": 16, "bytes": 1},
    "versions": {"server": "0.1.0"},
    "weights": {"denoiser": "sha256:aa"},
    "notes": [],
}
MANIFEST: dict[str, Any] = {
    "turbodiffusion_manifest": 1,
    "model": "tiny",
    "ensemble": "text_to_video",
    "prompt": "红色的狐狸 in the snow",
    "seed": 4242,
    "parameters": {
        "num_steps": 2,
        "num_frames": 5,
        "resolution": "144p",
        "aspect_ratio": "16:9",
        "width": 256,
        "height": 144,
        "sigma_max": 80.0,
        "attention_type": "sla",
        "sla_topk": 0.25,
        "ode": True,
        "fps": 24,
    },
    "weights": {"denoiser": "sha256:aa"},
    "versions": {"server": "0.1.0"},
}
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), np.uint8)
PREVIEW = b"\xff\xd8 a preview \xff\xd9"


def make_mp4(comment: str | None) -> bytes:
    """A real MP4 of five frames, with a comment tag or without."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        if comment is not None:
            file.metadata["comment"] = comment
        stream = file.add_stream("libx264", rate=16, width=32, height=16, pix_fmt="yuv420p")
        for frame in FRAMES:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def read_inputs(request: Any) -> dict[str, Any]:
    """A request's tensors as Python values, decoded independently of the client."""
    formats = {"INT32": "<i", "INT64": "<q", "FP64": "<d", "BOOL": "<?"}
    found = {}
    for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True):
        assert list(tensor.shape) == [1, 1]
        if tensor.datatype == "BYTES":
            assert struct.unpack("<I", content[:4])[0] == len(content) - 4
            found[tensor.name] = content[4:].decode()
        else:
            (found[tensor.name],) = struct.unpack(formats[tensor.datatype], content)
    return found


def read_parameters(request: Any) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in request.parameters.items()}


def respond(
    request: Any,
    stage: str,
    step: int,
    num_steps: int,
    *,
    preview: bytes = b"",
    video: bytes = b"",
    frames: np.ndarray | None = None,
    report: dict[str, Any] | None = None,
) -> Any:
    """One response, laid out as Triton lays it out."""
    message = service_pb2.ModelStreamInferResponse()
    inner = message.infer_response
    inner.model_name, inner.id = request.model_name, request.id

    def add(name: str, datatype: str, shape: list[int], content: bytes) -> None:
        inner.outputs.add(name=name, datatype=datatype, shape=shape)
        inner.raw_output_contents.append(content)

    for name, value in (
        ("STAGE", stage.encode()),
        ("PREVIEW", preview),
        ("VIDEO", video),
        ("REPORT", json.dumps(report).encode() if report is not None else b""),
    ):
        add(name, "BYTES", [1, 1], struct.pack("<I", len(value)) + value)
    add("STEP", "INT32", [1, 1], struct.pack("<i", step))
    add("STEP_COUNT", "INT32", [1, 1], struct.pack("<i", num_steps))
    shape = [1, 0, 0, 0, 3] if frames is None else [1, *frames.shape]
    add("FRAMES", "UINT8", shape, b"" if frames is None else frames.tobytes())
    return message


def empty_final(request: Any) -> Any:
    message = service_pb2.ModelStreamInferResponse()
    message.infer_response.id = request.id
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers every stream by `answer`, and remembers what it was asked."""

    def __init__(self, video: bytes) -> None:
        self.video = video
        self.address = ""
        self.answer: Answer = self.succeed
        self.ready = True
        self.models = [("denoiser", "1", "READY", ""), ("text_to_video", "1", "READY", "")]
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.stream_ended = threading.Event()

    def succeed(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Every step, every chunk, the video, and the empty final response."""
        steps = read_inputs(request)["NUM_STEPS"]
        parameters = read_parameters(request)
        preview = PREVIEW if parameters["preview"] else b""
        for step in range(1, steps + 1):
            yield respond(request, "denoiser", step, steps, preview=preview)
        for chunk in (1, 2):
            yield respond(request, "vae_decoder", chunk, 2)
        report = REPORT | {"request_id": request.id}
        if parameters["container"] == "raw":
            yield respond(request, "done", 1, 1, frames=FRAMES, report=report)
        else:
            yield respond(request, "done", 1, 1, video=self.video, report=report)
        yield empty_final(request)

    def hang(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """One step, then silence until the caller goes away."""
        yield respond(request, "denoiser", 1, 4)
        self.stream_ended.wait(20)

    def ModelStreamInfer(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        self.stream_ended.clear()
        context.add_callback(self.stream_ended.set)
        for request in request_iterator:
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            yield from self.answer(request, context)

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self.ready)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=self.ready)

    def ServerMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.metadata.append(dict(context.invocation_metadata()))
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0")

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        index = service_pb2.RepositoryIndexResponse()
        for name, version, state, reason in self.models:
            index.models.add(name=name, version=version, state=state, reason=reason)
        return index


def start_server(fake: FakeTriton, credentials: grpc.ServerCredentials | None = None) -> grpc.Server:
    server = grpc.server(
        futures.ThreadPoolExecutor(8), options=[("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    fake.address = f"127.0.0.1:{port}"
    server.start()
    return server


if __name__ == "__main__":  # a server of its own process, for tests that kill it
    own = FakeTriton(b"")
    own.answer = own.hang
    running = start_server(own)
    print(own.address, flush=True)
    running.wait_for_termination()
