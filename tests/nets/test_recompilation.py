"""What a server has compiled serves what it has not seen: other lengths, frame counts, resolutions and top-k."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from turbo_backend.config import MODELS, VAEConfig
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import KEEP_FP32, WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.vae import WanVAE
from turbo_backend.quantization import quantize_linears

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda")
#: Rows of scores are ranked in registers, in one of a few sizes.
SPECIALISED_BY_LENGTH = {"select_kernel"}
Compiled = Counter[str]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Compiles by kernel, from here on, as in a new process."""
    modules = [module for name, module in sys.modules.items() if name.startswith("turbo_kernels.")]
    for kernel in (value for module in modules for value in vars(module).values()):
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()
    counts: Compiled = Counter()
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: counts.update([fn.name]))
    return counts


def taken(counts: Compiled) -> Compiled:
    """Those since the last call."""
    result = counts.copy()
    counts.clear()
    return result


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("attention_type", ["sla", "sagesla"])
def test_denoiser(compiled: Compiled, attention_type: str, quantized: bool) -> None:
    config = replace(MODELS["Wan2.1-1.3B"].dit, num_layers=1)
    with torch.device("meta"):
        net = WanDiT(config)
    if quantized:
        quantize_linears(net)
    initialize_random(net, 0, device=CUDA, dtype=torch.bfloat16, keep_fp32=KEEP_FP32, generator_device=CUDA)
    net.prepare_for_inference()

    def compiles(size: tuple[int, int, int], topk: float, text_length: int) -> Compiled:
        latents, text = torch.randn(1, 16, *size, device=CUDA), torch.randn(1, 512, config.text_dim, device=CUDA)
        context = net.prepare_context(text, [text_length])
        attention = AttentionSettings(attention_type=attention_type, sla_topk=topk, provider="triton")
        net(latents, torch.tensor([932.0]), context, attention=attention)
        return taken(compiled)

    assert set(compiles((3, 60, 104), 0.1, 40)) > SPECIALISED_BY_LENGTH
    assert not compiles((3, 60, 104), 0.05, 41)
    for size in ((5, 60, 104), (3, 90, 160), (6, 70, 98)):
        first, *others = (compiles(size, topk, 50) for topk in (0.1, 0.15, 0.37))
        assert set(first) <= SPECIALISED_BY_LENGTH
        assert all(count == 1 for count in first.values())
        assert not any(others)


def test_vae_decoder(compiled: Compiled) -> None:
    """Tiles of pixels follow the resolution: each variant of a kernel compiles at most once more for a new one."""
    net = WanVAE(VAEConfig(base_dim=16)).to(CUDA, torch.bfloat16)

    def compiles(*size: int) -> Compiled:
        net.decode(torch.randn(1, 16, *size, device=CUDA))
        return taken(compiled)

    first = compiles(2, 60, 104)
    assert first
    assert not compiles(4, 60, 104)
    assert compiles(2, 50, 70) <= first
    assert not compiles(3, 50, 70)
