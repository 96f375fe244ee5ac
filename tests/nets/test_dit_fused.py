"""The fused forward of the Wan transformer: interpreted beside the plain one, and at real width on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from turbo_backend.config import MODELS, DiTConfig
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import KEEP_FP32, WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.recorded import RecordedForwards
from turbo_backend.quantization import LinearWeights, convert_to_fp8, quantize_linears

CONFIG = DiTConfig(dim=256, ffn_dim=384, num_heads=2, num_layers=1, text_dim=48, text_len=24)
LENGTHS = [5, 24]
KINDS = ("float32", "int8", "fp8", "fp8 with fused GELU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make_net(kind: str) -> WanDiT:
    net = WanDiT(CONFIG)
    initialize_random(net, 0)
    if kind != "float32":
        quantize_linears(net)
    if kind.startswith("fp8"):
        convert_to_fp8(net, fuse_gelu=kind != "fp8")
    return net


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def evaluate(net: WanDiT, provider: str, chosen: slice = slice(None)) -> torch.Tensor:
    latents, text = draw(2, 16, 2, 4, 6, seed=1), draw(2, 24, CONFIG.text_dim, seed=2)
    context = net.prepare_context(text[chosen], LENGTHS[chosen], provider=provider)
    attention = AttentionSettings(attention_type="sla", sla_topk=0.5, provider=provider)
    return net(latents[chosen], torch.tensor([988.0, 608.0])[chosen], context, attention=attention)


def records_exactly(net: WanDiT, attention: AttentionSettings, device: str = "cpu") -> bool:
    """Whether recorded forwards give the bits of plain ones: prompts short and long, shapes by turns, several times."""
    recorded = RecordedForwards(net)
    text = draw(1, net.config.text_len, net.config.text_dim, seed=3).to(device)
    same = []
    for turn in range(3):
        for size in ((2, 4, 6), (1, 6, 4)):
            for length in (5, net.config.text_len, 9):
                latents = draw(1, 16, *size, seed=turn).to(device, net.dtype)
                context = net.prepare_context(text, [length], provider="triton")
                arguments = latents, torch.tensor([900.0 - turn]), context
                same.append(
                    torch.equal(recorded(*arguments, attention=attention), net(*arguments, attention=attention))
                )
    recorded.clear()
    return all(same)


def relative_rmse(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out - exact).norm() / exact.norm())


def report_interpreted() -> None:
    """Run in a child under TRITON_INTERPRET=1; prints JSON."""
    results = {}
    for kind in KINDS:
        net = make_net(kind)
        plain = evaluate(net, "reference")
        net.fuse_projections()
        fused = evaluate(net, "triton")
        results[kind] = {
            "kind": net.linear_kind,
            "error": relative_rmse(fused, plain),
            "recorded": records_exactly(net, AttentionSettings(attention_type="sla", sla_topk=0.5, provider="triton")),
            "alone": kind == "int8" or torch.equal(fused[1:], evaluate(net, "triton", slice(1, 2))),
        }
    print(json.dumps(results))


@pytest.mark.oracle
def test_fused_equals_plain_in_the_interpreter() -> None:
    """fp32: order of sums. Int8: single codes flip. e4m3: triton's interpreter drops a rounding's carry into the next
    binade, so that this tests the wiring alone; accuracy is the business of the GPU's tests."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    source = f"import runpy; runpy.run_path({str(Path(__file__))!r}, run_name='interpreted')['report_interpreted']()"
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-4000:]
    results = json.loads(child.stdout.splitlines()[-1])
    for kind, limit in zip(KINDS, (1e-5, 5e-3, 6e-2, 6e-2), strict=True):
        assert results[kind]["kind"] == kind.split()[0]
        assert results[kind]["error"] <= limit, kind
        assert results[kind]["alone"], kind
        assert results[kind]["recorded"], kind


@pytest.mark.parametrize("kind", KINDS)
def test_projections_lie_side_by_side_under_the_same_keys(kind: str) -> None:
    net = make_net(kind)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    attn = net.blocks[0].self_attn
    linears = (attn.q, attn.k, attn.v)
    assert LinearWeights.joined(linears) is None
    net.fuse_projections()
    joint = LinearWeights.joined(linears)
    assert joint is not None
    assert joint.weight.shape == (3 * CONFIG.dim, CONFIG.dim)
    parts = [LinearWeights.of(linear) for linear in linears]
    assert joint.weight.data_ptr() == parts[0].weight.data_ptr()
    assert torch.equal(joint.weight.float(), torch.cat([part.weight.float() for part in parts]))
    assert joint.bias is not None
    assert torch.equal(joint.bias, torch.cat([part.bias for part in parts if part.bias is not None]))
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key].float(), before[key].float()) for key in before)
    # Taken apart by loading; the products stay right.
    net.load_state_dict(before, strict=True, assign=True)
    assert LinearWeights.joined(linears) is None


def test_nothing_changes_on_the_cpu() -> None:
    net = make_net("int8")
    before = {key: tensor.data_ptr() for key, tensor in net.state_dict().items()}
    net.prepare_for_inference()
    assert net.linear_kind == "int8"
    assert {key: tensor.data_ptr() for key, tensor in net.state_dict().items()} == before


def test_unlike_linears_are_not_joined() -> None:
    with pytest.raises(TypeError, match="linear"):
        LinearWeights.of(nn.LayerNorm(4))


# --- at real width on a GPU ---


def make_wide(dtype: torch.dtype) -> WanDiT:
    with torch.device("meta"):
        net = WanDiT(replace(MODELS["Wan2.1-1.3B"].dit, num_layers=3))
    cuda = torch.device("cuda")
    initialize_random(net, 0, device=cuda, dtype=dtype, keep_fp32=KEEP_FP32, generator_device=cuda)
    return net


def run_wide(
    net: WanDiT, size: tuple[int, int, int], attention_type: str, provider: str = "triton", chosen: slice = slice(None)
) -> torch.Tensor:
    latents = draw(2, 16, *size, seed=1)[chosen].cuda()
    text = draw(2, 512, net.config.text_dim, seed=2)[chosen].cuda()
    context = net.prepare_context(text, [60, 200][chosen], provider=provider)
    attention = AttentionSettings(attention_type=attention_type, provider=provider)
    return net(latents, torch.tensor([932.0, 608.0])[chosen], context, attention=attention)


@pytest.mark.gpu
@needs_gpu
def test_error_of_the_fused_forward_on_the_gpu() -> None:
    """bf16: at most twice that of plain PyTorch in bf16. 8-bit: 3.7 % a product, thinned by the residual stream."""
    size = (3, 60, 104)
    exact = run_wide(make_wide(torch.float32), size, "original", "reference")
    net = make_wide(torch.bfloat16)
    plain = relative_rmse(run_wide(net, size, "original", "reference"), exact)
    net.prepare_for_inference()
    assert net.linear_kind == "bfloat16"
    assert relative_rmse(run_wide(net, size, "original"), exact) <= 2 * plain
    quantize_linears(net)
    assert relative_rmse(run_wide(net, size, "original"), exact) <= 0.06
    net.prepare_for_inference()
    assert net.linear_kind == ("fp8" if torch.cuda.get_device_capability() >= (8, 9) else "int8")
    assert relative_rmse(run_wide(net, size, "original"), exact) <= 0.06


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("attention_type", ["original", "sla", "sagesla"])
def test_batch_invariance_at_real_size(attention_type: str, quantized: bool) -> None:
    """Bit for bit at 480p and 81 frames, with unlike texts and timesteps."""
    net = make_wide(torch.bfloat16)
    if quantized:
        quantize_linears(net)
    net.prepare_for_inference()
    together = run_wide(net, (21, 60, 104), attention_type)
    assert together.isfinite().all()
    for i in range(2):
        alone = run_wide(net, (21, 60, 104), attention_type, chosen=slice(i, i + 1))
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("attention_type", ["original", "sla", "sagesla"])
@pytest.mark.parametrize("quantized", [False, True])
def test_recorded_forwards_give_the_same_bits(attention_type: str, quantized: bool) -> None:
    net = make_wide(torch.bfloat16)
    if quantized:
        quantize_linears(net)
    net.prepare_for_inference()
    assert records_exactly(net, AttentionSettings(attention_type=attention_type, provider="triton"), "cuda")


@pytest.mark.gpu
@needs_gpu
def test_without_room_nothing_is_recorded() -> None:
    net = make_wide(torch.bfloat16)
    net.prepare_for_inference()
    attention = AttentionSettings(attention_type="sagesla", provider="triton")
    recorded = RecordedForwards(net, room=2 * torch.cuda.mem_get_info()[1])
    context = net.prepare_context(draw(1, 512, net.config.text_dim, seed=3).cuda(), [60])
    held = []
    for turn in range(3):
        recorded(draw(1, 16, 2, 8, 8, seed=turn).cuda(), torch.tensor([900.0]), context, attention=attention)
        held.append(torch.cuda.memory_allocated())
    assert held[1] == held[2]
    assert not recorded._recordings
