"""What a deployment chooses, read from `TURBO_*` environment variables in this one place.

A Triton model process has no command line of its own: the environment is what reaches it. The launcher's options
(`turbodiffusion-server serve --model ...`) are written into the same variables.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from turbo_backend.config import MODELS, ModelConfig, find_model, name_ensembles
from turbo_backend.errors import Misconfigured

if TYPE_CHECKING:
    import torch

PREFIX = "TURBO_"

Weights = Literal["checkpoint", "random"]
Provider = Literal["auto", "reference", "triton", "spargeattn"]
ExpertPlacement = Literal["auto", "resident", "spread", "swapped"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

#: Fields that hold several values, and what stands between them in a variable.
_SEPARATORS = {"models": ",", "dit_checkpoint": ":"}
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class Settings(BaseModel):
    """One server's settings; frozen, and valid by construction.

    Build it with `Settings.from_environment()`. The fields hold what was asked for; the properties
    `served_models`, `device`, `dtype`, `provider` and `threads` say what that means on this machine. (Pydantic owns
    the name `model_config`.)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    models: tuple[str, ...] = Field(
        ("tiny",),
        alias="model",
        description=f"Model to serve: {', '.join(MODELS)}; several that share text encoder and VAE separated by ','.",
    )
    ensemble: str = Field(
        "",
        description="Name of the model's ensemble where it is not `text_to_video` or `image_to_video`; "
        "the launcher sets it for each of several models.",
    )
    checkpoint_dir: Path | None = Field(
        None, description="Folder of the published weight files and the tokenizer; the `tiny` models bring their own."
    )
    dit_checkpoint: tuple[Path, ...] = Field(
        (),
        description="Denoiser file to use instead of the one looked for in the folder; "
        "a model with two experts takes two, the high-noise one first, separated by ':'.",
    )
    weights: Weights = Field(
        "checkpoint", description="`checkpoint`, or `random` for benches without weight files (said in every REPORT)."
    )
    attention_provider: Provider = Field(
        "auto", description="Which kernels run: `reference` (PyTorch), `triton`, `spargeattn`, or `auto` by device."
    )
    quant_linear: bool = Field(
        False,
        description="Run the denoiser's block linears in 8 bits: e4m3 on GPUs that multiply it, else int8 (W8A8).",
    )
    device_name: str = Field("auto", alias="device", description="`cpu`, `cuda`, `cuda:N`, or `auto`.")
    dtype_name: DtypeName = Field(
        "auto",
        alias="dtype",
        description="`float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on a GPU, float32 on a CPU.",
    )
    text_encoder_device: Literal["auto", "cpu"] = Field(
        "auto",
        description="`cpu` keeps the text encoder (11 GB for the Wan models) off a small GPU; `auto`: as the rest.",
    )
    quant_text_encoder: bool = Field(
        False,
        description="Run the text encoder in 8 bits (e4m3) and keep its token table in the host's memory: 5 GB in "
        "place of 11 on a GPU that multiplies e4m3.",
    )
    gpu_memory_gib: float = Field(
        0.0,
        ge=0.0,
        description="GiB of each GPU that are planned with, whoever holds them; 0 plans with all there are. What would "
        "go beyond is refused, swapped or given back early, but nothing forbids it.",
    )
    num_threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of each model process; 0 takes the processors it may use."
    )
    text_cache_entries: int = Field(256, ge=0, description="Prompts whose embeddings are kept; 0 keeps none.")
    image_cache_entries: int = Field(
        16, ge=0, description="Images whose latents are kept (19 MB each at 720p); 0 keeps none."
    )
    expert_placement: ExpertPlacement = Field(
        "auto",
        description="Where a model's two experts are: both on the GPU (`resident`), the second on the next GPU "
        "(`spread`), one there and both in page-locked host memory (`swapped`), or `auto`: the first that fits.",
    )
    max_batch_size: int = Field(8, ge=1, le=8, description="Most requests that share a forward of the denoiser.")
    batch_invariant: bool = Field(
        True,
        description="Give a request the same latents, bit for bit, whatever runs beside it: on a GPU each step of each "
        "request is then a forward of its own. `false` lets short requests share one.",
    )
    record_forwards: bool = Field(
        False,
        description="On a GPU with room, replay the denoiser's forward of one request as a CUDA graph of its shape, to "
        "the same bits.",
    )
    max_queue_size: int = Field(
        64,
        ge=1,
        le=4096,
        description="Requests that the denoiser holds, waiting and running; more are refused with RESOURCE_EXHAUSTED.",
    )

    job_store: str = Field(
        "auto",
        description="Where durable jobs are kept: a folder, an fsspec URL such as `s3://bucket/jobs`, `none` for no "
        "jobs, or `auto`: `turbodiffusion/jobs` in `$XDG_STATE_HOME` (`~/.local/state`). One server a store.",
    )
    job_concurrency: int = Field(
        8, ge=1, le=256, description="Jobs given to the networks at a time; the others wait in the store."
    )
    job_resume: bool = Field(
        True, description="Go on by itself with jobs that a stop or crash interrupted; else they wait for `resume`."
    )
    job_attempts: int = Field(
        3,
        ge=1,
        description="Starts of a job that each end with the server's death before a further step is finished; "
        "then it waits for `resume`, so that it cannot take the server down for ever.",
    )
    job_max_age_hours: float = Field(
        168.0, gt=0, description="How long a finished job is kept, in hours that a server runs."
    )
    job_max_bytes: int = Field(
        10 * 2**30, ge=2**20, description="What all jobs together may take; the longest finished make room first."
    )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Reads the `TURBO_*` variables; an empty one counts as unset.

        Raises:
            Misconfigured: a variable holds what does not fit; the message names variable, value and what fits.
        """
        environ = os.environ if environ is None else environ
        given: dict[str, object] = {}
        for variable in list_variables():
            value = environ.get(variable.name, "").strip()
            if value:
                given[variable.key] = _parse(variable.field, value)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise Misconfigured("; ".join(_explain(detail, environ) for detail in error.errors())) from None

    def to_environment(self) -> dict[str, str]:
        """The variables that give these settings back; fields at their default are left out."""
        environment = {}
        for variable in list_variables():
            value = getattr(self, variable.field)
            if value != type(self).model_fields[variable.field].default:
                environment[variable.name] = _format(variable.field, value)
        return environment

    @field_validator("models")
    @classmethod
    def _check_models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or any(name not in MODELS for name in value):
            raise ValueError(f"one of {', '.join(MODELS)}")
        if len(set(value)) < len(value):
            raise ValueError("each model once")
        first, *others = (MODELS[name] for name in value)
        for other in others:
            if not first.shares_stages_with(other):
                raise ValueError(f"models with the same text encoder and VAE, unlike {first.name} and {other.name}")
        return value

    @field_validator("ensemble")
    @classmethod
    def _check_ensemble(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9_]*", value):
            raise ValueError("lower-case letters, digits and _")
        return value

    @field_validator("checkpoint_dir")
    @classmethod
    def _check_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError("an existing folder")
        return value

    @field_validator("dit_checkpoint")
    @classmethod
    def _check_files(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        absent = [str(path) for path in value if not path.exists()]
        if absent:
            raise ValueError(f"existing files ({', '.join(absent)} is not there)")
        return value

    @field_validator("device_name")
    @classmethod
    def _check_device(cls, value: str) -> str:
        kind, separator, index = value.partition(":")
        if value not in ("auto", "cpu", "cuda") and not (kind == "cuda" and separator and index.isdecimal()):
            raise ValueError("auto, cpu, cuda or cuda:N")
        return value

    def model_post_init(self, context: Any, /) -> None:
        """Checks what no field can check alone."""
        model = self.served_model
        if self.dit_checkpoint and len(self.models) > 1:
            raise Misconfigured(
                f"{PREFIX}DIT_CHECKPOINT names the files of one model, and {len(self.models)} are served"
            )
        if self.dit_checkpoint and len(self.dit_checkpoint) != model.num_experts:
            raise Misconfigured(
                f"{PREFIX}DIT_CHECKPOINT names {len(self.dit_checkpoint)} file(s): "
                f"{model.name} has {model.num_experts} expert(s), each its own file, separated by ':'"
            )
        if self.weights == "checkpoint" and not model.embedded and self.checkpoint_dir is None:
            raise Misconfigured(
                f"{PREFIX}CHECKPOINT_DIR is not set: {model.name} needs the folder of its published weight files "
                f"(`turbodiffusion-server weights {model.name}` lists them)"
            )

    @property
    def job_store_location(self) -> str | None:
        """Path or URL of the job store; None without jobs."""
        if self.job_store == "none":
            return None
        if self.job_store != "auto":
            return self.job_store
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return str(Path(state).expanduser() / "turbodiffusion" / "jobs")

    @property
    def served_models(self) -> tuple[ModelConfig, ...]:
        """The configurations of all models to serve; they share text encoder and VAE."""
        return tuple(find_model(name) for name in self.models)

    @property
    def ensembles(self) -> dict[str, ModelConfig]:
        """The models by the name of their ensemble."""
        if self.ensemble:
            return {self.ensemble: self.served_model}
        return name_ensembles(self.served_models)

    @property
    def served_model(self) -> ModelConfig:
        """The first of them: the only one in a process that runs a denoiser."""
        return self.served_models[0]

    @property
    def gpu_memory(self) -> int:
        """Bytes of each GPU that are planned with; 0 for all."""
        return int(self.gpu_memory_gib * 2**30)

    @property
    def device(self) -> torch.device:
        """Where the networks run.

        Raises:
            Misconfigured: a GPU is asked for that this process cannot see.
        """
        import torch

        if self.device_name == "cpu":
            return torch.device("cpu")
        available = torch.cuda.is_available()
        if self.device_name == "auto":
            return torch.device("cuda", 0) if available else torch.device("cpu")
        if not available:
            raise Misconfigured(f"{PREFIX}DEVICE = {self.device_name!r}: PyTorch {torch.__version__} sees no CUDA GPU")
        _, _, index = self.device_name.partition(":")
        number = int(index or 0)
        if number >= torch.cuda.device_count():
            raise Misconfigured(
                f"{PREFIX}DEVICE = {self.device_name!r}: must be cuda:0 to cuda:{torch.cuda.device_count() - 1}"
            )
        return torch.device("cuda", number)

    @property
    def device_beside(self) -> torch.device | None:
        """The next GPU, for a second expert; None where there is one alone, or none."""
        import torch

        home, count = self.device, torch.cuda.device_count()
        return torch.device("cuda", (home.index + 1) % count) if home.type == "cuda" and count > 1 else None

    @property
    def dtype(self) -> torch.dtype:
        """The networks' floating type: bfloat16 on a GPU and float32 on a CPU unless chosen."""
        import torch

        if self.dtype_name == "auto":
            return torch.bfloat16 if self.device.type == "cuda" else torch.float32
        chosen: torch.dtype = getattr(torch, self.dtype_name)
        return chosen

    @property
    def provider(self) -> str:
        """The attention provider, `auto` resolved for the device."""
        if self.attention_provider != "auto":
            return self.attention_provider
        return "triton" if self.device.type == "cuda" else "reference"

    @property
    def threads(self) -> int:
        """CPU threads of one model process: as chosen, else the processors that this process may use."""
        return self.num_threads or available_processors()


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One environment variable: its name, the field behind it, and its documentation.

    `key` is the name that validation takes, which differs from `field` where the plain name is a resolved view.
    """

    name: str
    field: str
    key: str
    default: str
    description: str


def list_variables() -> Iterator[Variable]:
    """Every environment variable that is read, in the order of the fields."""
    for field, info in Settings.model_fields.items():
        key = info.alias or field
        yield Variable(
            name=PREFIX + key.upper(),
            field=field,
            key=key,
            default=_format(field, info.default),
            description=info.description or "",
        )


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """A remark for each `TURBO_*` variable that closely resembles a known one without being it.

    Others are left alone: Kubernetes writes `TURBO_..._SERVICE_HOST` for any service whose name begins with `turbo`.
    """
    environ = os.environ if environ is None else environ
    names = [variable.name for variable in list_variables()]
    remarks = []
    for name in environ:
        if name.startswith(PREFIX) and name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
            if near:
                remarks.append(f"{name} is not read by this server; did you mean {near[0]}?")
    return remarks


def available_processors() -> int:
    """Processors this process may use: its affinity mask, and a container's CPU quota where cgroup v2 sets one."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return count
    if quota == "max":
        return count
    return max(1, min(count, int(quota) // int(period)))


def _parse(field: str, value: str) -> object:
    """Shapes the fields that a plain string does not fit; the rest is validated as it is."""
    if field in _SEPARATORS:
        return [part.strip() for part in value.split(_SEPARATORS[field]) if part.strip()]
    if Settings.model_fields[field].annotation is bool:
        lowered = value.lower()
        if lowered in (*_TRUE, *_FALSE):
            return lowered in _TRUE
    return value


def _format(field: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return _SEPARATORS[field].join(str(part) for part in value)
    return str(value)


def _explain(detail: Any, environ: Mapping[str, str]) -> str:
    """One validation failure as `VARIABLE = value: must be ...`."""
    name = PREFIX + str(detail["loc"][0]).upper()
    context = detail.get("ctx", {})
    if detail["type"] == "value_error":
        fits = f"must be {context['error']}"
    elif detail["type"] == "literal_error":
        fits = f"must be {context['expected'].replace(chr(39), '')}"
    elif detail["type"].startswith("bool"):
        fits = "must be true or false"
    elif detail["type"].startswith("int"):
        fits = "must be an integer"
    else:
        fits = str(detail["msg"]).replace("Input should", "must")
    return f"{name} = {environ.get(name, '')!r}: {fits}"
