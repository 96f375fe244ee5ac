"""Finds the committed model repository, and renders the one to serve from it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import turbo_backend
from turbo_backend.config import ModelConfig
from turbo_backend.errors import Misconfigured

FOLDER_NAME = "model_repository"
CONFIG_NAME = "config.pbtxt"
#: Models that serve every network of a server; each network has the other ones for itself.
_SHARED = ("text_encoder", "vae_decoder", "jobs")


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


def render_repository(committed: Path, models: Sequence[ModelConfig], folder: Path) -> Path:
    """Writes to `folder` what serving some networks takes: an ensemble for each, the models that these name, and jobs.

    So a server of a text model loads no image encoder, and a server of an image model offers no `text_to_video`.
    Text encoder, VAE and jobs are shared; denoisers and image encoders are one for each network. The first network that
    takes a name has it plain, the next ones with their suffix: `text_to_video`, `text_to_video_14b`.

    Raises:
        Misconfigured: the committed repository lacks one of them.
    """
    folder.mkdir(parents=True)
    for model in models:
        steps = [*_step_names(committed / model.ensemble / CONFIG_NAME), "jobs"]
        own = [name for name in (model.ensemble, *steps) if name not in _SHARED]
        names = {name: f"{name}_{model.suffix}" if (folder / name).exists() else name for name in own}
        parameters = {"TURBO_MODEL": model.name, "TURBO_ENSEMBLE": names[model.ensemble]} if len(models) > 1 else {}
        for name in (model.ensemble, *steps):
            if not (committed / name / CONFIG_NAME).is_file():
                raise Misconfigured(f"model repository {committed} has no {name}, which {model.name} needs")
            target = folder / names.get(name, name)
            if target.exists():  # shared with a network before
                continue
            shutil.copytree(committed / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            config = target / CONFIG_NAME
            config.write_text(_rename(config.read_text("utf-8"), names, parameters if name in own else {}), "utf-8")
    return folder


def _rename(config: str, names: Mapping[str, str], parameters: Mapping[str, str]) -> str:
    """A `config.pbtxt` in which models have other names, with parameters added."""

    def rename(match: re.Match[str]) -> str:
        return f'{match[1]}"{names.get(match[2], match[2])}"'

    config = re.sub(r'^(name: |\s*model_name: )"([^"]+)"', rename, config, flags=re.MULTILINE)
    return config + "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n' for key, value in parameters.items()
    )


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
