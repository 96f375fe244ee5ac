"""Noise by (seed, step)."""

import pytest
import torch

from turbo_backend.errors import InvalidArgument
from turbo_backend.noise import draw_channel, draw_noise

SHAPE = (16, 3, 4, 6)
PINNED_1_0 = [1.091689109802246, 0.45582669973373413, 0.7017897367477417, 0.2849433720111847]
PINNED_MAX_3 = [0.2925095558166504, 1.913009762763977]
PINNED_1_0_CHANNEL_2 = [1.1197171211242676, -1.2581526041030884]


def test_values_are_pinned():
    """A numpy release that changed its ziggurat would change every video; it must not go unnoticed."""
    assert draw_noise(1, 0, (1, 4)).tolist() == [PINNED_1_0]
    assert draw_noise(2**63 - 1, 3, (1, 2)).tolist() == [PINNED_MAX_3]
    assert draw_noise(1, 0, (3, 1, 2))[2].tolist() == [PINNED_1_0_CHANNEL_2]


def test_channels_may_be_drawn_in_any_order():
    noise = torch.full(SHAPE, torch.nan)
    for channel in reversed(range(SHAPE[0])):
        draw_channel(noise, 7, 2, channel)
    assert torch.equal(noise, draw_noise(7, 2, SHAPE))
    assert len({tuple(row) for row in noise.flatten(1).tolist()}) == SHAPE[0], "no two channels alike"


def test_noise_depends_on_seed_and_step_alone():
    first = draw_noise(7, 2, SHAPE)
    torch.manual_seed(0)
    draw_noise(7, 1, SHAPE)
    assert torch.equal(draw_noise(7, 2, SHAPE), first)
    for seed, step in ((7, 1), (8, 2), (2, 7)):
        assert not torch.equal(draw_noise(seed, step, SHAPE), first)


def test_noise_is_standard_normal_float32():
    noise = draw_noise(3, 0, (16, 21, 60, 104))
    assert noise.dtype == torch.float32
    num = noise.numel()
    assert abs(noise.mean().item()) < 5 / num**0.5
    assert abs(noise.var().item() - 1) < 5 * (2 / num) ** 0.5


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**64, 0), (0, -1)])
def test_range(seed, step):
    with pytest.raises(InvalidArgument):
        draw_noise(seed, step, SHAPE)
