"""A request to the denoiser: as it arrives, while it is held, and what it is answered."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from turbo_backend.errors import TurboError
from turbo_backend.parameters import Scheduling
from turbo_backend.stages.denoiser_report import StepLog
from turbo_backend.stages.sampling import Sample
from turbo_backend.stages.scheduler import Task
from turbo_backend.stages.step_store import Reached


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseRequest:
    """One request as it arrived.

    Attributes:
        text_embeddings: float32 `[text_len, text_dim]`; rows past `text_length` are ignored.
        values: wire values by name (`SEED`, `NUM_STEPS`, ...), not yet checked.
        report: what earlier stages reported (`prompt`, `image`, `stages`).
        image_latents: float32 `[4 + 16, T, h, w]`, mask and latents of the image, for a model that takes one.
        preview: give a preview with each step.
        request_id: the caller's name for it, by which it can be cancelled and its steps are stored.
        scheduling: when it runs beside others, and whether its steps are stored.
        reached: finished steps and state of an earlier run of the same request, to go on from.
    """

    text_embeddings: torch.Tensor
    text_length: int
    values: Mapping[str, object]
    report: Mapping[str, object]
    image_latents: torch.Tensor | None = None
    preview: bool = False
    request_id: str = ""
    scheduling: Scheduling = field(default_factory=Scheduling)
    reached: Reached | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisedStep:
    """Step `step` of `step_count` is done.

    Attributes:
        cancel_token: names this request alone; filed in `Cancellations`, it ends it.
        preview_latents: float32 `[16, 1, h', w']`, the denoised estimate's middle frame, or None.
        latents: float32 `[16, T, h, w]` after the last step, else None.
        report: with the last step.
    """

    step: int
    step_count: int
    cancel_token: str
    preview_latents: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    report: dict[str, object] | None = None


#: Gets every update of one request; the last one has latents or is an error.
Receive: TypeAlias = Callable[[DenoisedStep | TurboError], None]


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """A request that passed every check and has not ended.

    Attributes:
        task: what the scheduler knows of it.
        sample: what the sampler knows of it.
        arrived: when, on the queue's clock.
        waiting_since: when it arrived, or its last turn ended.
        cancel_token: names this run alone.
        log: what happened to it, for the report.
        has_ended: whether its last update was given.
    """

    request: DenoiseRequest
    receive: Receive
    task: Task
    sample: Sample
    arrived: float
    waiting_since: float = field(init=False)
    cancel_token: str = field(init=False, default_factory=lambda: secrets.token_hex(16))
    log: StepLog = field(init=False, default_factory=StepLog)
    has_ended: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.waiting_since = self.arrived

    @property
    def cancel_keys(self) -> tuple[str, ...]:
        """What it is cancelled by."""
        return self.cancel_token, self.request.request_id

    @property
    def progress(self) -> str:
        """For messages."""
        return f"after {self.sample.step} of {len(self.task.experts)} steps"
