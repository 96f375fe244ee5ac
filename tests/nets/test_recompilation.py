"""What a server has compiled serves what it has not seen: other lengths, frame counts, resolutions and top-k.

Without a GPU, each launch is turned into what triton compiles for: constants, options, the types of all arguments, and
whether those that it specialises on are one, or multiples of 16. On a GPU its own compiles are counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from turbo_backend.config import MODELS, DiTConfig, VAEConfig
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import KEEP_FP32, WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.vae import WanVAE
from turbo_backend.nets.vae_decoder_fused import FusedDecoder
from turbo_backend.quantization import convert_to_fp8, quantize_linears
from turbo_backend.stages.warm_up import decode_presets, denoise_presets, list_presets
from turbo_kernels import conv3d, providers, sage_attention, upsample_conv

#: Rows of scores are ranked in registers, in one of a few sizes.
SPECIALISED_BY_LENGTH = {"select_kernel"}
Compiled = Counter[str]
Taken = Callable[[], Compiled]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def taken(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Taken:
    """Gives the compiles by kernel since it was last called, as in a new process."""
    counts: Compiled = Counter()
    if device.type == "cpu":
        seen: set[object] = set()

        def launch(self: Any, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
            key = specialisation(self, {**dict(zip(self.arg_names, arguments, strict=False)), **options})
            counts.update([] if key in seen else [self.__name__])
            seen.add(key)

        monkeypatch.setattr(JITFunction, "run", launch)
        monkeypatch.setattr(providers, "INTERPRETED", True)  # lets provider "triton" accept CPU tensors
        serve_as_on_hopper(monkeypatch)
    else:
        modules = [module for name, module in sys.modules.items() if name.startswith("turbo_kernels.")]
        for kernel in (value for module in modules for value in vars(module).values()):
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
        monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: counts.update([fn.name]))

    def take() -> Compiled:
        result = counts.copy()
        counts.clear()
        return result

    return take


@pytest.fixture
def shapes_alone(device: torch.device) -> torch.device:
    """Where nothing is computed: presets are too large for a CPU, but shapes alone decide what is compiled."""
    return torch.device("meta") if device.type == "cpu" else device


def specialisation(kernel: Any, arguments: dict[str, object]) -> tuple[object, ...]:
    """What two launches must share to run one compiled kernel."""
    parts: list[object] = [kernel.__name__]
    for parameter in kernel.params:
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr:
            parts.append(value)
        elif isinstance(value, torch.Tensor):
            parts.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, TensorDescriptor):
            parts.append((value.base.dtype, *value.block_shape))
        elif isinstance(value, int):
            width = 32 if value < 2**31 else 64
            parts.append((width, *(() if parameter.do_not_specialize else (value == 1, value % 16 == 0))))
        else:
            parts.append(type(value))
    return (*parts, *sorted(arguments.items(), key=str))


def serve_as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = sys.modules["turbo_kernels.attention"]
    sage = sys.modules[sage_attention.__module__]  # the package's attribute of that name is the function
    monkeypatch.setattr(
        attention, "attention_geometry", lambda kind, device: (64, 128) if kind == "sagesla" else (128, 64)
    )
    for name in ("is_hopper", "has_fp8", "has_tile_descriptors"):
        monkeypatch.setattr(sage, name, lambda device: True)
    for module in (conv3d, upsample_conv):
        monkeypatch.setattr(module, "has_large_shared_memory", lambda x: True)


def make_denoiser(device: torch.device, *, quantized: bool) -> WanDiT:
    """Two layers, narrow where nothing is computed."""
    if device.type == "cuda":
        config = replace(MODELS["Wan2.1-1.3B"].dit, num_layers=2)
    else:
        config = DiTConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=2, text_dim=16)
    with torch.device("meta"):
        net = WanDiT(config)
    if quantized:
        quantize_linears(net)
    initialize_random(net, 0, device=device, dtype=torch.bfloat16, keep_fp32=KEEP_FP32)
    if device.type == "cuda":
        net.prepare_for_inference()
    elif quantized:
        convert_to_fp8(net, fuse_gelu=True)
    net.fuse_projections()
    return net


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("attention_type", ["sla", "sagesla"])
def test_denoiser(taken: Taken, device: torch.device, attention_type: str, quantized: bool) -> None:
    net = make_denoiser(device, quantized=quantized)
    config = net.config

    def compiles(size: tuple[int, int, int], topk: float, text_length: int) -> Compiled:
        latents, text = torch.randn(1, 16, *size, device=device), torch.randn(1, 512, config.text_dim, device=device)
        context = net.prepare_context(text, [text_length], provider="triton")
        attention = AttentionSettings(attention_type=attention_type, sla_topk=topk, provider="triton")
        net(latents, torch.tensor([932.0]), context, attention=attention)
        return taken()

    assert set(compiles((3, 60, 104), 0.1, 40)) > SPECIALISED_BY_LENGTH
    assert not compiles((3, 60, 104), 0.05, 41)
    for size in ((5, 60, 104), (3, 90, 160), (6, 70, 98)):
        first, *others = (compiles(size, topk, 50) for topk in (0.1, 0.15, 0.37))
        assert set(first) <= SPECIALISED_BY_LENGTH
        assert all(count == 1 for count in first.values())
        assert not any(others)


def test_vae_decoder(taken: Taken, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of pixels follow the resolution: each variant of a kernel compiles at most once more for a new one."""
    net = WanVAE(VAEConfig(base_dim=16)).to(device, torch.bfloat16)
    if device.type == "cpu":
        fused = FusedDecoder(net.decoder, provider="triton")
        monkeypatch.setattr(
            net, "_decoder_for", lambda z, history: fused if history.has_started(net.decoder.conv1) else net.decoder
        )

    def compiles(*size: int) -> Compiled:
        net.decode(torch.randn(1, 16, *size, device=device))
        return taken()

    first = compiles(2, 6, 10)
    assert first
    assert not compiles(4, 6, 10)
    assert compiles(2, 5, 7) <= first
    assert not compiles(3, 5, 7)


@pytest.fixture
def wan_vae(shapes_alone: torch.device, monkeypatch: pytest.MonkeyPatch) -> WanVAE:
    with shapes_alone:
        net = WanVAE(MODELS["Wan2.1-1.3B"].vae).to(torch.bfloat16)
    if shapes_alone.type == "meta":
        fused = FusedDecoder(net.decoder, provider="triton")
        monkeypatch.setattr(
            net, "_decoder_for", lambda z, history: fused if history.has_started(net.decoder.conv1) else net.decoder
        )
    return net


def test_warm_up_compiles_the_decoder_for_every_preset(
    taken: Taken, shapes_alone: torch.device, wan_vae: WanVAE
) -> None:
    presets = list_presets(MODELS["Wan2.1-1.3B"])
    decode_presets(wan_vae, presets)
    compiled = taken()
    assert compiled
    print(f"{compiled.total()} kernels for {len(presets)} sizes")
    for parameters in presets:
        latents = torch.zeros(1, 16, 4, *parameters.latent_shape[1:], device=shapes_alone)
        wan_vae.decode(latents)
        assert not taken(), (parameters.width, parameters.height)


@pytest.mark.parametrize("quantized", [False, True])
def test_warm_up_compiles_the_denoiser_for_every_preset(
    taken: Taken, device: torch.device, shapes_alone: torch.device, quantized: bool
) -> None:
    net = make_denoiser(device, quantized=quantized).to(shapes_alone)
    net.fuse_projections()
    model = MODELS["Wan2.1-1.3B"]
    denoise_presets(net, list_presets(model, ("16:9",)), device=shapes_alone, dtype=torch.bfloat16, provider="triton")
    assert set(taken()) > SPECIALISED_BY_LENGTH
    context = net.prepare_context(torch.zeros(1, 1, net.config.text_dim), [1])
    for parameters in list_presets(model):
        for attention_type in ("sla", "sagesla"):
            latents = torch.zeros(1, 16, *parameters.latent_shape, device=shapes_alone)
            attention = AttentionSettings(attention_type=attention_type, sla_topk=0.15, provider="triton")
            net(latents, torch.tensor([932.0]), context, attention=attention)
            assert not taken(), (attention_type, parameters.width, parameters.height)
