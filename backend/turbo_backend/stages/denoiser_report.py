"""What the denoiser reports of a finished request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from turbo_backend.config import ModelConfig
from turbo_backend.manifest import device_name, merge_reports, versions
from turbo_backend.memory import gpu_peak
from turbo_backend.parameters import GenerationParameters
from turbo_backend.sampler import RCMSchedule
from turbo_kernels import attention_geometry


@dataclass(slots=True, kw_only=True)
class StepLog:
    """What happened to one request.

    Attributes:
        queue_milliseconds: time in which others had the device, before its first step and between its steps.
        turns_waited: turns of others that ended in that time.
        step_milliseconds: of each step that was run.
        forward_milliseconds: of the network alone in each of them, on the device's clock.
        batch_sizes: how many requests shared each of these steps, this one included.
        resumed_after: steps that an earlier run had finished; 0 where there was none.
    """

    queue_milliseconds: float = 0.0
    turns_waited: int = 0
    step_milliseconds: list[float] = field(default_factory=list)
    forward_milliseconds: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    resumed_after: int = 0


class DenoiserReport:
    """Writes reports of one server's denoiser.

    Args:
        model: the served model.
        device: where it runs.
        dtype: of its activations.
        provider: attention provider.
        placement: of the experts.
        fingerprint: of the weights.
        identity: other facts about this server that go into every report.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        provider: str,
        placement: str,
        fingerprint: str,
        identity: Mapping[str, object],
    ) -> None:
        self._model = model
        self._device = device
        self._dtype = dtype
        self._provider = provider
        self._placement = placement
        self._fingerprint = fingerprint
        self._identity = dict(identity)

    def write(
        self, earlier: Mapping[str, object], parameters: GenerationParameters, experts: tuple[int, ...], log: StepLog
    ) -> dict[str, object]:
        """The report, with what earlier stages reported."""
        left_out = {"seed", "width", "height"}
        if not self._model.takes_image:
            left_out |= {"boundary", "adaptive_resolution", "fit"}
        attention: dict[str, object] = {"type": parameters.attention_type, "provider": self._provider}
        if parameters.attention_type != "original":
            geometry = attention_geometry(parameters.attention_type, self._device)
            attention["block_q"], attention["block_k"] = geometry
        stage: dict[str, object] = {
            "milliseconds": round(sum(log.step_milliseconds), 2),
            "queue_milliseconds": round(log.queue_milliseconds, 2),
            "turns_waited": log.turns_waited,
            "step_milliseconds": [round(milliseconds, 2) for milliseconds in log.step_milliseconds],
            "forward_milliseconds": [round(milliseconds, 2) for milliseconds in log.forward_milliseconds],
            "batch_size": max(log.batch_sizes, default=1),
            "batch_sizes": list(log.batch_sizes),
            **gpu_peak(),
        }
        if log.resumed_after:
            stage["resumed_after"] = log.resumed_after
        notes: list[str] = []
        if self._model.num_experts > 1:
            stage |= {"experts": list(experts), "expert_placement": self._placement}
            if 1 not in experts:
                notes.append(_never_reached(parameters))
        return merge_reports(
            earlier,
            self._identity,
            {
                "model": self._model.name,
                "seed": parameters.seed,
                "parameters": {key: value for key, value in parameters.to_dict().items() if key not in left_out},
                "attention": attention,
                "num_tokens": parameters.num_tokens,
                "device": device_name(self._device),
                "dtype": str(self._dtype).removeprefix("torch."),
                "versions": versions(),
                "weights": {"denoiser": self._fingerprint},
                "stages": {"denoiser": stage},
                "notes": notes,
            },
        )


def _never_reached(parameters: GenerationParameters) -> str:
    """Why the low-noise expert did not run, in words."""
    last = RCMSchedule(parameters.num_steps, parameters.sigma_max).times[-2]
    steps = f"{parameters.num_steps} step{'s' if parameters.num_steps > 1 else ''}"
    return f"the low-noise expert never ran: the last of {steps} is at t = {last:.3f}, boundary {parameters.boundary}"
