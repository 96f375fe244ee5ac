"""TrigFlow and rectified flow are two readings of one network."""

from __future__ import annotations

import math

import pytest
import torch

from turbo_training.distill_rcm import denoise, trig_output
from turbo_training.dit_forward import Condition, TextBatch
from turbo_training.flow import sample_teacher

_NOTHING = TextBatch(torch.zeros(1, 1, 1), torch.ones(1, dtype=torch.int64))
_CONDITION = Condition(TextBatch(torch.zeros(2, 1, 1), torch.ones(2, dtype=torch.int64)))


def draw(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_right_velocity_gives_the_right_output_and_data() -> None:
    x0, noise, angle = draw(0), draw(1), torch.tensor([0.4, 1.5], dtype=torch.float64)
    c, s = (part.view(-1, 1, 1, 1, 1) for part in (angle.cos(), angle.sin()))
    x = c * x0 + s * noise

    def oracle(state: torch.Tensor, t: torch.Tensor, _condition: Condition) -> torch.Tensor:
        t = t.view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(state, (1 - t) * x0 + t * noise)
        return noise - x0

    output = trig_output(oracle, x, angle, _CONDITION)
    torch.testing.assert_close(output, c * noise - s * x0)
    torch.testing.assert_close(denoise(output, x, angle), x0)


# PyTorch's own rules for forward derivatives are loaded through what it calls deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_the_output_has_the_derivative_of_its_formula() -> None:
    x, direction, angle = draw(2), draw(3), torch.tensor([0.7, 1.3], dtype=torch.float64)

    def net(state: torch.Tensor, t: torch.Tensor, _condition: Condition) -> torch.Tensor:
        return torch.sin(state) * t.view(-1, 1, 1, 1, 1).square()

    def along(step: float) -> torch.Tensor:
        return trig_output(net, x + step * direction, angle + step, _CONDITION)

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        out = trig_output(net, dual(x, direction), dual(angle, torch.ones_like(angle)), _CONDITION)
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, (along(1e-5) - along(-1e-5)) / 2e-5, atol=1e-7, rtol=1e-6)


def test_the_teachers_sampler_follows_a_straight_path_to_the_data() -> None:
    noise, x0 = draw(4).float(), draw(5).float()

    def straight(_x: torch.Tensor, _t: torch.Tensor, _condition: Condition) -> torch.Tensor:
        return (noise - x0).repeat(2, 1, 1, 1, 1)  # with the text and without

    sampled = sample_teacher(straight, noise, _CONDITION, _NOTHING, num_steps=7)
    torch.testing.assert_close(sampled, x0, atol=1e-5, rtol=1e-5)
    assert math.isfinite(float(sampled.sum()))
