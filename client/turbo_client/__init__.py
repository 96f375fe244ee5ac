"""gRPC SDK and command line of the TurboDiffusion server."""

__version__ = "0.1.0"
