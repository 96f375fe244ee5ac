"""The diffusion of training: times, velocities, guidance, and the teacher's sampler.

    x_t = (1 - t) x_0 + t eps,   v = eps - x_0,   x_0 = x_t - t v

Source: rectified flow as Wan2.1 uses it; guidance after Ho and Salimans, "Classifier-free diffusion guidance".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from turbo_backend.nets.dit import WanDiT
from turbo_training.attention_forward import DENSE, TrainingAttention
from turbo_training.dit_forward import Condition, TextBatch, velocity

#: How far the guided velocity goes beyond the unguided one; the student learns the guided one.
GUIDANCE = 3.5
#: Larger values spend more of training, and of the teacher's steps, at high noise.
TIME_SHIFT = 3.0
_TIMES_TO_NETWORK = 1000.0

#: (x_t, t [B], condition) -> v
VelocityFn = Callable[[Tensor, Tensor, Condition], Tensor]


def draw_times(batch_size: int, device: torch.device, *, shift: float = TIME_SHIFT) -> Tensor:
    """Logit-normal times, shifted: s t / (1 + (s - 1) t); [B] in (0, 1)."""
    t = torch.sigmoid(torch.randn(batch_size, device=device))
    return shift * t / (1 + (shift - 1) * t)


def expand(t_B: Tensor) -> Tensor:
    """[B] to [B, 1, 1, 1, 1]."""
    return t_B.view(-1, 1, 1, 1, 1)


def velocity_of(
    net: WanDiT,
    attention: TrainingAttention = DENSE,
    *,
    compiled: bool = False,
    streams: list[Tensor] | None = None,
) -> VelocityFn:
    """The network as a function of time in [0, 1]; `streams` as in `dit_forward.velocity`."""

    def function(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times = _TIMES_TO_NETWORK * t
        return velocity(net, x, times, condition, attention=attention, compiled=compiled, streams=streams)

    return function


def guided(function: VelocityFn, x: Tensor, t: Tensor, condition: Condition, nothing: TextBatch) -> Tensor:
    """v(nothing) + g (v(text) - v(nothing)), both in one batch; an image is given to both.

    Args:
        nothing: the empty caption [1, S', C], S' at most as many rows as the texts have.
    """
    batch_size, num_rows, _ = condition.text.embeddings.shape
    empty = torch.zeros_like(condition.text.embeddings)
    empty[:, : nothing.embeddings.shape[1]] = nothing.embeddings[:, :num_rows]
    both = Condition(
        TextBatch(
            torch.cat((condition.text.embeddings, empty)),
            torch.cat((condition.text.lengths, nothing.lengths.expand(batch_size))),
        ),
        None if condition.image is None else condition.image.repeat(2, 1, 1, 1, 1),
    )
    with_text, without = function(x.repeat(2, 1, 1, 1, 1), t.repeat(2), both).chunk(2)
    return without + GUIDANCE * (with_text - without)


@torch.no_grad()
def sample_teacher(
    function: VelocityFn, noise: Tensor, condition: Condition, nothing: TextBatch, *, num_steps: int = 50
) -> Tensor:
    """Euler's method from t = 1 to 0 with guidance, times shifted as in training; returns latents."""
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    times = TIME_SHIFT * times / (1 + (TIME_SHIFT - 1) * times)
    x = noise.double()
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        # The network never saw t = 1 itself.
        t_B = torch.full((len(noise),), min(t, 0.999), device=noise.device)
        v = guided(function, x.float(), t_B, condition, nothing)
        x = x + (t_next - t) * v.double()
    return x.float()
