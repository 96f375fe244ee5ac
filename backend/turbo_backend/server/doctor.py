"""What is installed, what fits, what would be used, and why: `turbodiffusion-server doctor`.

Each check looks at the real thing: the last one starts the server that was found, with one model that imports what
the served models import.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from turbo_backend.errors import TurboError
from turbo_backend.server.backend_directory import check_installation, glibc_version
from turbo_backend.server.binary import TritonInstallation, find_triton
from turbo_backend.server.process import TritonServer
from turbo_backend.server.repository import find_model_repository
from turbo_backend.settings import PREFIX, Settings, unknown_variables

State = Literal["ok", "warning", "failed"]

#: Our kernels use asynchronous copies and bf16 tensor cores, which come with Ampere.
LOWEST_CAPABILITY = (8, 0)
#: The first cuDNN whose conv3d in bf16 is right and fast again with torch 2.9 and later.
LOWEST_CUDNN = 91500
#: Every model process starts with 8 MB and grows by 32 MB; Docker's default of 64 MB does not hold three of them.
LEAST_SHARED_MEMORY = 48 << 20
ENOUGH_SHARED_MEMORY = 1 << 30

#: Initialized by the probe: imports what the served models import, and reports what it sees.
_PROBE = """
import json, pathlib, platform, sys

class TritonPythonModel:
    def initialize(self, args):
        import numpy, torch, triton_python_backend_utils, turbo_backend.settings, turbo_kernels
        seen = {"python": platform.python_version(), "prefix": sys.prefix, "torch": torch.__version__}
        pathlib.Path(__file__).with_name("seen.json").write_text(json.dumps(seen))

    def execute(self, requests):
        return []
"""
_PROBE_CONFIG = """
name: "probe" backend: "python" max_batch_size: 0
input { name: "X" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }
instance_group { kind: KIND_CPU }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what was looked at.
        state: `failed` means that serving cannot work.
        detail: what was found, and why it would or would not be used.
    """

    name: str
    state: State
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings, and what a server started now would use (empty where the settings cannot work)."""

    findings: tuple[Finding, ...]
    would_use: Mapping[str, str]

    @property
    def ok(self) -> bool:
        return all(finding.state != "failed" for finding in self.findings)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"ok": self.ok, "findings": findings, "would_use": dict(self.would_use)}


def diagnose(environ: Mapping[str, str] | None = None) -> Diagnosis:
    """Looks at everything that serving needs, in the order in which it is needed."""
    environ = os.environ if environ is None else environ
    findings: list[Finding] = []
    would_use: dict[str, str] = {}

    def look(name: str, check: Callable[[], Iterator[Finding]]) -> None:
        try:
            findings.extend(check())
        except TurboError as error:
            findings.append(Finding(name=name, state="failed", detail=str(error)))

    look("python", _check_python)
    look("torch", _check_torch)
    look("triton-lang", _check_triton_lang)
    look("gpu", _check_gpus)
    look("video", _check_video)
    look("shared memory", _check_shared_memory)
    look("settings", lambda: _check_settings(environ, would_use))
    if would_use:
        settings = Settings.from_environment(environ)
        look("weights", lambda: _check_weights(settings))
        look("providers", lambda: _check_providers(settings))
        look("kernels", lambda: _check_kernels(settings))
    look("model repository", _check_repository)
    look("tritonserver", lambda: _check_triton(environ, would_use))
    return Diagnosis(findings=tuple(findings), would_use=would_use)


def _check_python() -> Iterator[Finding]:
    glibc = glibc_version()
    detail = (
        f"{platform.python_version()} at {sys.executable}, glibc {'.'.join(map(str, glibc)) if glibc else 'absent'}"
    )
    yield Finding(name="python", state="ok", detail=detail)
    version = importlib.metadata.version("numpy")
    # Whether numpy 2 is at fault depends on the server, so the check of tritonserver says it.
    yield Finding(name="numpy", state="ok", detail=version)


def _check_torch() -> Iterator[Finding]:
    import torch

    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None  # type: ignore[no-untyped-call]
    yield judge_torch(torch.__version__, torch.version.cuda, cudnn)


def judge_torch(version: str, cuda: str | None, cudnn: int | None) -> Finding:
    """Whether that release of torch runs the VAE's conv3d as it should.

    Args:
        version: such as `2.9.1+cu128`.
        cuda: such as `12.8`; None for a build without CUDA.
        cudnn: as torch numbers it (9.15.0 is 91500); None for a build without CUDA.
    """
    built = f"CUDA {cuda}, cuDNN {cudnn}" if cuda else "built for the CPU"
    release = tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
    detail = f"{version} ({built})"
    if release == (2, 9, 0):
        return Finding(name="torch", state="failed", detail=f"{detail}: 2.9.0 runs conv3d without cuDNN; use 2.9.1")
    if release >= (2, 9) and cuda is not None and cudnn is not None and cudnn < LOWEST_CUDNN:
        package = f"nvidia-cudnn-cu{cuda.partition('.')[0]}"
        advice = f"{detail}: conv3d needs cuDNN 9.15 from torch 2.9 on; `pip install '{package}>=9.15'`"
        return Finding(name="torch", state="failed", detail=advice)
    return Finding(name="torch", state="ok", detail=detail)


def _check_triton_lang() -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            name="triton-lang", state="failed", detail="absent: `pip install triton`; turbo_kernels imports it"
        )
        return
    yield Finding(name="triton-lang", state="ok", detail=version)


def _check_gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            detail = "the NVIDIA driver is loaded, but this torch cannot use it; install a torch built for CUDA"
            yield Finding(name="gpu", state="warning", detail=detail)
        else:
            yield Finding(name="gpu", state="ok", detail="none; the tiny model serves on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        fits = capability >= LOWEST_CAPABILITY
        yield Finding(
            name=f"gpu cuda:{index}",
            state="ok" if fits else "warning",
            detail=f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{capability[0]}.{capability[1]}" + ("" if fits else "; provider triton needs 8.0 or later"),
        )


def _check_video() -> Iterator[Finding]:
    import av

    try:
        av.codec.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        yield Finding(
            name="video", state="failed", detail=f"PyAV {av.__version__} has no libx264; install av from PyPI"
        )
    else:
        yield Finding(name="video", state="ok", detail=f"PyAV {av.__version__} with libx264")


def _check_shared_memory() -> Iterator[Finding]:
    shared = os.statvfs("/dev/shm")  # noqa: S108  (where POSIX puts it)
    yield judge_shared_memory(shared.f_bavail * shared.f_frsize)


def judge_shared_memory(free: int) -> Finding:
    """Whether `free` bytes of /dev/shm hold what the models pass to each other."""
    detail = f"{free / 2**20:,.0f} MiB free in /dev/shm"
    if free >= ENOUGH_SHARED_MEMORY:
        return Finding(name="shared memory", state="ok", detail=detail)
    advice = f"{detail}: give a container `--shm-size=1g` or more"
    return Finding(name="shared memory", state="warning" if free >= LEAST_SHARED_MEMORY else "failed", detail=advice)


def _check_settings(environ: Mapping[str, str], would_use: dict[str, str]) -> Iterator[Finding]:
    for remark in unknown_variables(environ):
        yield Finding(name="settings", state="warning", detail=remark)
    settings = Settings.from_environment(environ)
    device, dtype, provider = settings.device, settings.dtype, settings.provider
    would_use.update(
        model=",".join(settings.models),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        attention_provider=provider,
        quant_linear=str(settings.quant_linear).lower(),
        threads=str(settings.threads),
    )
    chosen = ", ".join(f"{name}={value}" for name, value in settings.to_environment().items())
    yield Finding(name="settings", state="ok", detail=chosen or "all at their defaults")
    if not settings.served_model.embedded and device.type == "cpu":
        detail = f"{settings.served_model.name} on a CPU takes hours for a video"
        yield Finding(name="settings", state="warning", detail=detail)


def _check_weights(settings: Settings) -> Iterator[Finding]:
    if settings.weights == "random":
        detail = f"{PREFIX}WEIGHTS=random: no files are read, and videos show noise"
        yield Finding(name="weights", state="warning", detail=detail)
        return
    from turbo_backend.checkpoints import find_files, tiny_checkpoint_folder

    for model in settings.served_models:
        folder = settings.checkpoint_dir or tiny_checkpoint_folder()
        files = find_files(model, folder, quant_linear=settings.quant_linear, dit=settings.dit_checkpoint or None)
        names = (*files.dit, files.text_encoder, files.vae)
        detail = ", ".join(f"{path.name} ({path.stat().st_size / 2**20:,.0f} MiB)" for path in names)
        yield Finding(name="weights", state="ok", detail=f"{folder}: {detail}")


def _check_providers(settings: Settings) -> Iterator[Finding]:
    import torch

    device, used = settings.device, settings.provider
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if settings.attention_provider != "auto":
        why = f"{PREFIX}ATTENTION_PROVIDER says so"
    elif device.type == "cuda":
        why = "the default on a GPU"
    else:
        why = "the default on a CPU"
    for name, obstacle in (
        ("reference", None),
        ("triton", _triton_obstacle(capability)),
        ("spargeattn", _spargeattn_obstacle(capability)),
    ):
        detail = f"not available: {obstacle}" if obstacle else "available"
        state: State = "ok"
        if name == used:
            state = "failed" if obstacle else "ok"
            detail += f"; would be used ({why})"
        yield Finding(name=f"provider {name}", state=state, detail=detail)


def _check_kernels(settings: Settings) -> Iterator[Finding]:
    from turbo_kernels import self_check

    provider = settings.provider
    try:
        check = self_check(settings.device, settings.served_model.dit.head_dim, provider)
    except Exception as error:  # whatever a compiler or a driver raises is the finding
        detail = f"{provider} on {settings.device}: {type(error).__name__}: {error}"
        yield Finding(name="kernels", state="failed", detail=detail)
        return
    over = [
        f"{name} {error:.2g} (limit {check.limits[name]:.2g})"
        for name, error in check.details.items()
        if not error <= check.limits[name]
    ]
    verdict = f"off the fp32 reference: {', '.join(over)}" if over else "every op agrees with the fp32 reference"
    yield Finding(
        name="kernels", state="ok" if check.passed else "failed", detail=f"{provider} on {settings.device}: {verdict}"
    )


def _triton_obstacle(capability: tuple[int, int] | None) -> str | None:
    if capability is None:
        interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
        return None if interpreted else "needs a CUDA GPU (or TRITON_INTERPRET=1, for tests)"
    if capability < LOWEST_CAPABILITY:
        return f"needs compute capability 8.0 or later, not {capability[0]}.{capability[1]}"
    return None


def _spargeattn_obstacle(capability: tuple[int, int] | None) -> str | None:
    if importlib.util.find_spec("spas_sage_attn") is None:
        return "package spas_sage_attn is not installed"
    return "needs a CUDA GPU" if capability is None else None


def _check_repository() -> Iterator[Finding]:
    repository = find_model_repository()
    models = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    yield Finding(name="model repository", state="ok", detail=f"{repository}: {', '.join(models)}")


def _check_triton(environ: Mapping[str, str], would_use: dict[str, str]) -> Iterator[Finding]:
    installation = find_triton(environ=environ)
    yield Finding(name="tritonserver", state="ok", detail=f"{installation.binary} ({installation.origin})")
    check_installation(installation)
    version, seconds, seen = probe_triton(installation)
    would_use.update(tritonserver=str(installation.binary), triton_version=version)
    yield Finding(
        name="tritonserver starts",
        state="ok",
        detail=f"version {version}, ready in {seconds:.1f} s; models run Python {seen['python']} of {seen['prefix']} "
        f"with torch {seen['torch']}",
    )


def probe_triton(installation: TritonInstallation) -> tuple[str, float, dict[str, str]]:
    """Starts the server with one model that imports what the served ones do.

    Returns:
        Triton's version, the seconds until it was ready, and the model's view of Python, prefix and torch.

    Raises:
        Misconfigured: it does not start, with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="turbo-doctor-") as folder:
        model = Path(folder) / "probe" / "1"
        model.mkdir(parents=True)
        (model / "model.py").write_text(_PROBE, encoding="utf-8")
        (model.parent / "config.pbtxt").write_text(_PROBE_CONFIG, encoding="utf-8")
        started = time.monotonic()
        with TritonServer(Path(folder), installation=installation, ready_timeout=120) as server:
            seconds = time.monotonic() - started
            seen: dict[str, str] = json.loads((model / "seen.json").read_text(encoding="utf-8"))
            version = server.version
            server.stop(0)
        return version, seconds, seen
