"""Attention kernels against their references, and the references against independent formulas."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import turbo_kernels as kernels
from turbo_kernels.attention import sagesla_attention_fp8
from turbo_kernels.linear_attention import linear_attention_reference
from turbo_kernels.sage_attention import sage_attention_reference
from turbo_kernels.self_check_ops import relative_error, score_lost
from turbo_kernels.sparse_attention import sparse_attention_reference

pytestmark = pytest.mark.oracle
Draw = Callable[[int, int, int, int], tuple[torch.Tensor, ...]]
GEOMETRIES = [(128, 64), (64, 128)]
LENGTHS = [63, 111, 200, 257]


def max_relative_difference(out: torch.Tensor, reference: torch.Tensor) -> float:
    """max |out - reference| / max |reference|; NaN, which no comparison passes, where out was not written."""
    return float((out.float() - reference.float()).abs().max() / reference.float().abs().max())


def limit(dtype: torch.dtype) -> float:
    """fp32: order of sums. bf16: the result's own rounding, 2^-9, and that of P and phi before their products."""
    return 1e-5 if dtype == torch.float32 else 1e-2


@pytest.mark.parametrize(("L", "topk"), [(63, 0.01), (111, 0.5), (200, 0.01), (257, 0.01), (257, 0.6)])
@pytest.mark.parametrize(("block_q", "block_k"), GEOMETRIES)
def test_block_map(qkv: Draw, device: torch.device, L: int, block_q: int, block_k: int, topk: float) -> None:
    q, k, _ = qkv(2, L, 2, 64)
    geometry = {"block_q": block_q, "block_k": block_k, "topk": topk}
    chosen = kernels.block_map(q, k, **geometry, provider="triton")
    expected = kernels.block_map(q, k, **geometry, provider="reference")
    num_k_blocks = -(-L // block_k)
    assert chosen.num_selected == max(1, int(topk * num_k_blocks))
    assert chosen.indices.dtype == torch.int32
    assert (chosen.indices.diff(dim=-1) > 0).all()
    assert ((chosen.indices >= 0) & (chosen.indices < num_k_blocks)).all()
    if device.type == "cpu":
        assert torch.equal(chosen.indices, expected.indices)
    assert score_lost(chosen, q, k) <= 1e-5


def test_block_map_gives_ties_to_the_lower_block(device: torch.device, dtype: torch.dtype) -> None:
    q = torch.ones(1, 640, 1, 64, device=device, dtype=dtype)
    # The mean of k is 1, and all sums are of integers: the ties are exact in whatever order a machine adds.
    k = torch.zeros(1, 640, 1, 64, device=device, dtype=dtype)
    k[:, 192:256] = 5.0
    k[:, 512:576] = 5.0
    for provider in ("triton", "reference"):
        chosen = kernels.block_map(q, k, block_q=128, block_k=64, topk=0.4, provider=provider)
        assert chosen.indices.unique(dim=2).flatten().tolist() == [0, 1, 3, 8]


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize(("block_q", "block_k"), GEOMETRIES)
def test_sparse_attention(qkv: Draw, dtype: torch.dtype, L: int, block_q: int, block_k: int) -> None:
    q, k, v = qkv(2, L, 2, 128 if L == 111 else 64)
    chosen = kernels.block_map(q, k, block_q=block_q, block_k=block_k, topk=0.6)
    out = kernels.sparse_attention(q, k, v, chosen, provider="triton")
    assert out.dtype == dtype
    assert max_relative_difference(out, sparse_attention_reference(q, k, v, chosen)) <= limit(dtype)


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize(("block_q", "block_k"), GEOMETRIES)
def test_sage_attention(
    qkv: Draw, device: torch.device, dtype: torch.dtype, L: int, block_q: int, block_k: int
) -> None:
    q, k, v = qkv(2, L, 2, 128 if L == 111 else 64)
    chosen = kernels.block_map(q, k, block_q=block_q, block_k=block_k, topk=0.6)
    out = kernels.sage_attention(q, k, v, chosen, provider="triton")
    modelled = sage_attention_reference(q, k, v, chosen)
    exact = sparse_attention_reference(q, k, v, chosen)
    if device.type == "cpu":
        # The reference rounds as the kernel does; a value on the edge may still fall to the other side.
        assert max_relative_difference(out, modelled) <= 1e-4
        assert relative_error(out, exact) <= 0.03  # int8 q and k, as the self-check explains
    else:
        assert relative_error(out, modelled) <= 0.01  # e4m3 steps are 2^-4 wide: an edge costs more
        assert relative_error(out, exact) <= 0.08  # e4m3 P and V besides


@pytest.mark.parametrize("L", LENGTHS)
def test_linear_attention(qkv: Draw, dtype: torch.dtype, L: int) -> None:
    q, k, v = qkv(2, L, 2, 128 if L == 111 else 64)
    out = kernels.linear_attention(q, k, v, provider="triton")
    assert max_relative_difference(out, linear_attention_reference(q, k, v)) <= limit(dtype)


def test_linear_attention_over_several_chunks(qkv: Draw, dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 1700, 1, 64)
    out = kernels.linear_attention(q, k, v, provider="triton")
    assert max_relative_difference(out, linear_attention_reference(q, k, v)) <= limit(dtype)


@pytest.mark.parametrize("attention_type", ["sla", "sagesla"])
@pytest.mark.parametrize(("L", "D"), [(111, 128), (257, 64)])
def test_sla_attention(
    qkv: Draw, device: torch.device, dtype: torch.dtype, attention_type: str, L: int, D: int
) -> None:
    q, k, v = qkv(2, L, 2, D)
    weight, bias = torch.randn(D, D, device=device) / D**0.5, 0.1 * torch.randn(D, device=device)
    arguments = (q, k, v, weight.to(dtype), bias.to(dtype))
    out = kernels.sla_attention(*arguments, attention_type=attention_type, topk=0.5, provider="triton")
    reference = kernels.sla_attention(*arguments, attention_type=attention_type, topk=0.5, provider="reference")
    assert out.dtype == dtype
    if attention_type == "sla" or device.type == "cpu":
        assert max_relative_difference(out, reference) <= max(limit(dtype), 1e-4 * (attention_type == "sagesla"))
    else:
        assert relative_error(out, reference) <= 0.02


@pytest.mark.parametrize(("L", "D"), [(111, 128), (257, 64)])
def test_sagesla_attention_fp8(qkv: Draw, device: torch.device, dtype: torch.dtype, L: int, D: int) -> None:
    """One scale a sample, that of the bound, which nothing reaches; the values those of the op in 16 bits, rounded."""
    q, k, v = qkv(2, L, 3, D)
    v = v * torch.tensor([1.0, 5.0], device=device, dtype=dtype)[:, None, None, None]
    weight, bias = torch.randn(D, D, device=device) / D**0.5, 0.1 * torch.randn(D, device=device)
    arguments = (q, k, v, weight.to(dtype), bias.to(dtype))
    rows = sagesla_attention_fp8(*arguments, topk=0.5, provider="triton")
    reference = sagesla_attention_fp8(*arguments, topk=0.5, provider="reference")
    assert rows.values.shape == (2, L, 3 * D)
    assert torch.allclose(rows.scale, reference.scale, rtol=1e-5)
    assert bool((rows.scale == rows.scale[:, :1]).all())
    exact = kernels.sla_attention(*arguments, attention_type="sagesla", topk=0.5, provider="reference").flatten(2)
    assert bool((exact.abs().float().amax((1, 2)) < 448 * rows.scale[:, 0]).all())
    # 2.65 % is the rounding; on a GPU 2 % may come from edges inside, and the interpreter rounds towards zero.
    assert relative_error(rows.dequantize(), exact) <= (0.09 if device.type == "cpu" else 0.034)
    assert relative_error(reference.dequantize(), exact) <= 0.03
    alone = sagesla_attention_fp8(*(x[1:] if x.ndim == 4 else x for x in arguments), topk=0.5, provider="triton")
    assert torch.equal(rows.values[1:].view(torch.uint8), alone.values.view(torch.uint8))


@pytest.mark.parametrize("provider", ["triton", "reference"])
def test_all_blocks_selected_is_dense_attention(qkv: Draw, dtype: torch.dtype, provider: str) -> None:
    q, k, v = qkv(1, 200, 2, 64)
    chosen = kernels.block_map(q, k, block_q=128, block_k=64, topk=1.0, provider=provider)
    out = kernels.sparse_attention(q, k, v, chosen, provider=provider)
    assert max_relative_difference(out, kernels.dense_attention(q, k, v)) <= limit(dtype)


@pytest.mark.parametrize("attention_type", ["original", "sla", "sagesla"])
@pytest.mark.parametrize("provider", ["triton", "reference"])
def test_a_sample_does_not_see_its_batch(
    qkv: Draw, device: torch.device, dtype: torch.dtype, attention_type: str, provider: str
) -> None:
    q, k, v = qkv(3, 200, 2, 64)
    weight, bias = torch.randn(64, 64, device=device, dtype=dtype), torch.randn(64, device=device, dtype=dtype)

    def attend(chosen: slice) -> torch.Tensor:
        samples = q[chosen], k[chosen], v[chosen]
        if attention_type == "original":
            return kernels.dense_attention(*samples, provider=provider)
        return kernels.sla_attention(*samples, weight, bias, attention_type=attention_type, topk=0.5, provider=provider)

    batch = attend(slice(None))
    for i in range(3):
        assert torch.equal(batch[i : i + 1], attend(slice(i, i + 1)))


@pytest.mark.parametrize(("head_dim", "provider"), [(64, "triton"), (64, "reference"), (128, "reference")])
def test_self_check(device: torch.device, head_dim: int, provider: str) -> None:
    outcome = kernels.self_check(device, head_dim, provider)
    assert outcome.passed, outcome
    assert set(outcome.details) == set(outcome.limits)
    assert {"sage_attention", "int8_linear", "rms_norm_rope", "residual_norm", "text_attention"} <= set(outcome.details)
    rounds_e4m3 = provider == "reference" or (device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9))
    assert ("fp8_linear" in outcome.details) == ("residual_norm in e4m3" in outcome.details) == rounds_e4m3


def test_self_check_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["turbo_kernels.self_check_ops"]
    monkeypatch.setattr(module, "linear_attention", lambda q, k, v, provider: -v)
    outcome = kernels.self_check("cpu", 64, "reference")
    assert not outcome.passed
    assert [name for name in outcome.details if outcome.details[name] > outcome.limits[name]] == ["linear_attention"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_self_check_at_head_dim_128() -> None:
    outcome = kernels.self_check("cuda", 128, "triton")
    assert outcome.passed, outcome


def test_tile_descriptors_change_no_bit(qkv: Draw, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(1, 200, 2, 64)
    chosen = kernels.block_map(q, k, block_q=64, block_k=128, topk=1.0)
    module = sys.modules["turbo_kernels.sage_attention"]
    possible = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)
    outputs = []
    for used in (False, possible):
        monkeypatch.setattr(module, "has_tile_descriptors", lambda _, used=used: used)
        outputs.append(kernels.sage_attention(q, k, v, chosen, provider="triton"))
    assert torch.equal(*outputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("D", [64, 128])
def test_error_is_at_most_twice_that_of_pytorch_in_bf16(D: int) -> None:
    q, k, v = (torch.randn(1, 1000, 3, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    everything = kernels.block_map(q, k, block_q=128, block_k=64, topk=1.0)
    out = kernels.sparse_attention(q, k, v, everything).float()
    exact = kernels.dense_attention(q.float(), k.float(), v.float())
    plain = kernels.dense_attention(q, k, v).float()
    assert (out - exact).norm() <= 2 * (plain - exact).norm()


def masked_softmax_sla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, topk: float
) -> torch.Tensor:
    """`sla` restated over the whole L x L matrix in float64 with loops, sharing no code with the package."""
    B, L, H, D = q.shape
    out = torch.zeros(B, L, H, D, dtype=torch.float64)
    starts_q, starts_k = range(0, L, 128), range(0, L, 64)
    for b in range(B):
        for h in range(H):
            Q, K, V = (x[b, :, h].double() for x in (q, k, v))
            smooth = K - K.mean(0)
            mask = torch.full((L, L), float("-inf"), dtype=torch.float64)
            for i in starts_q:
                means = torch.stack([smooth[j : j + 64].mean(0) for j in starts_k])
                scores = means @ Q[i : i + 128].mean(0)
                for j in scores.topk(max(1, int(topk * len(starts_k)))).indices.tolist():
                    mask[i : i + 128, j * 64 : j * 64 + 64] = 0.0
            sparse = F.softmax(Q @ K.T / D**0.5 + mask, dim=-1) @ V
            phi_q, phi_k = F.softmax(Q, -1), F.softmax(K, -1)
            weights = phi_q @ phi_k.T
            linear = (weights @ V) / (1e-5 + weights.sum(-1, keepdim=True))
            out[b, :, h] = sparse + linear @ weight.double().T + bias.double()
    return out


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("topk", [0.01, 0.5, 1.0])
def test_reference_against_masked_softmax(L: int, topk: float) -> None:
    q, k, v = torch.randn(3, 2, L, 2, 64)
    weight, bias = torch.randn(64, 64) / 8, torch.randn(64)
    out = kernels.sla_attention(q, k, v, weight, bias, attention_type="sla", topk=topk, provider="reference")
    assert max_relative_difference(out, masked_softmax_sla(q, k, v, weight, bias, topk)) <= 1e-5


def test_sage_reference_stays_near_exact_attention() -> None:
    q, k, v = torch.randn(3, 1, 300, 2, 64)
    chosen = kernels.block_map(q, k, block_q=64, block_k=128, topk=0.7)
    exact = sparse_attention_reference(q, k, v, chosen)
    for pv_dtype, bound in ((torch.float16, 0.03), (torch.float8_e4m3fn, 0.08)):
        assert relative_error(sage_attention_reference(q, k, v, chosen, pv_dtype), exact) <= bound


def test_smoothing_keeps_int8_keys_accurate_under_a_large_offset() -> None:
    q, k, v = torch.randn(3, 1, 256, 1, 64)
    offset = 50 * torch.randn(64)
    chosen = kernels.block_map(q, k, block_q=128, block_k=64, topk=1.0)
    plain, shifted = (sage_attention_reference(q, x, v, chosen) for x in (k, k + offset))
    assert relative_error(shifted, plain) <= 0.02
