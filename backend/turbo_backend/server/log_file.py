"""The file that takes what a server and its models print, and its end for messages of errors."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TAIL_BYTES = 1 << 16
_TAIL_LINES = 30
_TAIL_WIDTH = 400


class LogFile:
    """An open log; what is written to it goes behind what is there.

    Args:
        path: made with its folders when absent.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")

    def fileno(self) -> int:
        """For a child process to print to."""
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

    def tail(self) -> str:
        """The log's last telling lines; read through the open file, because it may be removed already."""
        end = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, end - _TAIL_BYTES))
        lines = self._file.read().decode("utf-8", "replace").splitlines()
        told = [
            line if len(line) <= _TAIL_WIDTH else f"{line[:_TAIL_WIDTH]} ..." for line in lines if _is_telling(line)
        ]
        return "; the end of its log:\n" + "\n".join(told[-_TAIL_LINES:])


def _is_telling(line: str) -> bool:
    """False for what says nothing about a failure: Triton's tables and its remarks on normal progress."""
    return bool(line.strip()) and not re.match(
        r"\||\+--|I\d{4} \S+ \d+ (?!pb_stub)|Error: Failed to initialize NVML|  <frozen importlib", line
    )
