"""Makes a found tritonserver startable: its backend directory, its environment, and checks that say what is missing.

The server inside the `nvidia-pytriton` wheel keeps one stub for each version of Python beside its Python backend
instead of in it, and expects its libraries on the loader's path. The official container needs nothing of this.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from turbo_backend.errors import Misconfigured
from turbo_backend.server.binary import PYTHON_VERSION, STUB_NAME, TritonInstallation

#: The wheel's binaries are linked against this glibc (Ubuntu 22.04).
WHEEL_GLIBC = (2, 35)
LIBPYTHON = f"libpython{PYTHON_VERSION}.so.1.0"


def check_installation(installation: TritonInstallation) -> None:
    """Refuses what would fail later with a message that nobody understands.

    Raises:
        Misconfigured: naming what does not fit and what would.
    """
    if installation.stub_python != PYTHON_VERSION:
        raise Misconfigured(
            f"{installation.binary} runs Python models under Python {installation.stub_python}, and this is "
            f"Python {PYTHON_VERSION}: install turbodiffusion-server into Python {installation.stub_python}"
        )
    python3 = Path(sys.executable).parent / "python3"
    if not python3.exists() or python3.resolve() != Path(sys.executable).resolve():
        raise Misconfigured(
            f"the Python backend looks for `python3` on PATH, and {python3} is not {sys.executable}: "
            "use a virtual environment (`python3 -m venv`)"
        )
    if not installation.from_wheel:
        return
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise Misconfigured(
            f"numpy {numpy_version}: the Triton server of the nvidia-pytriton wheel reads string tensors wrongly under "
            "numpy 2; `pip install 'numpy<2'`, or use the official Triton container"
        )
    glibc = glibc_version()
    if glibc is not None and glibc < WHEEL_GLIBC:
        raise Misconfigured(
            f"glibc {glibc[0]}.{glibc[1]}: the Triton server of the nvidia-pytriton wheel needs "
            f"{WHEEL_GLIBC[0]}.{WHEEL_GLIBC[1]} or newer (Ubuntu 22.04, Debian 12); use the official Triton container"
        )


def assemble_backend_directory(installation: TritonInstallation, folder: Path) -> Path:
    """The `--backend-directory` to start with; built from links below `folder` where the installation has none.

    Raises:
        Misconfigured: the shared library of this Python is nowhere to be found.
    """
    if not installation.from_wheel:
        return installation.backends
    backends = folder / "backends"
    python = backends / "python"
    python.mkdir(parents=True)
    for entry in (installation.backends / "python").iterdir():
        if entry.name != "__pycache__":
            (python / entry.name).symlink_to(entry)
    (python / STUB_NAME).symlink_to(installation.stub)
    if LIBPYTHON.encode("ascii") in installation.stub.read_bytes():
        # A folder with this one link, because libpython's own folder may hold libraries that must not come first.
        library = folder / "lib"
        library.mkdir()
        (library / LIBPYTHON).symlink_to(find_libpython())
    return backends


def server_environment(installation: TritonInstallation, folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment to start the server in.

    The stub ignores PYTHONPATH: it runs as the `python3` that is first on PATH and sees that one's packages.
    """
    environment = dict(environ)
    libraries = [str(path) for path in installation.libraries]
    if (folder / "lib").is_dir():
        libraries.append(str(folder / "lib"))
    _prepend(environment, "LD_LIBRARY_PATH", libraries)
    _prepend(environment, "PATH", [str(Path(sys.executable).parent)])
    environment.pop("PYTHONHOME", None)
    # With an arena for each of Triton's threads, glibc keeps tens of MB that bursts of requests once needed.
    environment.setdefault("MALLOC_ARENA_MAX", "2")
    # A video passes through several buffers on its way out. glibc maps each anew, page by page, until it has learnt to
    # keep such memory: it may as well begin with the most that it can learn.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(64 << 20))
    return environment


def find_libpython() -> Path:
    """The shared library of the running Python.

    Raises:
        Misconfigured: it is not in any of the places where Pythons keep it.
    """
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    folders = (
        sysconfig.get_config_var("LIBDIR"),
        f"{sys.base_prefix}/lib",
        f"/usr/lib/{multiarch}",
        f"/lib/{multiarch}",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    )
    for folder in folders:
        if folder and (Path(folder) / LIBPYTHON).exists():
            return Path(folder) / LIBPYTHON
    raise Misconfigured(
        f"{LIBPYTHON} not found, which Triton's Python backend loads: install libpython{PYTHON_VERSION} "
        f"(Debian, Ubuntu: `apt-get install libpython{PYTHON_VERSION}`), or use a Python built with --enable-shared"
    )


def glibc_version() -> tuple[int, int] | None:
    """(major, minor) of the C library, or None where it is not glibc."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        major, minor = version.split(".")[:2]
    except (ValueError, OSError):
        return None
    return (int(major), int(minor)) if name == "glibc" else None


def _prepend(environment: dict[str, str], name: str, entries: list[str]) -> None:
    parts = [*entries, *(part for part in environment.get(name, "").split(os.pathsep) if part)]
    if parts:
        environment[name] = os.pathsep.join(dict.fromkeys(parts))
