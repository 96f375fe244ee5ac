"""The warm-up visits every size that is served and fits, and leaves the others out aloud."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from turbo_backend.config import MODELS, ModelConfig
from turbo_backend.memory import decoder_bytes
from turbo_backend.nets.attention import ATTENTION_TYPES, AttentionSettings
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.vae import WanVAE
from turbo_backend.parameters import ASPECT_RATIOS, RESOLUTIONS, GenerationParameters
from turbo_backend.settings import Settings
from turbo_backend.stages.sampling import shrink
from turbo_backend.stages.warm_up import (
    decode_presets,
    denoise_presets,
    encode_presets,
    fitting,
    list_presets,
    wait_for_room,
    whole_server,
)

GIB = 2**30
CPU = torch.device("cpu")


def sizes(presets: list[GenerationParameters]) -> list[tuple[int, int]]:
    return [(parameters.width, parameters.height) for parameters in presets]


def on_gpu(model: str, **variables: str) -> Settings:
    """What a GPU is served with: its dtype, though this process may have none."""
    given = {"TURBO_MODEL": model, "TURBO_DTYPE": "bfloat16", "TURBO_WEIGHTS": "random", **variables}
    return Settings.from_environment(given)


@pytest.fixture(scope="module")
def vae(image_model: ModelConfig) -> WanVAE:
    net = WanVAE(image_model.vae)
    initialize_random(net, 0, device=CPU, dtype=torch.float32)
    return net.eval()


@pytest.fixture
def small_presets(image_model: ModelConfig) -> list[GenerationParameters]:
    return list_presets(image_model)


@pytest.fixture
def calls() -> Iterator[Callable[[nn.Module], list[tuple[int, ...]]]]:
    """`calls(module)` gives the shapes of the module's first arguments from now on."""
    handles = []

    def record(module: nn.Module) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        handles.append(module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape))))
        return shapes

    yield record
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_every_size_is_listed_once(name: str) -> None:
    model = MODELS[name]
    served = {RESOLUTIONS[resolution][ratio] for resolution in model.resolutions for ratio in ASPECT_RATIOS}
    listed = sizes(list_presets(model))
    assert set(listed) == served
    assert len(listed) == len(served)
    assert {p.num_frames for p in list_presets(model)} == {model.default_num_frames}


def test_what_does_not_fit_is_left_out_aloud(caplog: pytest.LogCaptureFixture) -> None:
    settings = on_gpu("Wan2.1-1.3B", TURBO_QUANT_LINEAR="true", TURBO_QUANT_TEXT_ENCODER="true")
    model = settings.served_model
    presets = list_presets(model, ("16:9",))

    def needed(parameters: GenerationParameters) -> int:
        return decoder_bytes(model.vae, parameters, torch.bfloat16, device=torch.device("cuda"))

    def fit(capacity: int, free: int) -> list[tuple[int, int]]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            chosen = fitting(presets, settings, capacity=capacity, needed=needed, free=lambda: free)
            return sizes(list(chosen))

    assert fit(80 * GIB, 60 * GIB) == sizes(presets)
    assert not caplog.messages
    at_480p = [(832, 480), (640, 384), (768, 432)]
    for capacity, free in ((20 * GIB, 20 * GIB), (80 * GIB, 8 * GIB)):
        assert fit(capacity, free) == at_480p
        assert [message.split()[0] for message in caplog.messages] == ["1280x720", "1280x704"]
    assert fit(8 * GIB, 8 * GIB) == []


def test_warm_up_waits_for_stages_that_load_but_not_for_ever() -> None:
    seen = iter([1, 2, 2, 7, 9])
    wait_for_room(6, lambda: next(seen), pause=0.001)
    assert next(seen) == 9, "it went on as soon as there was room"
    wait_for_room(6, lambda: 5, seconds=0.01, pause=0.001)


def test_experts_that_may_be_swapped_count_once() -> None:
    open_, resident = (on_gpu("Wan2.2-A14B", TURBO_EXPERT_PLACEMENT=placement) for placement in ("auto", "resident"))
    parameters = list_presets(open_.served_model)[0]
    assert whole_server(resident, parameters) - whole_server(open_, parameters) > 20 * GIB


def test_denoiser_runs_each_preset_with_each_attention(
    image_model: ModelConfig,
    make_experts: Callable[[], list[WanDiT]],
    small_presets: list[GenerationParameters],
    calls: Callable[[nn.Module], list[tuple[int, ...]]],
) -> None:
    net = make_experts()[0]
    shapes, blocks = calls(net), [calls(block) for block in net.blocks]
    denoise_presets(net, small_presets, device=CPU, dtype=torch.float32, provider="reference")
    assert shapes == [
        (1, 36, 2, height // 8, width // 8) for width, height in sizes(small_presets) for _ in ATTENTION_TYPES
    ]
    assert [len(ran) for ran in blocks] == [len(shapes)] * 2


def test_vae_decodes_a_preview_and_two_latent_frames_of_each_preset(
    vae: WanVAE, small_presets: list[GenerationParameters], calls: Callable[[nn.Module], list[tuple[int, ...]]]
) -> None:
    shapes = calls(vae.decoder)
    decode_presets(vae, small_presets)
    full = [(1, height // 8, width // 8, 16) for width, height in sizes(small_presets)]
    assert shapes == [size for size in full for _ in range(3)], "previews of 144p are as large as it is"


def test_previews_are_warmed_up_in_their_own_size(
    vae: WanVAE, calls: Callable[[nn.Module], list[tuple[int, ...]]]
) -> None:
    (parameters,) = list_presets(dataclasses.replace(MODELS["tiny"], resolutions=("480",)), ("1:1",))
    shapes = calls(vae.decoder)
    decode_presets(vae, [parameters])
    previewed = shrink(torch.zeros(16, 3, *parameters.latent_shape[1:]))
    assert shapes[0] == (1, *previewed.shape[2:], 16) == (1, 30, 30, 16)
    assert shapes[1:] == [(1, 60, 60, 16)] * 2


def test_image_encoder_sees_each_preset(
    vae: WanVAE, small_presets: list[GenerationParameters], calls: Callable[[nn.Module], list[tuple[int, ...]]]
) -> None:
    shapes = calls(vae.encoder.conv1)
    encode_presets(vae, small_presets)
    assert {shape[1:3] for shape in shapes} == {(height, width) for width, height in sizes(small_presets)}


def test_a_few_blocks_are_the_first_ones(make_experts: Callable[[], list[WanDiT]], image_model: ModelConfig) -> None:
    """What the warm-up runs is the network that has these blocks alone."""
    net = make_experts()[0]
    short = WanDiT(dataclasses.replace(image_model.dit, num_layers=1))
    short.load_state_dict({name: net.state_dict()[name] for name in short.state_dict()})
    latents = torch.randn(1, 36, 2, 18, 32, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(1))
    attention = AttentionSettings(attention_type="original", provider="reference")
    timesteps = torch.tensor([900.0])
    expected = short(latents, timesteps, short.prepare_context(text, [5]), attention=attention)
    actual = net(latents, timesteps, net.prepare_context(text, [5]), attention=attention, num_blocks=1)
    assert torch.equal(actual, expected)
    assert not torch.equal(net(latents, timesteps, net.prepare_context(text, [5]), attention=attention), actual)
