"""Why models of a server could not be loaded, told to its launcher: in the log it stands among much else.

One file for all models of a run, a JSON line for each failure. The launcher holds it open, because it is removed with
the run's other files as soon as the server has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from turbo_backend.errors import TurboError

#: The launcher sets it to the file's path.
FILE_VARIABLE = "TURBO_START_FAILURE_FILE"


def tell_failure(model: str, error: Exception, environ: Mapping[str, str] | None = None) -> None:
    """Leaves word of what kept a model from loading; nothing where no launcher listens."""
    path = (os.environ if environ is None else environ).get(FILE_VARIABLE)
    if path:
        reason = str(error) if isinstance(error, TurboError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:  # the log has it too
            file.write(json.dumps({"model": model, "reason": reason}) + "\n")


class StartFailures:
    """The launcher's side of a file that it makes.

    Args:
        path: of the file, which must not exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("x+", encoding="utf-8")

    def read(self) -> str:
        """All that was told, a line for each reason; empty where nothing was."""
        self._file.seek(0)
        models: dict[str, list[str]] = defaultdict(list)
        for told in map(json.loads, self._file):
            models[told["reason"]].append(told["model"])
        return "\n".join(f"{', '.join(names)} cannot be loaded: {reason}" for reason, names in models.items())

    def close(self) -> None:
        self._file.close()
