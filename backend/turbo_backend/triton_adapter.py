"""What the `model.py` adapters share: Triton requests to Python values, our errors to Triton's.

`triton_python_backend_utils` exists only inside a Triton stub, so it is imported here and nowhere else in the package;
its classes are there once the model is loaded, not yet while this module is imported.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from turbo_backend.errors import InvalidArgument, TurboError, error_to_report
from turbo_backend.parameters import IMAGE_FIELDS, TEXT_FIELDS
from turbo_backend.settings import PREFIX, Settings
from turbo_backend.start_failures import tell_failure

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

#: `last`: the responses to the last call of a model in this thread. Triton's own threads that deliver responses and
#: forget calls may be the last to let go of them, and in 2.51 they then free arrays without holding the interpreter's
#: lock, which corrupts memory. Once the next call has ended, they are long done.
_calls = threading.local()


def tells_failure(initialize: Callable[[Any, Mapping[str, str]], None]) -> Callable[[Any, Mapping[str, str]], None]:
    """A `TritonPythonModel.initialize` that also tells the launcher why it fails."""

    @functools.wraps(initialize)
    def call(model: Any, args: Mapping[str, str]) -> None:
        try:
            initialize(model, args)
        except Exception as error:
            tell_failure(args["model_name"], error)
            raise

    return call


def read_settings(args: Mapping[str, str]) -> Settings:
    """The environment's settings, except for what the model's own `parameters { key: "TURBO_..." }` say.

    Args:
        args: of `TritonPythonModel.initialize`.
    """
    parameters = json.loads(args["model_config"]).get("parameters", {})
    own = {key: value["string_value"] for key, value in parameters.items() if key.startswith(PREFIX)}
    return Settings.from_environment({**os.environ, **own})


def read_scalar(request: Any, name: str) -> object | None:
    """The one value of an optional `[1, 1]` input as a Python scalar, or None where it is absent.

    Raises:
        InvalidArgument: more than one value, or text that is not UTF-8.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy()
    if values.size != 1:
        raise InvalidArgument(name, list(values.shape), "one value, of shape [1, 1]")
    value = values.reshape(-1)[0]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidArgument(name, value, "valid UTF-8") from None
    scalar: object = value.item() if isinstance(value, np.generic) else value
    return scalar


def read_values(request: Any) -> dict[str, object]:
    """The generation's optional inputs (`parameters.TEXT_FIELDS`, `IMAGE_FIELDS`) that are there, not yet checked."""
    values = {name: read_scalar(request, name) for name in (*TEXT_FIELDS, *IMAGE_FIELDS)}
    return {name: value for name, value in values.items() if value is not None}


def read_bytes(request: Any, name: str) -> bytes:
    """The one element of a required BYTES input."""
    values = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    if values.size != 1:
        raise InvalidArgument(name, list(values.shape), "one value, of shape [1, 1]")
    return bytes(values.reshape(-1)[0])


def read_optional_bytes(request: Any, name: str) -> bytes | None:
    """The one element of an optional BYTES input, or None where it is absent."""
    return None if pb_utils.get_input_tensor_by_name(request, name) is None else read_bytes(request, name)


def read_tensor(request: Any, name: str) -> torch.Tensor:
    """A required input without its batch dimension, sharing the request's memory.

    Raises:
        InvalidArgument: a batch of more than one in one request.
    """
    from torch.utils.dlpack import from_dlpack  # the jobs model, which has no tensors, goes without torch

    tensor: torch.Tensor = from_dlpack(pb_utils.get_input_tensor_by_name(request, name).to_dlpack())
    if tensor.shape[0] != 1:
        raise InvalidArgument(name, list(tensor.shape), "a batch of one: send a request for each video")
    return tensor[0]


def read_optional_tensor(request: Any, name: str) -> torch.Tensor | None:
    """An optional input without its batch dimension, or None where it is absent; errors as in `read_tensor`."""
    return None if pb_utils.get_input_tensor_by_name(request, name) is None else read_tensor(request, name)


def read_json(request: Any, name: str) -> Mapping[str, object] | None:
    """The report that another stage wrote, or None where it is absent.

    Raises:
        InvalidArgument: not one JSON object.
    """
    text = read_scalar(request, name)
    if text is None:
        return None
    try:
        report = json.loads(str(text))
    except ValueError:
        report = None
    if not isinstance(report, dict):
        raise InvalidArgument(name, text, "a JSON object, as the stage before writes it")
    return report


def read_parameters(request: Any) -> Mapping[str, object]:
    """The request's own parameters, which only concern delivery."""
    text = request.parameters()
    return json.loads(text) if text else {}


def write_tensor(name: str, tensor: torch.Tensor) -> Any:
    """An output of batch size 1 from a tensor on the CPU."""
    return write_array(name, tensor.numpy())


def write_array(name: str, array: NDArray[Any]) -> Any:
    """An output of batch size 1 from numpy."""
    return pb_utils.Tensor(name, array[None])


def write_integer(name: str, value: int) -> Any:
    return pb_utils.Tensor(name, np.array([[value]], np.int32))


def write_bytes(name: str, value: bytes | str) -> Any:
    encoded = value.encode("utf-8") if isinstance(value, str) else value
    return pb_utils.Tensor(name, np.array([[encoded]], np.object_))


def write_texts(name: str, values: Sequence[bytes | str]) -> Any:
    """An output `[1, N]` of BYTES."""
    encoded = [value.encode("utf-8") if isinstance(value, str) else value for value in values]
    return pb_utils.Tensor(name, np.array([encoded], np.object_))


def write_numbers(name: str, values: Sequence[float], dtype: str) -> Any:
    """An output `[1, N]` of numbers."""
    return pb_utils.Tensor(name, np.array([values], dtype))


def write_scalar(name: str, value: object) -> Any:
    """A `[1, 1]` tensor of the type in which the wire has such a value: SEED alone takes 64 bits."""
    if isinstance(value, str):
        return write_bytes(name, value)
    if isinstance(value, bool):
        return pb_utils.Tensor(name, np.array([[value]], np.bool_))
    if isinstance(value, int):
        return pb_utils.Tensor(name, np.array([[value]], np.int64 if name == "SEED" else np.int32))
    return pb_utils.Tensor(name, np.array([[value]], np.float64))


def write_json(name: str, value: Mapping[str, object]) -> Any:
    return write_bytes(name, json.dumps(value, ensure_ascii=False))


def explain(error: TurboError, request_id: str) -> str:
    """What a caller is told of an error; what nobody foresaw is logged and names the request."""
    if error.code != "INTERNAL":
        return str(error)
    _log.error("request %s: %s", request_id or "without id", error)
    return f"{error} (request {request_id or 'without id'})"


def error_response(error: TurboError, request_id: str) -> Any:
    """The response that ends a request with `error`."""
    status = getattr(pb_utils.TritonError, error.code)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(explain(error, request_id), status))


def make_failure(request: Any, sender: Any, as_output: Callable[..., Any]) -> Callable[[TurboError], None]:
    """What ends a request of an ensemble's last model with an error.

    Args:
        as_output: makes the response with `report=` that says so to a job; jobs cannot take an error as such, see
            `call_model`.
    """
    request_id, for_job = request.request_id(), is_durable(request)

    def fail(error: TurboError) -> None:
        if for_job:
            report = error_to_report(error, explain(error, request_id))
            answer = as_output(report=json.dumps(report, ensure_ascii=False))
        else:
            answer = error_response(error, request_id)
        send(sender, answer, final=True)

    return fail


def is_durable(request: Any) -> bool:
    """Whether the request is that of a job."""
    return read_parameters(request).get("durable") is True


def send(sender: Any, answer: Any, *, final: bool) -> None:
    """Sends one of a decoupled request's responses, or None to end it without one."""
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
    if answer is None:
        sender.send(flags=flags)
    else:
        sender.send(answer, flags=flags)


def response(*tensors: Any) -> Any:
    return pb_utils.InferenceResponse(list(tensors))


def call_model(
    model: str, inputs: Sequence[Any], outputs: Sequence[str], request_id: str, parameters: Mapping[str, object]
) -> Iterator[dict[str, Any] | str]:
    """Calls a decoupled model of this server, from any thread: one dict of `[1, 1]` outputs for each response.

    A stub of Triton 2.51 waits for ever once an error follows another response: what is called here sends the errors of
    such requests as outputs. It also knows no error's status.

    Yields:
        Each output's one value by name, bytes or a Python scalar; the message where the model answered with an error.
    """
    responses = None
    request = pb_utils.InferenceRequest(
        model_name=model,
        inputs=list(inputs),
        requested_output_names=list(outputs),
        request_id=request_id,
        parameters=dict(parameters),
    )
    try:
        responses = request.exec(decoupled=True)
        for answer in responses:
            if answer.has_error():
                yield str(answer.error().message())
            elif answer.output_tensors():  # the final response of a stream may be empty
                values = {tensor.name(): tensor.as_numpy().reshape(-1)[0] for tensor in answer.output_tensors()}
                yield {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    except pb_utils.TritonModelException as error:  # this model is not served yet
        yield str(error)
    finally:
        _calls.last = responses


class Gauge:
    """A Prometheus gauge of this model with one label, at the server's metrics address.

    Args:
        name: as Prometheus shows it.
        description: its help text.
        label: name of the label; each value has its own number. Empty for a single number.
    """

    def __init__(self, name: str, description: str, label: str = "") -> None:
        self._family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.GAUGE)
        self._label = label
        self._metrics: dict[str, Any] = {}

    def set(self, number: float, value: str = "") -> None:
        """Sets the number of that label value."""
        if value not in self._metrics:
            self._metrics[value] = self._family.Metric(labels={self._label: value} if self._label else {})
        self._metrics[value].set(number)


class Counter:
    """A Prometheus counter of this model with one label, at the server's metrics address.

    Args:
        name: as Prometheus shows it.
        description: its help text.
        label: name of the label; each value counts for itself.
    """

    def __init__(self, name: str, description: str, label: str) -> None:
        self._family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
        self._label = label
        self._metrics: dict[str, Any] = {}

    def increment(self, value: str, amount: float = 1) -> None:
        """Adds to the count of that label value."""
        if value not in self._metrics:
            self._metrics[value] = self._family.Metric(labels={self._label: value})
        self._metrics[value].increment(amount)
