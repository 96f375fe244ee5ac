"""Finds the committed model repository."""

from __future__ import annotations

from pathlib import Path

import turbo_backend
from turbo_backend.errors import Misconfigured

FOLDER_NAME = "model_repository"


def find_model_repository(explicit: Path | None = None) -> Path:
    """The repository to serve: the one named, the one inside the installed package, or the checkout's.

    A wheel carries it as `turbo_backend/model_repository`; an editable install finds it at the checkout's top.

    Raises:
        Misconfigured: it is absent, or holds no model.
    """
    if explicit is not None:
        return _check(explicit.resolve())
    package = Path(turbo_backend.__file__).resolve().parent
    candidates = (package / FOLDER_NAME, package.parents[1] / FOLDER_NAME)
    for candidate in candidates:
        if candidate.is_dir():
            return _check(candidate)
    raise Misconfigured(f"no {FOLDER_NAME} in {candidates[0].parent} or {candidates[1].parent}: use --model-repository")


def _check(folder: Path) -> Path:
    if not folder.is_dir():
        raise Misconfigured(f"model repository {folder} is not a folder")
    if not any(folder.glob("*/config.pbtxt")):
        raise Misconfigured(f"model repository {folder} holds no model: no folder in it has a config.pbtxt")
    return folder
