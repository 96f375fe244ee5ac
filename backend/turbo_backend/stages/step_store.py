"""Where the state of a durable request is kept after each step, so that another process can go on from there."""

from __future__ import annotations

from typing import Protocol

import torch


class StepStore(Protocol):
    """Keeps the newest finished step of each durable request.

    The denoiser calls it from one thread of its own, never between two steps of anybody. An exception that it raises is
    logged and costs the request nothing: the run goes on, or begins anew, and gives the same bytes.
    """

    def load(self, request_id: str) -> tuple[int, torch.Tensor] | None:
        """What a run of that request reached before: (finished steps, state), or None when nothing usable is kept.

        The state is float64 `[16, T, h, w]` on the CPU, as `save` got it.
        """

    def save(self, request_id: str, step: int, state: torch.Tensor) -> None:
        """Keeps `state` as that after `step` finished steps (1 to num_steps), in place of what an earlier step left.

        A later step may come without the ones before it, where saving takes longer than a step.
        """
