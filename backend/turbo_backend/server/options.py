"""The options that tritonserver is started with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from turbo_backend.errors import Misconfigured

#: Shared memory of each model process, in bytes, really taken from /dev/shm: at first, and whenever more is needed.
#: Latents of 720p x 81 frames are 19 MB in fp32 and the text embeddings of a prompt at most 8 MB, so one step of
#: growth holds any tensor but raw frames.
SHM_DEFAULT_BYTES = 8 << 20
SHM_GROWTH_BYTES = 32 << 20

#: Options that this class sets, and what to use instead.
_OWN_OPTIONS = {
    "model-repository": "--model-repository of turbodiffusion-server",
    "model-store": "--model-repository of turbodiffusion-server",
    "backend-directory": "the one beside --tritonserver",
    "http-address": "--host",
    "grpc-address": "--host",
    "metrics-address": "--host",
    "http-port": "--http-port of turbodiffusion-server, before `--`",
    "grpc-port": "--grpc-port of turbodiffusion-server, before `--`",
    "metrics-port": "--metrics-port of turbodiffusion-server, before `--`",
    "allow-http": "nothing: readiness is asked for over HTTP",
    "exit-timeout-secs": "--exit-timeout",
    "log-verbose": "--log-verbose of turbodiffusion-server, before `--`",
}


def check_options(options: Sequence[str]) -> None:
    """Refuses options that are not the caller's to set.

    Raises:
        Misconfigured: naming what to use instead.
    """
    for option in options:
        name = option.removeprefix("--").partition("=")[0]
        if option.startswith("--") and name in _OWN_OPTIONS:
            raise Misconfigured(f"--{name} is set by turbodiffusion-server; use {_OWN_OPTIONS[name]}")


def names_option(options: Sequence[str], name: str) -> bool:
    """Whether `options` set that one."""
    return any(option == f"--{name}" or option.startswith(f"--{name}=") for option in options)


def server_options(
    repository: Path,
    backends: Path,
    *,
    host: str,
    ports: tuple[int, ...],
    exit_timeout: float,
    log_verbose: int,
    server_id: str,
    shm_prefix: str,
    given: Sequence[str],
) -> list[str]:
    """Everything behind the name of the program.

    Args:
        ports: HTTP, gRPC, metrics.
        server_id: what the server calls itself, unless `given` says otherwise.
        shm_prefix: what the names of its files in /dev/shm begin with.
        given: the caller's own options, which come last.
    """
    http_port, grpc_port, metrics_port = ports
    options = [
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--http-address={host}",
        f"--grpc-address={host}",
        f"--metrics-address={host}",
        f"--http-port={http_port}",
        f"--grpc-port={grpc_port}",
        f"--metrics-port={metrics_port}",
        f"--exit-timeout-secs={round(exit_timeout)}",
        # Completing a configuration starts each Python model once more, only to ask it; ours are complete.
        "--disable-auto-complete-config",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--backend-config=python,shm-default-byte-size={SHM_DEFAULT_BYTES}",
        f"--backend-config=python,shm-growth-byte-size={SHM_GROWTH_BYTES}",
    ]
    if not names_option(given, "id"):
        options.append(f"--id={server_id}")
    if log_verbose:
        options.append(f"--log-verbose={log_verbose}")
    return [*options, *given]
