"""The package's surface: its names, its signatures, and what importing it costs."""

import inspect
import subprocess
import sys

import pytest

import turbo_client
from turbo_client import AsyncClient, AsyncJobs, AsyncVideoStream, Client, GenerationRequest, Jobs, VideoStream

PUBLIC_NAMES = [
    "APIError",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncJobs",
    "AsyncVideoStream",
    "CancelledError",
    "Client",
    "DeadlineExceededError",
    "GenerationRequest",
    "InternalError",
    "InvalidArgumentError",
    "JobStatus",
    "Jobs",
    "MalformedResponseError",
    "Manifest",
    "ManifestError",
    "MissingExtraError",
    "ModelStatus",
    "NotFoundError",
    "PermissionDeniedError",
    "Progress",
    "ResourceExhaustedError",
    "RetryPolicy",
    "ServerStatus",
    "TLS",
    "Timeout",
    "TurboDiffusionError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "UnreachableError",
    "Video",
    "VideoStream",
    "read_manifest",
]


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_names() -> None:
    assert sorted(turbo_client.__all__) == PUBLIC_NAMES
    assert all(hasattr(turbo_client, name) for name in PUBLIC_NAMES)


@pytest.mark.parametrize(
    ("blocking", "asynchronous"), [(Client, AsyncClient), (Jobs, AsyncJobs), (VideoStream, AsyncVideoStream)]
)
def test_sync_and_async_have_the_same_methods_and_parameters(blocking: type, asynchronous: type) -> None:
    assert public(blocking) == public(asynchronous)
    for name in public(blocking) | {"__init__"}:
        one, other = getattr(blocking, name), getattr(asynchronous, name)
        if callable(one):
            ours, theirs = inspect.signature(one), inspect.signature(other)
            if name == "__init__" and blocking is not Client:
                assert list(ours.parameters) == list(theirs.parameters)
            else:
                assert list(ours.parameters.values()) == list(theirs.parameters.values()), name


@pytest.mark.parametrize(
    "method",
    [Client.generate, Client.stream, Jobs.submit, AsyncClient.generate, AsyncClient.stream, AsyncJobs.submit],
)
def test_methods_take_the_parameters_of_a_request(method: object) -> None:
    of_method = list(inspect.signature(method).parameters.values())[1:]
    assert of_method == list(inspect.signature(GenerationRequest).parameters.values())


def test_import_is_light() -> None:
    code = (
        "import sys, turbo_client, turbo_client.cli\n"
        "heavy = {'torch', 'triton', 'transformers', 'av', 'turbo_backend', 'turbo_kernels'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
