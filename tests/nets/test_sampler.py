"""The rCM sampler against a restatement in numpy float64, and its promises on batching and resuming."""

import math

import numpy as np
import pytest
import torch

from turbo_backend.errors import InvalidArgument
from turbo_backend.noise import draw_noise
from turbo_backend.sampler import RCMSchedule, sample_steps

SHAPE = (4, 2, 3, 5)


def velocity_of(latents, timesteps, step):
    """A smooth made-up network: depends on state, timestep and nothing else; float32 as the real one's answer."""
    t = timesteps.view(-1, 1, 1, 1, 1) / 1000
    return (torch.tanh(latents) * (1 + t) - 0.3 * t + 0.1 * latents.roll(1, -1)).float()


def noise_of(*seeds):
    return lambda step: torch.stack([draw_noise(seed, step, SHAPE) for seed in seeds])


def run(schedule, seeds, *, ode, **kwargs):
    return list(sample_steps(velocity_of, noise_of(*seeds), schedule, ode=ode, **kwargs))


def restated(sigma_max, num_steps, seed, ode):
    """From the TrigFlow angles, with sigma = tan(angle) and t = sigma / (1 + sigma)."""
    sigmas = [sigma_max, *np.tan([1.5, 1.4, 1.0])[: num_steps - 1], 0.0]
    ts = [sigma / (1 + sigma) for sigma in sigmas]
    x = draw_noise(seed, 0, SHAPE).numpy().astype(np.float64) * ts[0]
    for i in range(num_steps):
        fed = torch.tensor([np.float64(np.float32(ts[i])) * 1000.0]).to(torch.bfloat16)
        v = velocity_of(torch.from_numpy(x)[None], fed.double(), i)[0].numpy().astype(np.float64)
        if ode:
            x = x - (ts[i] - ts[i + 1]) * v
        else:
            eps = draw_noise(seed, i + 1, SHAPE).numpy().astype(np.float64)
            x = (1 - ts[i + 1]) * (x - ts[i] * v) + ts[i + 1] * eps
    return x


@pytest.mark.parametrize(
    ("sigma_max", "times", "fed"),
    [
        (80.0, (0.9876543210, 0.9337810614, 0.8528953948, 0.6089790492), (988, 932, 852, 608)),
        (200.0, (0.9950248756, 0.9337810614, 0.8528953948, 0.6089790492), (996, 932, 852, 608)),
        (1600.0, (0.9993753904, 0.9337810614, 0.8528953948, 0.6089790492), (1000, 932, 852, 608)),
    ],
)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_schedule(sigma_max, times, fed, num_steps):
    schedule = RCMSchedule(num_steps, sigma_max)
    assert schedule.times == pytest.approx((*times[:num_steps], 0), abs=5e-11)
    assert schedule.times[-1] == 0
    assert schedule.network_timesteps == fed[:num_steps]


@pytest.mark.oracle
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("sigma_max", [80.0, 200.0])
def test_steps_equal_the_restatement(num_steps, ode, sigma_max):
    steps = run(RCMSchedule(num_steps, sigma_max), [5], ode=ode)
    assert [step.index for step in steps] == list(range(num_steps))
    assert [step.is_last for step in steps] == [False] * (num_steps - 1) + [True]
    last = steps[-1]
    assert last.latents.dtype == torch.float64
    np.testing.assert_allclose(last.latents[0].numpy(), restated(sigma_max, num_steps, 5, ode), rtol=1e-6, atol=1e-7)
    assert torch.equal(last.latents, last.denoised)


@pytest.mark.parametrize("ode", [False, True])
def test_batch_equals_each_alone(ode):
    schedule, seeds = RCMSchedule(4, 80.0), [1, 2, 3]
    together = run(schedule, seeds, ode=ode)
    for i, seed in enumerate(seeds):
        for batched, alone in zip(together, run(schedule, [seed], ode=ode), strict=True):
            assert torch.equal(batched.latents[i], alone.latents[0])
            assert torch.equal(batched.denoised[i], alone.denoised[0])


@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_a_step_depends_on_state_and_index_alone(ode, num_steps):
    """Every step of a run again, last first, from the state before it."""
    schedule = RCMSchedule(num_steps, 80.0)
    whole = run(schedule, [9, 10], ode=ode)
    before = [schedule.start(noise_of(9, 10)(0)), *(step.latents for step in whole)]
    for index in reversed(range(num_steps)):
        timesteps = torch.full((2,), schedule.network_timesteps[index], dtype=torch.float64)
        noise = noise_of(9, 10)(index + 1) if schedule.mixes_noise(index, ode=ode) else None
        velocity = velocity_of(before[index], timesteps, index)
        again = schedule.take_step(index, before[index], velocity, noise, ode=ode)
        assert torch.equal(again.latents, whole[index].latents)
        assert torch.equal(again.denoised, whole[index].denoised)


@pytest.mark.parametrize(("ode", "drawn"), [(False, [0, 1, 2, 3]), (True, [0])])
def test_no_noise_is_drawn_in_vain(ode, drawn):
    asked = []

    def noise_fn(step):
        asked.append(step)
        return noise_of(1)(step)

    list(sample_steps(velocity_of, noise_fn, RCMSchedule(4, 80.0), ode=ode))
    assert asked == drawn


def test_steps_are_lazy():
    steps = sample_steps(velocity_of, noise_of(1), RCMSchedule(4, 80.0), ode=False)
    assert next(steps).index == 0
    steps.close()


@pytest.mark.parametrize(
    ("sigma_max", "boundary", "experts"),
    [
        (200.0, 0.9, [0, 0, 1, 1]),
        (200.0, 0.5, [0, 0, 0, 0]),
        (200.0, 1.0, [1, 1, 1, 1]),
        (4.0, 0.9, [1, 1, 1, 1]),  # t rises to 0.934 at the second step; the switch is for good
    ],
)
def test_expert(sigma_max, boundary, experts):
    schedule = RCMSchedule(4, sigma_max)
    assert [schedule.expert(step, boundary) for step in range(4)] == experts


@pytest.mark.parametrize(
    ("num_steps", "sigma_max"), [(0, 80.0), (5, 80.0), (4, 0.0), (4, -1.0), (4, math.nan), (4, math.inf)]
)
def test_bad_schedules(num_steps, sigma_max):
    with pytest.raises(InvalidArgument):
        RCMSchedule(num_steps, sigma_max)
