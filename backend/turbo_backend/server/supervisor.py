"""Runs tritonserver as a child that cannot outlive its launcher, however the launcher ends.

Run by path as `python -I -S supervisor.py SOCKET GRACE SHM_PREFIX FOLDER COMMAND...` (standard library alone, some
20 ms), in a session of its own. SOCKET is one end of a socket pair whose other end the launcher holds. This process

- writes the server's process id to the socket as one line;
- stops the server when it reads `stop SECONDS` or the socket closes (the launcher died) or on SIGTERM: SIGTERM first,
  SIGKILL to the whole process group when SECONDS (at first: GRACE) are over, or sooner when nothing is in flight any
  more and the server still does not end;
- waits for all that the server leaves behind (it is their reaper), then removes the shared memory files that begin
  with SHM_PREFIX, and FOLDER;
- writes `died PID STATUS` for each process of a server that ended by itself that a signal of somebody else ended too,
  with its status as `waitpid` gives it: the server may not outlive a model process long enough for the launcher to see;
- exits with the server's exit status, or 128 + N when signal N ended it; 0 when the signal was this process's own and
  nothing was in flight.

Nothing is in flight once no model process is alive: Triton unloads a model after its last request has ended, and a
model whose process died answers no request. Triton 2.51 can hang from there on until its exit timeout: a model process
that died is never unloaded, and some malformed requests leave a reference to their model behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  (where POSIX puts it, not a temporary file of ours)
#: Python models notice within a third of a second that their server is gone.
_STUB_GRACE_SECONDS = 3.0
#: How long a server that is stopping may live on without a live model process, and how often that is looked at.
_IDLE_SECONDS = 5.0
_LOOK_SECONDS = 0.25


def main(arguments: list[str]) -> int:
    control = socket.socket(fileno=int(arguments[0]))
    grace = float(arguments[1])
    shm_prefix, folder, command = arguments[2], arguments[3], arguments[4:]
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wakeup = _wake_on(signal.SIGCHLD, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = _spawn(command, control, libc.prctl)
    with contextlib.suppress(OSError):  # the launcher is gone already; the closed socket is seen below
        control.sendall(f"{server}\n".encode("ascii"))
    died: dict[int, int] = {}
    status = _supervise(server, control, wakeup, grace, died)
    _reap_the_rest(server, died)
    with contextlib.suppress(OSError):
        control.sendall("".join(f"died {pid} {code}\n" for pid, code in died.items()).encode("ascii"))
    remove_shared_memory(shm_prefix)
    shutil.rmtree(folder, ignore_errors=True)
    return status


def remove_shared_memory(prefix: str) -> None:
    """Removes the shared memory files whose names begin with `prefix`."""
    for name in os.listdir(_SHARED_MEMORY):
        if name.startswith(prefix):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(_SHARED_MEMORY, name))


def _spawn(command: list[str], control: socket.socket, prctl: Callable[..., int]) -> int:
    """Starts the server as leader of a process group, to be killed should this process be killed."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        control.close()
        os.setsid()
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # those this process or Python ignores
            signal.signal(number, signal.SIG_DFL)
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            os.execv(command[0], command)  # noqa: S606  (the launcher's own command line, no shell wanted)
    except OSError as error:
        os.write(2, f"cannot start {command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def child_states(pid: int) -> dict[int, str]:
    """State letter (`S`, `R`, `Z`, ...) by process id of the children of process `pid`; those just gone are absent."""
    states: dict[int, str] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for child in _read(f"/proc/{pid}/task/{thread}/children").split():
                    # The name, in parentheses, may hold anything; the state follows it.
                    states[int(child)] = _read(f"/proc/{child}/stat").rpartition(")")[2].split()[0]
    return states


def _supervise(server: int, control: socket.socket, wakeup: int, grace: float, died: dict[int, int]) -> int:
    """Waits for the server's end and brings it about when told to; returns its exit status.

    Args:
        died: takes the statuses of the server's children that signals ended.
    """
    deadline: float | None = None
    idle_deadline: float | None = None
    was_idle = False
    watched: list[int | socket.socket] = [control, wakeup]
    while True:
        status = _reap(server, died)
        if status is not None:
            return 0 if was_idle and status == 128 + signal.SIGKILL else status
        now = time.monotonic()
        if deadline is not None:
            if any(state != "Z" for state in child_states(server).values()):
                idle_deadline = None
            elif idle_deadline is None:
                idle_deadline = now + _IDLE_SECONDS
            was_idle = idle_deadline is not None and now >= idle_deadline
            if was_idle or now >= deadline:
                _kill_group(server)
        readable, _, _ = select.select(watched, [], [], None if deadline is None else _LOOK_SECONDS)
        seconds: float | None = None
        if wakeup in readable and signal.SIGTERM in os.read(wakeup, 512):
            seconds = grace
        if control in readable:
            try:
                message = control.recv(512)
            except OSError:
                message = b""
            if not message:
                watched.remove(control)
                seconds = grace
            else:
                seconds = float(message.decode("ascii").splitlines()[-1].removeprefix("stop "))
        if seconds is not None:
            if deadline is None:
                os.kill(server, signal.SIGTERM)
            deadline = min(deadline or math.inf, time.monotonic() + seconds)


def _reap(server: int, died: dict[int, int]) -> int | None:
    """Collects children that ended, those that a signal ended in `died`; the server's exit status if it is there."""
    found: int | None = None
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if child == 0:
            return found
        if child == server:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code
        elif os.WIFSIGNALED(status):
            died[child] = status


def _reap_the_rest(server: int, died: dict[int, int]) -> None:
    """Waits for the model processes, which were reparented to this one, and kills those that stay.

    Args:
        died: as for `_supervise`; takes those that signals ended before.
    """
    deadline = time.monotonic() + _STUB_GRACE_SECONDS
    while _children():
        _reap(server, died)
        if time.monotonic() >= deadline:
            died = {}
            _kill_group(server)
            for child in _children():  # whatever moved itself to a group of its own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def _children() -> list[int]:
    return [int(word) for word in _read(f"/proc/self/task/{os.getpid()}/children").split()]


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _wake_on(*signals: signal.Signals) -> int:
    """A descriptor that becomes readable when one of the signals arrives, and then yields its number as a byte."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def ignore(number: int, frame: FrameType | None) -> None:
        """Set so that the signal is delivered at all; the descriptor carries it."""

    for number in signals:
        signal.signal(number, ignore)
    return reading


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
