"""gRPC SDK and command line of the TurboDiffusion server.

from turbo_client import Client

with Client("127.0.0.1:8001") as client:
    client.generate("a red fox in the snow").save("fox.mp4")
"""

from turbo_client._async_client import AsyncClient, AsyncVideoStream
from turbo_client._async_client_jobs import AsyncJobs
from turbo_client._client import Client, VideoStream
from turbo_client._client_jobs import Jobs
from turbo_client._errors import (
    AlreadyExistsError,
    APIError,
    CancelledError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    MalformedResponseError,
    ManifestError,
    MissingExtraError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    TurboDiffusionError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    UnreachableError,
)
from turbo_client._generation import Progress
from turbo_client._jobs import JobStatus
from turbo_client._manifest import Manifest, read_manifest
from turbo_client._requests import GenerationRequest
from turbo_client._settings import TLS, RetryPolicy, Timeout
from turbo_client._status import ModelStatus, ServerStatus
from turbo_client._video import Video

__version__ = "0.1.0"

__all__ = [
    "TLS",
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
