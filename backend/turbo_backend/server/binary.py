"""Finds a tritonserver and what belongs to it: its Python backend, that backend's stub, its libraries."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from turbo_backend.errors import Misconfigured

#: Where the official container keeps the server.
CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
#: Names the server when no option does.
BINARY_VARIABLE = "TRITONSERVER"
STUB_NAME = "triton_python_backend_stub"
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonInstallation:
    """One tritonserver with its Python backend.

    Attributes:
        binary: the executable.
        origin: how it was found, in words.
        backends: folder that holds `python/`, the Python backend.
        stub: the program that runs one Python model, built for one version of Python.
        stub_python: that version, such as `3.12`.
        libraries: folders that the server's own libraries lie in.
        from_wheel: whether this is the server inside the `nvidia-pytriton` wheel.
    """

    binary: Path
    origin: str
    backends: Path
    stub: Path
    stub_python: str
    libraries: tuple[Path, ...]
    from_wheel: bool


def find_triton(explicit: Path | None = None, *, environ: Mapping[str, str] | None = None) -> TritonInstallation:
    """The server to start: named explicitly, by `TRITONSERVER`, the container's, on PATH, or the wheel's.

    Raises:
        Misconfigured: none is found, or the one named is not usable.
    """
    environ = os.environ if environ is None else environ
    if explicit is not None:
        return inspect_installation(explicit, "--tritonserver")
    if environ.get(BINARY_VARIABLE):
        return inspect_installation(Path(environ[BINARY_VARIABLE]), f"environment variable {BINARY_VARIABLE}")
    if CONTAINER_BINARY.exists():
        return inspect_installation(CONTAINER_BINARY, "Triton container")
    on_path = shutil.which("tritonserver", path=environ.get("PATH"))
    if on_path is not None:
        return inspect_installation(Path(on_path), "PATH")
    in_wheel = _find_wheel_binary()
    if in_wheel is not None:
        return inspect_installation(in_wheel, "nvidia-pytriton wheel")
    raise Misconfigured(
        "no tritonserver found: run inside the container nvcr.io/nvidia/tritonserver, or "
        "`pip install 'turbodiffusion-server[server]'`, whose nvidia-pytriton wheel holds one, "
        f"or name one with --tritonserver or {BINARY_VARIABLE}"
    )


def inspect_installation(binary: Path, origin: str) -> TritonInstallation:
    """What belongs to the server at `binary`.

    Raises:
        Misconfigured: it is not an executable, or has no Python backend for a Python that can be told.
    """
    if not binary.is_file() or not os.access(binary, os.X_OK):
        raise Misconfigured(f"{origin}: {binary} is not an executable file")
    binary = binary.resolve()
    root = binary.parent.parent
    backends = root / "backends"
    if not (backends / "python" / "libtriton_python.so").exists():
        raise Misconfigured(f"{binary} has no Python backend: {backends / 'python' / 'libtriton_python.so'} is absent")
    stubs = root / "python_backend_stubs"
    if stubs.is_dir():
        return _inspect_wheel(binary, origin, backends, stubs)
    stub = backends / "python" / STUB_NAME
    if not stub.exists():
        raise Misconfigured(f"{binary} has no Python backend stub: {stub} is absent")
    stub_python = _python_of_stub(stub)
    if stub_python is None:
        raise Misconfigured(f"cannot tell which Python {stub} is built for: it names no libpython")
    library = root / "lib"
    return TritonInstallation(
        binary=binary,
        origin=origin,
        backends=backends,
        stub=stub,
        stub_python=stub_python,
        libraries=(library,) if library.is_dir() else (),
        from_wheel=False,
    )


def _inspect_wheel(binary: Path, origin: str, backends: Path, stubs: Path) -> TritonInstallation:
    stub = stubs / PYTHON_VERSION / STUB_NAME
    if not stub.exists():
        versions = sorted((path.name for path in stubs.iterdir()), key=lambda name: [int(n) for n in name.split(".")])
        raise Misconfigured(
            f"the nvidia-pytriton wheel has no Python backend stub for Python {PYTHON_VERSION}: "
            f"use one of Python {', '.join(versions)}"
        )
    libraries = binary.parents[3] / "nvidia_pytriton.libs"
    if not libraries.is_dir():
        raise Misconfigured(f"{binary} lacks its libraries: {libraries} is absent; reinstall nvidia-pytriton")
    return TritonInstallation(
        binary=binary,
        origin=origin,
        backends=backends,
        stub=stub,
        stub_python=PYTHON_VERSION,
        libraries=(libraries,),
        from_wheel=True,
    )


def _find_wheel_binary() -> Path | None:
    """The wheel's server, found without importing `pytriton` (which would start threads and change the environment)."""
    spec = importlib.util.find_spec("pytriton")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        binary = Path(folder) / "tritonserver" / "bin" / "tritonserver"
        if binary.exists():
            return binary
    return None


def _python_of_stub(stub: Path) -> str | None:
    """The Python version whose shared library the stub asks the loader for."""
    match = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    return match.group(1).decode("ascii") if match else None
