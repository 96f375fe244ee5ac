"""A process that stands still ends; one that works does not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

START = """
import ctypes, time
from turbo_backend.jobs.standstill import StandstillGuard
guard = StandstillGuard(0.5)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_a_process_that_keeps_the_interpreter_to_itself_ends() -> None:
    ended = run(
        """
        ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock, as a deadlock would
        print("awake")
        """
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "Timeout" in ended.stderr
    assert "standstill.py" in ended.stderr, "the threads and where they stand"


def test_one_that_waits_or_has_stopped_the_guard_goes_on() -> None:
    ended = run(
        """
        time.sleep(1.5)
        guard.stop()
        ctypes.PyDLL(None).sleep(1)
        print("awake")
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "awake\n", "")
