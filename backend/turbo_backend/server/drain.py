"""Lets requests in flight finish before Triton stops its models.

On SIGTERM Triton 2.51 stops every model at once: a model finishes what it runs, but the next model of the ensemble
refuses the request then. It waits, however, until the last HTTP connection is closed before it stops the models. So the
launcher holds one open while its model processes are at work; gRPC, which carries the requests, goes on meanwhile.
(Later releases let gRPC streams end first, by themselves.)

At work is what uses the processor: a model process without a request uses none at all. Should that ever be wrong,
Triton is stopped too early and does as it would have done anyhow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from turbo_backend.server.supervisor import child_states

_WINDOW_SECONDS = 0.5
_LOOK_SECONDS = 0.1
#: Processor time that a window may hold, all model processes together, and still count as quiet.
_QUIET_CPU_SECONDS = 0.02


def wait_until_quiet(server_pid: int, timeout: float, has_ended: Callable[[], bool]) -> bool:
    """Returns True once no model process of the server has been at work for half a second, or the server has ended.

    Returns:
        False when that did not come about within `timeout` seconds, which must be no less than half a second.
    """
    deadline = time.monotonic() + timeout
    looks = [(time.monotonic(), _cpu_seconds(server_pid))]
    while not has_ended():
        time.sleep(_LOOK_SECONDS)
        now, used = time.monotonic(), _cpu_seconds(server_pid)
        if "D" in child_states(server_pid).values() or used - looks[0][1] > _QUIET_CPU_SECONDS or used < looks[0][1]:
            looks.clear()
        looks.append((now, used))
        if now - looks[0][0] >= _WINDOW_SECONDS:
            return True
        if now >= deadline:
            return False
    return True


def _cpu_seconds(server_pid: int) -> float:
    """Processor time that the living model processes have used so far."""
    ticks = 0
    for pid, state in child_states(server_pid).items():
        if state != "Z":
            try:
                fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            user, system = fields.split()[11:13]
            ticks += int(user) + int(system)
    return ticks / os.sysconf("SC_CLK_TCK")
