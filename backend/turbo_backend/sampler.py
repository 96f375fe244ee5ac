"""The rCM sampler: one to four denoising steps of a timestep-distilled velocity network.

Source: rCM paper (Zheng et al., "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time
Consistency") and upstream TurboDiffusion, whose schedule and update rules these are.

Rectified-flow time t in [0, 1] relates to the noise level by t = sigma / (1 + sigma); a noisy latent is
x_t = (1 - t) x_0 + t eps, and the network estimates v = eps - x_0, so that x_0 = x_t - t v. The state is kept in
float64: it is small beside the network's work, and the update subtracts nearly equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from turbo_backend.errors import InvalidArgument

#: TrigFlow angles of the steps after the first (upstream's choice for the distilled checkpoints).
_MID_ANGLES = (1.5, 1.4, 1.0)
MAX_STEPS = 1 + len(_MID_ANGLES)


@dataclass(frozen=True)
class RCMSchedule:
    """The times that a request visits.

    Angles are [atan(sigma_max), 1.5, 1.4, 1.0][:num_steps] and then 0; an angle becomes a rectified-flow time by
    t = sin / (sin + cos).

    Attributes:
        num_steps: 1 to 4.
        sigma_max: noise level of the first step, finite and > 0.
    """

    num_steps: int
    sigma_max: float

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise InvalidArgument("NUM_STEPS", self.num_steps, f"1 to {MAX_STEPS}")
        if not (math.isfinite(self.sigma_max) and self.sigma_max > 0):
            raise InvalidArgument("SIGMA_MAX", self.sigma_max, "finite and over 0")

    @cached_property
    def times(self) -> tuple[float, ...]:
        """num_steps + 1 float64 times, ending in exactly 0."""
        angles = (math.atan(self.sigma_max), *_MID_ANGLES[: self.num_steps - 1], 0.0)
        return tuple(math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles)

    @cached_property
    def network_timesteps(self) -> tuple[float, ...]:
        """What the network is told at each step: bfloat16(1000 * float32(t)).

        Upstream casts the timestep to bfloat16 before embedding it, which moves it by up to 2 units (the spacing
        of bfloat16 is 4 between 512 and 1024); distilled checkpoints are run on exactly these values. The
        update itself uses the unrounded `times`.
        """
        times = torch.tensor(self.times[:-1], dtype=torch.float64)
        rounded = (times.float().double() * 1000).to(torch.bfloat16)
        return tuple(rounded.double().tolist())

    def expert(self, step: int, boundary: float) -> int:
        """Which of two experts runs `step`: 0 (high noise), or 1 from the first step whose t < `boundary` on."""
        return int(any(t < boundary for t in self.times[: step + 1]))


@dataclass(frozen=True)
class Step:
    """One finished step.

    Attributes:
        index: 0 to num_steps - 1.
        t: the time at which the network was run, one a sample.
        latents: float64 [B, ...], the state after the step; what a resumed run starts from.
        denoised: float64 [B, ...], this step's estimate of the clean latents (equal to `latents` at the end).
    """

    index: int
    num_steps: int
    t: tuple[float, ...]
    latents: torch.Tensor
    denoised: torch.Tensor

    @property
    def is_last(self) -> bool:
        return self.index == self.num_steps - 1


#: (latents float64 [B, ...], timesteps float64 [B] for the network, step index) -> velocity [B, ...]
VelocityFn = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
#: step -> standard normal noise [B, ...]; called with 0 for the initial noise, with i + 1 at the end of step i
NoiseFn = Callable[[int], torch.Tensor]


def sample_steps(
    velocity_fn: VelocityFn,
    noise_fn: NoiseFn,
    schedule: RCMSchedule | Sequence[RCMSchedule],
    *,
    ode: bool,
    start_step: int = 0,
    latents: torch.Tensor | None = None,
) -> Iterator[Step]:
    """Runs the sampler, giving each step as it is finished.

        x      <- t_0 eps_0                              initial state
        x_hat   = x - t v(x, t)
        x      <- (1 - t') x_hat + t' eps                SDE: fresh noise each step
        x      <- x - (t - t') v                         ODE: none

    The last SDE step ends at t' = 0 and draws no noise, for it would be multiplied by 0.

    Args:
        velocity_fn: the network; casts the latents to its own dtype.
        noise_fn: noise of a step, on the device where the state shall live. The noise of a step must not depend
            on the calls before it (see `noise.draw_noise`), or a resumed run would differ.
        schedule: one for all samples, or one a sample; all with the same num_steps.
        ode: deterministic updates.
        start_step: number of steps already done.
        latents: [B, ...], the state after them (`Step.latents`); needed if and only if start_step > 0.

    Yields:
        `Step` start_step, ..., num_steps - 1.

    Raises:
        InvalidArgument: schedules that disagree on num_steps or do not fit the batch, or a start that does not exist.
    """
    schedules = [schedule] if isinstance(schedule, RCMSchedule) else list(schedule)
    if len({s.num_steps for s in schedules}) != 1:
        raise InvalidArgument("NUM_STEPS", [s.num_steps for s in schedules], "the same for all samples of a batch")
    num_steps = schedules[0].num_steps
    if not 0 <= start_step < num_steps:
        raise InvalidArgument("start_step", start_step, f"0 to {num_steps - 1}")
    if (latents is None) != (start_step == 0):
        raise InvalidArgument("start_step", start_step, "0 without latents, over 0 with the latents to go on from")

    noise_or_state = noise_fn(0) if latents is None else latents
    batch_size = noise_or_state.shape[0]
    if isinstance(schedule, RCMSchedule):
        schedules *= batch_size
    elif len(schedules) != batch_size:
        raise InvalidArgument("schedule", len(schedules), f"one schedule a sample, {batch_size} in all")

    def per_sample(values: Sequence[float]) -> torch.Tensor:
        """float64 [B, 1, ...], to broadcast against the state."""
        column = torch.tensor(values, dtype=torch.float64, device=noise_or_state.device)
        return column.view(-1, *[1] * (noise_or_state.ndim - 1))

    x = noise_or_state.double()
    if latents is None:
        x = x * per_sample([s.times[0] for s in schedules])

    for index in range(start_step, num_steps):
        times = tuple(s.times[index] for s in schedules)
        next_times = [s.times[index + 1] for s in schedules]
        timesteps = torch.tensor([s.network_timesteps[index] for s in schedules], dtype=torch.float64)
        t, t_next = per_sample(times), per_sample(next_times)

        velocity = velocity_fn(x, timesteps, index).double()
        denoised = x - t * velocity
        if index == num_steps - 1:
            x = denoised
        elif ode:
            x = x - (t - t_next) * velocity
        else:
            x = (1 - t_next) * denoised + t_next * noise_fn(index + 1).double()
        yield Step(index=index, num_steps=num_steps, t=times, latents=x, denoised=denoised)
