"""A generation request as Python values, and as bytes on the wire."""

from __future__ import annotations

import math
import operator
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from turbo_client._protocol import InferRequest

#: Wire type of each input tensor; its name is the field's in upper case. A field that is None is not sent.
INPUTS: Mapping[str, str] = MappingProxyType(
    {
        "prompt": "BYTES",
        "seed": "INT64",
        "num_steps": "INT32",
        "num_frames": "INT32",
        "resolution": "BYTES",
        "aspect_ratio": "BYTES",
        "sigma_max": "FP64",
        "attention_type": "BYTES",
        "sla_topk": "FP64",
        "ode": "BOOL",
    }
)

#: Further inputs of a request that starts from an image.
IMAGE_INPUTS: Mapping[str, str] = MappingProxyType(
    {"image": "BYTES", "boundary": "FP64", "adaptive_resolution": "BOOL", "fit": "BYTES"}
)

#: Request parameters that concern delivery and scheduling, and the `InferParameter` field each travels in.
PARAMETERS: Mapping[str, str] = MappingProxyType(
    {
        "container": "string_param",
        "fps": "int64_param",
        "preview": "bool_param",
        "priority_level": "int64_param",
        "deadline_ms": "int64_param",
    }
)

#: Wire type of every field, tensors and the rest alike, by which its value is checked.
_TYPES: Mapping[str, str] = {
    **INPUTS,
    **IMAGE_INPUTS,
    "image": "FILE",
    "container": "BYTES",
    "fps": "INT64",
    "preview": "BOOL",
    "priority_level": "INT64",
    "deadline_ms": "INT64",
    "model": "BYTES",
    "request_id": "BYTES",
    "timeout": "FP64",
}


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate and how to deliver it.

    Only what could not be sent at all is refused here; ranges are the server's to check, so that they are written
    down once.

    Attributes:
        prompt: what the video shows, in English or Chinese.
        seed: 0 draws one; the seed used is in the report.
        num_steps: denoising steps, 1 to 4.
        num_frames: frames, 4k + 1; None for the model's default.
        resolution: such as "480p"; None for the model's default.
        aspect_ratio: "16:9", "9:16", "4:3", "3:4" or "1:1".
        sigma_max: highest noise level; None for the model's default.
        attention_type: "sagesla", "sla" or "original".
        sla_topk: share of key blocks that sparse attention keeps, over 0 to 1.
        ode: deterministic sampling instead of fresh noise at each step.
        image: image that the video starts from, as bytes of a JPEG, PNG or WebP file or as the path of one, which
            is read here; None for a video from text alone.
        boundary: noise time, 0.5 to 1, below which the low-noise expert takes over; only with an image.
        adaptive_resolution: follow the image's aspect ratio, keeping the resolution's area; only with an image.
        fit: how the image is brought to the video's size, "stretch" or "crop"; only with an image.
        container: "mp4", or "raw" for uint8 frames.
        fps: frames a second of the MP4.
        preview: whether each step's progress carries a small JPEG.
        priority_level: 0, the most urgent, to 9; None for the server's default, 5.
        deadline_ms: milliseconds in which the server must be done denoising; it refuses at once what it cannot finish
            by then. None for no such limit.
        model: ensemble to call; None for the client's, which is "text_to_video", or "image_to_video" with an image.
        request_id: name of this request in logs and errors; None draws one.
        timeout: seconds for the whole generation; None for the client's limit, `math.inf` for none.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value that its wire type cannot hold, or one that belongs to an image without any.
        OSError: the image file cannot be read.
    """

    prompt: str
    _: KW_ONLY
    seed: int = 0
    num_steps: int = 4
    num_frames: int | None = None
    resolution: str | None = None
    aspect_ratio: str = "16:9"
    sigma_max: float | None = None
    attention_type: str = "sagesla"
    sla_topk: float = 0.1
    ode: bool = False
    image: bytes | str | os.PathLike[str] | None = field(default=None, repr=False)
    boundary: float = 0.9
    adaptive_resolution: bool = False
    fit: str = "stretch"
    container: str = "mp4"
    fps: int = 16
    preview: bool = False
    priority_level: int | None = None
    deadline_ms: int | None = None
    model: str | None = None
    request_id: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None and item.default is None:
                continue
            # numpy scalars become Python's, so that equal requests compare and encode alike.
            object.__setattr__(self, item.name, _CHECKS[_TYPES[item.name]](item.name, value))
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout = {self.timeout!r}: must be over 0 seconds")
        if self.image is None:
            for item in fields(self):
                value = getattr(self, item.name)
                if item.name in IMAGE_INPUTS and value != item.default:
                    raise ValueError(f"{item.name} = {value!r}: belongs to an image, and there is none")

    @property
    def ensemble(self) -> str:
        """The ensemble that this kind of request goes to."""
        return "text_to_video" if self.image is None else "image_to_video"

    def arguments(self) -> dict[str, Any]:
        """The request as arguments of a client's `generate` or `stream`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def encode(self, *, model: str, request_id: str) -> Any:
        """The request as a `ModelInferRequest`; every tensor is [1, 1], a batch of one."""
        message = InferRequest(model_name=model, id=request_id)
        inputs = INPUTS if self.image is None else {**INPUTS, **IMAGE_INPUTS}
        for name, datatype in inputs.items():
            value = getattr(self, name)
            if value is not None:
                add_input(message, name.upper(), datatype, value)
        for name, kind in PARAMETERS.items():
            value = getattr(self, name)
            if value is not None:
                setattr(message.parameters[name], kind, value)
        return message

    def encode_stream(self, *, model: str, request_id: str) -> Any:
        """The request as the one message of a stream."""
        message = self.encode(model=model, request_id=request_id)
        # The ensemble's end is then always said, even when its last response carried the video already.
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        return message

    def remark(self) -> str | None:
        """What a caller may want to know before an image request runs: that the low-noise expert will not.

        The sampler's last step stands at the angle 1.5, 1.4 or 1.0 (of 2, 3 or 4 steps; noise time sin / (sin + cos)),
        or at sigma_max / (1 + sigma_max) of a single step. None where all is well, or for the server to judge.
        """
        if self.image is None or not 1 <= self.num_steps <= 4:
            return None
        if self.num_steps == 1:
            sigma = 200.0 if self.sigma_max is None else self.sigma_max
            last = sigma / (1 + sigma) if sigma > 0 else 0.0
        else:
            angle = (1.5, 1.4, 1.0)[self.num_steps - 2]
            last = math.sin(angle) / (math.sin(angle) + math.cos(angle))
        if last < self.boundary:
            return None
        steps = f"{self.num_steps} step{'s' if self.num_steps > 1 else ''}"
        return (
            f"with {steps} the low-noise expert never runs: the last step is at {last:.3f}, "
            f"boundary {self.boundary:g}; more steps or a higher boundary reach it"
        )


def add_input(message: Any, name: str, datatype: str, value: Any) -> None:
    """Adds one value to a `ModelInferRequest`, as a tensor [1, 1]."""
    message.inputs.add(name=name, datatype=datatype, shape=[1, 1])
    message.raw_input_contents.append(_ENCODERS[datatype](value))


def _integer(bits: int) -> Callable[[str, Any], int]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool):
            raise TypeError(f"{name} = {value!r}: must be an integer")
        try:
            number = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} = {value!r}: must be an integer") from None
        if not low <= number <= high:
            raise ValueError(f"{name} = {number}: does not fit into {bits} bits")
        return number

    return check


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} = {value!r}: must be a number")
    return float(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        raise TypeError(f"{name} = {value!r}: must be True or False")
    return bool(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} = {value!r}: must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: holds characters that are not valid Unicode (lone surrogates)") from None
    return value


def _file(name: str, value: Any) -> bytes:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, (str, os.PathLike)):
        return Path(value).read_bytes()
    raise TypeError(f"{name}: must be bytes or a path, not {type(value).__name__}")


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "BYTES": _text,
    "FILE": _file,
    "INT32": _integer(32),
    "INT64": _integer(64),
    "FP64": _real,
    "BOOL": _boolean,
}


def _encode_bytes(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<I", len(content)) + content


_ENCODERS: Mapping[str, Callable[[Any], bytes]] = {
    "BYTES": _encode_bytes,
    "INT32": struct.Struct("<i").pack,
    "INT64": struct.Struct("<q").pack,
    "FP64": struct.Struct("<d").pack,
    "BOOL": struct.Struct("<?").pack,
}
