"""Two experts in one denoiser: which one runs when, the numbers, and the weights that are swapped between them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from turbo_backend.checkpoints import DenoiserLayout
from turbo_backend.config import ModelConfig
from turbo_backend.errors import InvalidArgument, TurboError
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.noise import draw_noise
from turbo_backend.stages.denoiser import DenoiserStage
from turbo_backend.stages.denoiser_request import DenoisedStep, DenoiseRequest
from turbo_backend.stages.experts import Experts, ResidentExperts, SwappedExperts

MakeExperts = Callable[[], list[WanDiT]]
CPU = torch.device("cpu")
DENSE = {"ATTENTION_TYPE": "original", "NUM_FRAMES": 5}


def make_stage(
    experts: Experts,
    model: ModelConfig,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    provider: str = "reference",
) -> DenoiserStage:
    return DenoiserStage(
        experts,
        model,
        device=device,
        dtype=dtype,
        provider=provider,
        max_batch_size=4,
        max_batch_tokens=10_000,
        fingerprint="test",
        identity={},
    )


def make_request(model: ModelConfig, **values: object) -> DenoiseRequest:
    generator = torch.Generator().manual_seed(int(values.get("SEED", 1)))  # type: ignore[call-overload]
    image_latents = torch.randn(20, 2, 18, 32, generator=generator)
    return DenoiseRequest(
        text_embeddings=torch.randn(16, model.dit.text_dim, generator=generator),
        text_length=5,
        values={**DENSE, "SEED": 1, **values},
        report={"stages": {}, "image": {"width": 256, "height": 144}},
        image_latents=image_latents,
    )


@pytest.fixture
def stage(image_model: ModelConfig, make_experts: MakeExperts) -> DenoiserStage:
    return make_stage(ResidentExperts(make_experts()), image_model)


def run(stage: DenoiserStage, *requests: DenoiseRequest | TurboError) -> list[DenoisedStep | TurboError]:
    """The last update of each request."""
    last = dict(stage.denoise(requests))
    return [last[index] for index in range(len(requests))]


def restated(
    nets: list[WanDiT], request: DenoiseRequest, *, boundary: float, ode: bool
) -> tuple[np.ndarray, list[int]]:
    """The rCM sampler with the switch of experts, written down again with numpy in float64."""
    angles = [np.arctan(200.0), 1.5, 1.4, 1.0, 0.0]
    times = [np.sin(angle) / (np.sin(angle) + np.cos(angle)) for angle in angles]
    assert request.image_latents is not None
    noise = [draw_noise(1, step, (16, 2, 18, 32)).double().numpy() for step in range(5)]
    x = noise[0] * times[0]
    ran, low = [], False
    for step in range(4):
        t, following = times[step], times[step + 1]
        low = low or t < boundary
        ran.append(int(low))
        net = nets[int(low)]
        context = net.prepare_context(request.text_embeddings[None], [request.text_length])
        inputs = torch.cat([torch.from_numpy(x).float(), request.image_latents])[None]
        told = torch.tensor([np.float32(t) * np.float64(1000)]).bfloat16().double()
        settings = AttentionSettings(attention_type="original", sla_topk=0.1, provider="reference")
        v = net(inputs, told, context, attention=settings)[0].double().numpy()
        x = x - (t - following) * v if ode else (1 - following) * (x - t * v) + following * noise[step + 1]
    return x, ran


@pytest.mark.oracle
@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize(
    ("boundary", "expected"), [(0.9, [0, 0, 1, 1]), (0.5, [0, 0, 0, 0]), (0.94, [0, 1, 1, 1]), (1.0, [1, 1, 1, 1])]
)
def test_experts_and_updates_match_the_restatement(
    stage: DenoiserStage,
    image_model: ModelConfig,
    make_experts: MakeExperts,
    boundary: float,
    expected: list[int],
    ode: bool,
) -> None:
    request = make_request(image_model, BOUNDARY=boundary, ODE=ode)
    latents, ran = restated(make_experts(), request, boundary=boundary, ode=ode)
    (step,) = run(stage, request)
    assert isinstance(step, DenoisedStep)
    assert step.latents is not None
    assert step.report is not None
    assert step.report["stages"]["denoiser"]["experts"] == ran == expected  # type: ignore[index]
    np.testing.assert_allclose(step.latents.numpy(), latents, rtol=0, atol=1e-4 * np.abs(latents).max())


@pytest.mark.parametrize(("num_steps", "experts"), [(1, [0]), (2, [0, 0]), (3, [0, 0, 1])])
def test_low_noise_expert_that_is_never_reached_is_reported(
    stage: DenoiserStage, image_model: ModelConfig, num_steps: int, experts: list[int]
) -> None:
    (step,) = run(stage, make_request(image_model, NUM_STEPS=num_steps))
    assert isinstance(step, DenoisedStep)
    assert step.report is not None
    assert step.report["stages"]["denoiser"]["experts"] == experts  # type: ignore[index]
    notes = step.report["notes"]
    assert isinstance(notes, list)
    assert len(notes) == (1 not in experts)
    assert all("low-noise expert never ran" in note for note in notes)


def mixed(model: ModelConfig) -> list[DenoiseRequest | TurboError]:
    return [
        make_request(model, SEED=1),
        make_request(model, SEED=2, NUM_STEPS=2),
        make_request(model, SEED=3, BOUNDARY=0.87),  # the same experts as the default gives
        TurboError("came broken"),
        make_request(model, SEED=4, BOUNDARY=0.95, ODE=True),
        make_request(model, SEED=5, NUM_STEPS=1, SIGMA_MAX=2.0),  # the low-noise expert alone
        make_request(model, SEED=6, NUM_STEPS=3),
    ]


def test_a_mixed_batch_gives_what_each_gives_alone(stage: DenoiserStage, image_model: ModelConfig) -> None:
    requests = mixed(image_model)
    together = run(stage, *requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = run(stage, request)
        assert isinstance(alone, DenoisedStep) == isinstance(found, DenoisedStep)
        if isinstance(alone, DenoisedStep) and isinstance(found, DenoisedStep):
            assert alone.latents is not None
            assert found.latents is not None
            assert torch.equal(alone.latents, found.latents)
    first, _, third, *_ = together
    assert isinstance(first, DenoisedStep)
    assert isinstance(third, DenoisedStep)
    for step in (first, third):
        assert step.report is not None
        assert step.report["stages"]["denoiser"]["batch_size"] > 1  # type: ignore[index]


def make_swapped(model: ModelConfig, make_experts: MakeExperts) -> SwappedExperts:
    return SwappedExperts([lambda net=net: net for net in make_experts()], CPU)  # type: ignore[misc]


def test_swapped_experts_give_the_same_bits(
    stage: DenoiserStage, image_model: ModelConfig, make_experts: MakeExperts
) -> None:
    swapped = make_stage(make_swapped(image_model, make_experts), image_model)
    for _ in range(2):  # the second batch begins where the first left the weights
        for one, other in zip(run(stage, *mixed(image_model)), run(swapped, *mixed(image_model)), strict=True):
            if isinstance(one, DenoisedStep) and isinstance(other, DenoisedStep):
                assert one.latents is not None
                assert other.latents is not None
                assert torch.equal(one.latents, other.latents)
            else:
                assert isinstance(one, TurboError)
                assert isinstance(other, TurboError)


class CountingExperts(SwappedExperts):
    """Counts how often a whole network's weights are written over."""

    num_swaps = 0

    def _replace(self, group: str, expert: int) -> None:
        self.num_swaps += group == ""
        super()._replace(group, expert)


def test_a_batch_changes_experts_once_each_way(image_model: ModelConfig, make_experts: MakeExperts) -> None:
    experts = CountingExperts([lambda net=net: net for net in make_experts()], CPU)  # type: ignore[misc]
    experts.select(0)
    experts.num_swaps = 0
    run(make_stage(experts, image_model), *mixed(image_model))
    assert experts.num_swaps == 2


def test_weights_are_those_of_the_selected_expert(image_model: ModelConfig, make_experts: MakeExperts) -> None:
    nets, experts = make_experts(), make_swapped(image_model, make_experts)
    for expert in (0, 1, 1, 0):
        for name, tensor in experts.select(expert).state_dict().items():
            assert torch.equal(tensor, nets[expert].state_dict()[name]), name
    # A run that fails halfway through a switch leaves a mixture, which the next selection replaces.
    experts.select(0)
    experts.switch_during_next_run(1)
    experts._replace_incoming("blocks.0")
    for name, tensor in experts.select(0).state_dict().items():
        assert torch.equal(tensor, nets[0].state_dict()[name]), name


def test_images_that_do_not_belong_are_refused(stage: DenoiserStage, image_model: ModelConfig) -> None:
    good = make_request(image_model)
    without = DenoiseRequest(
        text_embeddings=good.text_embeddings, text_length=5, values=DENSE, report={"stages": {}}, image_latents=None
    )
    shaped = DenoiseRequest(
        text_embeddings=good.text_embeddings,
        text_length=5,
        values=DENSE,
        report=good.report,
        image_latents=torch.zeros(20, 2, 18, 30),
    )
    infinite = DenoiseRequest(
        text_embeddings=good.text_embeddings,
        text_length=5,
        values=DENSE,
        report=good.report,
        image_latents=torch.full((20, 2, 18, 32), torch.inf),
    )
    outcomes = run(stage, without, shaped, infinite)
    for outcome, says in zip(outcomes, ("IMAGE = None", r"IMAGE_LATENTS = [20, 2, 18, 30]", "finite"), strict=True):
        assert isinstance(outcome, InvalidArgument)
        assert says in str(outcome)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("quant_linear", [False, True])
def test_swapped_experts_give_the_same_bits_on_the_gpu(image_model: ModelConfig, quant_linear: bool) -> None:
    device = torch.device("cuda", 0)

    def load(seed: int) -> WanDiT:
        layout = DenoiserLayout(image_model.dit, quant_linear=quant_linear)
        net = layout.build()
        initialize_random(net, seed, device=device, dtype=torch.bfloat16, keep_fp32=layout.keep_fp32)
        net.prepare_for_inference()
        return net

    def stage_of(experts: Experts) -> DenoiserStage:
        return make_stage(experts, image_model, device=device, dtype=torch.bfloat16, provider="triton")

    resident = stage_of(ResidentExperts([load(0), load(1)]))
    swapped = stage_of(SwappedExperts([lambda: load(0), lambda: load(1)], device))
    for _ in range(3):
        for one, other in zip(run(resident, *mixed(image_model)), run(swapped, *mixed(image_model)), strict=True):
            if isinstance(one, DenoisedStep) and isinstance(other, DenoisedStep):
                assert one.latents is not None
                assert other.latents is not None
                assert torch.equal(one.latents, other.latents)
            else:
                assert isinstance(one, TurboError)
                assert str(one) == str(other) == "came broken"
