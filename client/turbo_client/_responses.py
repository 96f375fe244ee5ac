"""Responses of the ensemble, read from the wire and checked: what comes off a socket may be malformed."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbo_client._errors import MalformedResponseError

#: Wire type of each output tensor.
OUTPUTS: Mapping[str, str] = MappingProxyType(
    {
        "STAGE": "BYTES",
        "STEP": "INT32",
        "STEP_COUNT": "INT32",
        "PREVIEW": "BYTES",
        "VIDEO": "BYTES",
        "FRAMES": "UINT8",
        "REPORT": "BYTES",
    }
)
_REQUIRED = ("STAGE", "STEP", "STEP_COUNT")


@dataclass(frozen=True, slots=True)
class StageResponse:
    """One response of the stream.

    Attributes:
        stage: "text_encoder", "denoiser", "vae_decoder" or "done".
        step, num_steps: position within the stage (latent chunks in the decoder).
        preview: JPEG bytes, or empty.
        video: MP4 bytes, empty before the last response.
        frames: uint8 [F, H, W, 3], None when there are none.
        report: the REPORT object, None before the last response.
    """

    stage: str
    step: int
    num_steps: int
    preview: bytes
    video: bytes
    frames: NDArray[np.uint8] | None
    report: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Tensor:
    datatype: str
    shape: tuple[int, ...]
    content: bytes


def decode_response(message: Any, *, request_id: str) -> StageResponse | None:
    """Reads a `ModelInferResponse`; None for one without outputs, as the empty final response is.

    Raises:
        MalformedResponseError: tensors are missing, of another type, or of a size that contradicts their shape.
    """
    if not message.outputs:
        return None
    try:
        tensors = read_tensors(message, OUTPUTS)
        missing = [name for name in _REQUIRED if name not in tensors]
        if missing:
            raise Malformed(f"has no {', '.join(missing)}")
        return StageResponse(
            stage=read_text("STAGE", read_bytes(tensors, "STAGE")),
            step=_int32(tensors, "STEP"),
            num_steps=_int32(tensors, "STEP_COUNT"),
            preview=read_bytes(tensors, "PREVIEW"),
            video=read_bytes(tensors, "VIDEO"),
            frames=_frames(tensors),
            report=read_report(read_bytes(tensors, "REPORT")),
        )
    except Malformed as error:
        raise MalformedResponseError(
            f"a response of model {message.model_name!r} {error}", request_id=request_id
        ) from None


class Malformed(Exception):
    """What is wrong with a response, without the request that it belongs to."""


def read_tensors(message: Any, types: Mapping[str, str]) -> dict[str, Tensor]:
    if len(message.outputs) != len(message.raw_output_contents):
        raise Malformed(f"has {len(message.outputs)} outputs but {len(message.raw_output_contents)} raw contents")
    tensors = {}
    for output, content in zip(message.outputs, message.raw_output_contents, strict=True):
        expected = types.get(output.name)
        if expected is None:
            continue  # a newer server may say more
        if output.datatype != expected:
            raise Malformed(f"has {output.name} of type {output.datatype}, not {expected}")
        tensors[output.name] = Tensor(output.datatype, tuple(output.shape), content)
    return tensors


def read_bytes(tensors: dict[str, Tensor], name: str) -> bytes:
    """The only element of a BYTES tensor; empty when the tensor is absent or has zero size."""
    tensor = tensors.get(name)
    if tensor is None or 0 in tensor.shape:
        return b""
    if math.prod(tensor.shape) != 1 or len(tensor.content) < 4:
        raise Malformed(f"has {name} of shape {list(tensor.shape)} in {len(tensor.content)} bytes, not one element")
    (length,) = struct.unpack_from("<I", tensor.content)
    if length != len(tensor.content) - 4:
        raise Malformed(f"has {name} cut short: {len(tensor.content) - 4} of {length} bytes")
    return tensor.content[4:]


def _int32(tensors: dict[str, Tensor], name: str) -> int:
    tensor = tensors[name]
    if math.prod(tensor.shape) != 1 or len(tensor.content) != 4:
        raise Malformed(f"has {name} of shape {list(tensor.shape)}, not one element")
    return int(struct.unpack("<i", tensor.content)[0])


def _frames(tensors: dict[str, Tensor]) -> NDArray[np.uint8] | None:
    tensor = tensors.get("FRAMES")
    if tensor is None or 0 in tensor.shape:
        return None
    if len(tensor.shape) != 5 or tensor.shape[0] != 1 or tensor.shape[4] != 3 or min(tensor.shape) < 0:
        raise Malformed(f"has FRAMES of shape {list(tensor.shape)}, not [1, F, H, W, 3]")
    if math.prod(tensor.shape) != len(tensor.content):
        raise Malformed(f"has FRAMES of shape {list(tensor.shape)} in {len(tensor.content)} bytes")
    return np.frombuffer(tensor.content, np.uint8).reshape(tensor.shape[1:])


def read_text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Malformed(f"has {name} that is not UTF-8") from None


def read_report(content: bytes) -> dict[str, Any] | None:
    if not content:
        return None
    try:
        report = json.loads(content)
    except (ValueError, RecursionError):
        raise Malformed("has a REPORT that is not JSON") from None
    if not isinstance(report, dict):
        raise Malformed("has a REPORT that is not a JSON object")
    return report
