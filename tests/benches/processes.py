"""The processes of a server: which they are, what they weigh, and what they leave behind; for tests and benches."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from turbo_backend.server import supervisor
from turbo_backend.server.supervisor import child_states

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (where POSIX puts it, not a temporary file of ours)


def find_processes(server_pid: int | None) -> dict[str, int]:
    """Ids of a tritonserver's living processes: by their models' names, its own, and its supervisor's if it has one."""
    if server_pid is None or not _command(server_pid):
        return {}
    found = {"tritonserver": server_pid}
    for pid, state in child_states(server_pid).items():
        words = _command(pid)
        if state != "Z" and len(words) > 1 and words[1].endswith("model.py"):
            found[Path(words[1]).parent.parent.name] = pid
    parent = _parent(server_pid)
    if parent is not None and supervisor.__file__ in _command(parent):
        found["supervisor"] = parent
    return found


def resident_mb(processes: Mapping[str, int]) -> dict[str, float]:
    """Resident memory of each in MB (2**20 bytes)."""
    found = {}
    for name, pid in processes.items():
        (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
        found[name] = round(int(line.split()[1]) / 1024, 1)
    return found


def gpu_mb() -> dict[str, float]:
    """Memory used of each watched GPU as `gpu INDEX`, and by each process there that the driver lets us see, in MB."""
    found = {f"gpu {index}": float(used) for index, used in _ask_nvidia_smi("gpu", "index,memory.used")}
    for pid, used in _ask_nvidia_smi("compute-apps", "pid,used_memory"):
        if pid.isdecimal() and used.isdecimal():  # either may be [N/A]
            words = _command(int(pid))
            name = Path(words[1]).parent.parent.name if words[1:] and words[1].endswith("model.py") else f"pid {pid}"
            found[f"{name} on gpu"] = found.get(f"{name} on gpu", 0.0) + float(used)
    return found


def watched_gpus() -> list[str]:
    """Options of nvidia-smi for the GPUs that `CUDA_VISIBLE_DEVICES` names, which it does not read itself; else all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [f"--id={named}"] if named else []


def _ask_nvidia_smi(what: str, fields: str) -> list[list[str]]:
    command = ["nvidia-smi", *watched_gpus(), f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split(", ") for line in answer.splitlines() if line]


def find_leftovers(prefix: str) -> set[str]:
    """Processes, shared memory and temporary folders that bear a name with this beginning."""
    found = {str(path) for path in _SHARED_MEMORY.glob(f"{prefix}*")}
    found |= {str(path) for path in Path(tempfile.gettempdir()).glob(f"{prefix.rstrip('_')}*")}
    for folder in Path("/proc").glob("[0-9]*"):
        command = " ".join(_command(int(folder.name)))
        if prefix in command:
            found.add(f"{folder.name}: {command}")
    return found


def _parent(pid: int) -> int | None:
    """The process whose child `pid` is; None once that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the name, in parentheses, may hold anything


def _command(pid: int) -> list[str]:
    """Words of a process's command line; none once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []
