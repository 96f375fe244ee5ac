"""The rCM sampler: one to four denoising steps of a timestep-distilled velocity network.

Source: rCM paper (Zheng et al., "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time
Consistency") and upstream TurboDiffusion, whose schedule and update rules these are.

Rectified-flow time t in [0, 1] relates to the noise level by t = sigma / (1 + sigma); a noisy latent is
x_t = (1 - t) x_0 + t eps, and the network estimates v = eps - x_0, so that x_0 = x_t - t v. The state is kept in
float64: it is small beside the network's work, and the update subtracts nearly equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        """The state before the first step, float64 of the noise's shape: t_0 eps_0."""
        return noise.double() * self.times[0]

    def mixes_noise(self, step: int, *, ode: bool) -> bool:
        """Whether `step` ends with fresh noise: not in an ODE, nor in the last step, which would multiply it by 0."""
        return not ode and step < self.num_steps - 1

    def take_step(
        self, step: int, latents: torch.Tensor, velocity: torch.Tensor, noise: torch.Tensor | None, *, ode: bool
    ) -> Step:
        """One step from what the network says of the state; depends on its arguments alone.

            x_hat   = x - t v
            x      <- (1 - t') x_hat + t' eps                SDE: fresh noise each step
            x      <- x - (t - t') v                         ODE: none

        Args:
            step: 0 to num_steps - 1.
            latents: float64, any shape: x.
            velocity: of that shape, any float dtype: v(x, t).
            noise: of that shape, if and only if `mixes_noise(step, ode=ode)`.
        """
        t, t_next = self.times[step], self.times[step + 1]
        velocity = velocity.double()
        denoised = latents - t * velocity
        if noise is not None:
            latents = (1 - t_next) * denoised + t_next * noise.double()
        elif ode and step < self.num_steps - 1:
            latents = latents - (t - t_next) * velocity
        else:
            latents = denoised
        return Step(index=step, num_steps=self.num_steps, latents=latents, denoised=denoised)


@dataclass(frozen=True)
class Step:
    """One finished step.

    Attributes:
        index: 0 to num_steps - 1.
        latents: float64, the state after the step; what a resumed run starts from.
        denoised: float64, this step's estimate of the clean latents (equal to `latents` at the end).
    """

    index: int
    num_steps: int
    latents: torch.Tensor
    denoised: torch.Tensor

    @property
    def is_last(self) -> bool:
        return self.index == self.num_steps - 1


#: (latents float64 [B, ...], timesteps float64 [B] for the network, step index) -> velocity [B, ...]
VelocityFn = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
#: step -> standard normal noise [B, ...]; called with 0 for the initial noise, with i + 1 at the end of step i
NoiseFn = Callable[[int], torch.Tensor]


def sample_steps(velocity_fn: VelocityFn, noise_fn: NoiseFn, schedule: RCMSchedule, *, ode: bool) -> Iterator[Step]:
    """Runs the sampler on samples that share a schedule, giving each step as it is finished.

    Args:
        velocity_fn: the network; casts the latents to its own dtype.
        noise_fn: noise of a step, on the device where the state shall live.
        schedule: of all samples.
        ode: deterministic updates.

    Yields:
        `Step` 0, ..., num_steps - 1.
    """
    latents = schedule.start(noise_fn(0))
    for index, timestep in enumerate(schedule.network_timesteps):
        timesteps = torch.full((len(latents),), timestep, dtype=torch.float64)
        velocity = velocity_fn(latents, timesteps, index)
        noise = noise_fn(index + 1) if schedule.mixes_noise(index, ode=ode) else None
        step = schedule.take_step(index, latents, velocity, noise, ode=ode)
        latents = step.latents
        yield step
