"""Finds the committed model repository, and renders the one to serve from it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import turbo_backend
from turbo_backend.config import ModelConfig
from turbo_backend.errors import Misconfigured

FOLDER_NAME = "model_repository"
CONFIG_NAME = "config.pbtxt"
JOBS_NAME = "jobs"


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


def render_repository(committed: Path, model: ModelConfig, folder: Path) -> Path:
    """Writes to `folder` the models that serving one network takes: its ensemble, the steps that this names, and jobs.

    So a server of a text model loads no image encoder, and a server of an image model offers no `text_to_video`.

    Raises:
        Misconfigured: the committed repository lacks one of them.
    """
    names = [model.ensemble, JOBS_NAME, *_step_names(committed / model.ensemble / CONFIG_NAME)]
    folder.mkdir(parents=True)
    for name in names:
        if not (committed / name / CONFIG_NAME).is_file():
            raise Misconfigured(f"model repository {committed} has no {name}, which {model.name} needs")
        shutil.copytree(committed / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _step_names(ensemble: Path) -> list[str]:
    if not ensemble.is_file():
        raise Misconfigured(f"{ensemble} does not exist")
    return re.findall(r'^\s*model_name:\s*"([^"]+)"', ensemble.read_text(encoding="utf-8"), flags=re.MULTILINE)


def _check(folder: Path) -> Path:
    if not folder.is_dir():
        raise Misconfigured(f"model repository {folder} is not a folder")
    if not any(folder.glob("*/config.pbtxt")):
        raise Misconfigured(f"model repository {folder} holds no model: no folder in it has a config.pbtxt")
    return folder
