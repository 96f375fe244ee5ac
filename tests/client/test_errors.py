"""The error tree and its status table."""

import pickle

import grpc
import pytest

import turbo_client as sdk
from turbo_client._errors import STATUS_ERRORS, RpcStatus, error_from_status

CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


@pytest.mark.parametrize("code", CODES)
def test_every_status_has_a_typed_error(code: grpc.StatusCode) -> None:
    error = error_from_status(RpcStatus(code, "what happened"), request_id="r1")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        assert type(error) is sdk.DeadlineExceededError
    else:
        assert type(error) is STATUS_ERRORS.get(code, sdk.InternalError)
        assert error.code is code
    assert str(error) == "what happened (request r1)"
    assert error.request_id == "r1"


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "[RESOURCE_EXHAUSTED] 81 frames need 30 GB", sdk.ResourceExhaustedError),
        (grpc.StatusCode.UNAVAILABLE, "in ensemble 'a', [RESOURCE_EXHAUSTED] 2 wait", sdk.ResourceExhaustedError),
        (grpc.StatusCode.UNAVAILABLE, "in ensemble 'a', [DEADLINE_EXCEEDED] too late", sdk.DeadlineExceededError),
        (grpc.StatusCode.UNKNOWN, "Request for unknown model: 'a' is not found", sdk.NotFoundError),
        (grpc.StatusCode.UNAVAILABLE, "Request for unknown model: 'a' has no available versions", sdk.UnavailableError),
        (grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header 'x'", sdk.PermissionDeniedError),
        (grpc.StatusCode.INTERNAL, "see [RESOURCE_EXHAUSTED]", sdk.InternalError),
    ],
)
def test_messages_of_triton_that_say_more_than_its_status(code: grpc.StatusCode, message: str, kind: type) -> None:
    assert type(error_from_status(RpcStatus(code, message))) is kind


def test_an_empty_message_still_says_something() -> None:
    assert str(error_from_status(RpcStatus(grpc.StatusCode.INTERNAL, ""))) == (
        "the server answered INTERNAL without a message"
    )


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (sdk.UnreachableError, ConnectionError),
        (sdk.DeadlineExceededError, TimeoutError),
        (sdk.ManifestError, ValueError),
        (sdk.MissingExtraError, ImportError),
    ],
)
def test_errors_are_what_python_calls_them(kind: type[sdk.TurboDiffusionError], builtin: type) -> None:
    error = kind("no", request_id="r1")
    assert isinstance(error, builtin)
    assert isinstance(error, sdk.TurboDiffusionError)
    assert str(error) == "no (request r1)"


@pytest.mark.parametrize("name", [name for name in sdk.__all__ if name.endswith("Error")])
def test_errors_survive_pickling(name: str) -> None:
    kind = getattr(sdk, name)
    error = kind("no", request_id="r1")
    if isinstance(error, sdk.APIError):
        error.code = grpc.StatusCode.INTERNAL
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__
