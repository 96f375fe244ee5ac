"""The Triton gRPC protocol's generated messages and stub, under short names.

They come from tritonclient, whose wrapper around them stays unused: it allows one stream a client and hides the
call object that cancelling needs. The generated modules carry no types, hence `Any` here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from tritonclient.grpc import service_pb2, service_pb2_grpc

_messages: Any = service_pb2
_services: Any = service_pb2_grpc

InferRequest: Any = _messages.ModelInferRequest
ServerLiveRequest: Any = _messages.ServerLiveRequest
ServerReadyRequest: Any = _messages.ServerReadyRequest
ServerMetadataRequest: Any = _messages.ServerMetadataRequest
ModelReadyRequest: Any = _messages.ModelReadyRequest
RepositoryIndexRequest: Any = _messages.RepositoryIndexRequest
Stub: Any = _services.GRPCInferenceServiceStub
