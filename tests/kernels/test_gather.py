"""What is gathered of queries and keys, alone and while they are normed and rotated, and attention from there on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from turbo_kernels import sla_attention
from turbo_kernels.attention import sagesla_attention_fp8, sla_attention_of_projections
from turbo_kernels.fp8_linear import Fp8Rows
from turbo_kernels.gather import GROUP, Gathered, gather
from turbo_kernels.qk_norm_rope_gather import qk_norm_rope_gather
from turbo_kernels.rms_norm_rope import rms_norm_rope
from turbo_kernels.self_check_ops import relative_error
from turbo_kernels.summary import chunk_tokens

pytestmark = pytest.mark.oracle
Draw = Callable[[int, int, int, int], tuple[torch.Tensor, ...]]
EPS = 1e-6


def draw_projections(device: torch.device, dtype: torch.dtype, L: int, H: int, D: int) -> dict[str, torch.Tensor]:
    """q, k, v as slices of one joint projection [2, L, 3 H D], the norms' weights, and a table of rotations."""
    generator = torch.Generator().manual_seed(L + H + D)
    qkv = torch.randn(2, L, 3 * H * D, generator=generator).to(device, dtype)
    q, k, v = qkv.chunk(3, dim=-1)
    weights = (0.5 + torch.rand(2, H * D, generator=generator)).to(device, dtype)
    angles = 6.3 * torch.rand(L, D // 2, generator=generator)
    rope = torch.stack((angles.cos(), angles.sin()), -1).to(device)
    return {"q": q, "k": k, "v": v.view(2, L, H, D), "q_weight": weights[0], "k_weight": weights[1], "rope": rope}


def norm_rope(parts: dict[str, torch.Tensor], H: int, provider: str) -> list[torch.Tensor]:
    """Queries and keys, each by itself."""
    return [
        rms_norm_rope(parts[x], parts[f"{x}_weight"], parts["rope"], num_heads=H, eps=EPS, provider=provider)
        for x in "qk"
    ]


def assert_sums_and_lse(gathered: Gathered, x_BLHD: torch.Tensor) -> None:
    B, L, H, D = x_BLHD.shape
    x = x_BLHD.transpose(1, 2).flatten(0, 1).double()
    padded = torch.nn.functional.pad(x, (0, 0, 0, -L % GROUP))
    assert gathered.sums.shape == (B * H, -(-L // GROUP), D)
    torch.testing.assert_close(gathered.sums.double(), padded.unflatten(1, (-1, GROUP)).sum(2), rtol=1e-5, atol=1e-4)
    if gathered.lse is not None:
        torch.testing.assert_close(gathered.lse.double(), x.exp().sum(-1).log2(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("L", "D"), [(1, 64), (64, 128), (200, 64)])
def test_gather(qkv: Draw, L: int, D: int) -> None:
    """Of keys the log-sum, of queries each token in 8 bits, within half a step of its own scale."""
    q, k, _ = qkv(2, L, 3, D)
    of_keys, of_queries = gather(k, lse=True), gather(q, int8=True)
    assert_sums_and_lse(of_keys, k)
    assert_sums_and_lse(of_queries, q)
    assert of_keys.int8 is None
    assert of_queries.lse is None
    assert of_queries.int8 is not None
    assert of_queries.scale is not None
    x = q.transpose(1, 2).flatten(0, 1).float()
    int8, scale = of_queries.int8[:, :L].float(), of_queries.scale[:, :L, None]
    torch.testing.assert_close(scale, x.abs().amax(-1, keepdim=True) / 127 + 1e-7, rtol=1e-6, atol=0)
    assert bool(((int8 * scale - x).abs() <= 0.5001 * scale).all())


@pytest.mark.parametrize(("L", "H", "D"), [(1, 1, 64), (70, 2, 64), (65, 3, 128), (9, 5, 64)])
@pytest.mark.parametrize("int8", [False, True])
def test_while_normed_and_rotated(device: torch.device, dtype: torch.dtype, L: int, H: int, D: int, int8: bool) -> None:
    """Queries and keys are those of `rms_norm_rope`; what is gathered is that of them before they are rounded."""
    parts = draw_projections(device, dtype, L, H, D)
    parts.pop("v")
    q, of_queries, k, of_keys = qk_norm_rope_gather(*parts.values(), num_heads=H, eps=EPS, int8=int8)
    expected = norm_rope(parts, H, "triton")
    exact = dict(parts, q=parts["q"].float(), k=parts["k"].float())
    exact_q, exact_k = norm_rope(exact, H, "reference")
    for out, same in zip((q, k), expected, strict=True):
        torch.testing.assert_close(out, same, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
    assert_sums_and_lse(Gathered(of_queries.sums, None, None, None), exact_q)
    assert_sums_and_lse(Gathered(of_keys.sums, None, None, None), exact_k)
    assert of_keys.lse is not None
    x = k.transpose(1, 2).flatten(0, 1).double()  # phi is that of the keys as they are stored
    torch.testing.assert_close(of_keys.lse.double(), x.exp().sum(-1).log2(), rtol=0, atol=1e-5)
    assert (of_queries.int8 is not None) == int8
    if of_queries.int8 is not None and of_queries.scale is not None:
        x = exact_q.transpose(1, 2).flatten(0, 1)
        int8_values, scale = of_queries.int8[:, :L].float(), of_queries.scale[:, :L, None]
        torch.testing.assert_close(scale, x.abs().amax(-1, keepdim=True) / 127 + 1e-7, rtol=1e-5, atol=0)
        assert bool(((int8_values * scale - x).abs() <= 0.501 * scale).all())


@pytest.mark.parametrize("attention_type", ["sla", "sagesla"])
@pytest.mark.parametrize(("L", "H", "D"), [(111, 1, 128), (257, 3, 64)])
def test_attention_of_projections(
    device: torch.device, dtype: torch.dtype, attention_type: str, L: int, H: int, D: int
) -> None:
    """The same as the ops one after another, over all blocks: near-ties of a block map may fall either way."""
    parts = draw_projections(device, dtype, L, H, D)
    weight, bias = torch.randn(D, D, device=device) / D**0.5, 0.1 * torch.randn(D, device=device)
    proj_l = weight.to(dtype), bias.to(dtype)
    settings = {"attention_type": attention_type, "topk": 1.0}
    out = {
        provider: sla_attention_of_projections(
            parts["q"], parts["k"], parts["v"], parts["q_weight"], parts["k_weight"], parts["rope"], *proj_l,
            **settings, eps=EPS, provider=provider,
        )
        for provider in ("triton", "reference")
    }  # fmt: skip
    v = parts.pop("v")
    q, k = norm_rope(parts, H, "triton")
    after = sla_attention(q, k, v, *proj_l, **settings, provider="triton")
    bound = {"sla": 1e-5 if dtype == torch.float32 else 1e-2, "sagesla": 2e-3 if device.type == "cpu" else 0.02}
    for other in (out["reference"], after):
        assert isinstance(other, torch.Tensor)
        assert relative_error(out["triton"], other) <= bound[attention_type]


@pytest.mark.parametrize("provider", ["triton", "reference"])
def test_attention_of_projections_in_e4m3(device: torch.device, dtype: torch.dtype, provider: str) -> None:
    H, D = 3, 64
    parts = draw_projections(device, dtype, 150, H, D)
    proj_l = (torch.randn(D, D, device=device) / 8).to(dtype), torch.randn(D, device=device).to(dtype)
    v = parts.pop("v")
    q, k, *others = parts.values()
    arguments = q, k, v, *others, *proj_l
    options = {"topk": 1.0, "eps": EPS, "fp8": True, "provider": provider}
    rows = sla_attention_of_projections(*arguments, attention_type="sagesla", **options)
    q, k = norm_rope(parts, H, provider)
    after = sagesla_attention_fp8(q, k, v, *proj_l, topk=1.0, provider=provider)
    assert isinstance(rows, Fp8Rows)
    assert torch.equal(rows.scale, after.scale)
    # An edge of e4m3 that falls to the other side costs 2^-4 of a value.
    assert relative_error(rows.dequantize(), after.dequantize()) <= 0.02
    with pytest.raises(ValueError, match="only sagesla"):
        sla_attention_of_projections(*arguments, attention_type="sla", **options)


@pytest.mark.parametrize("H", [1, 12, 40])
@pytest.mark.parametrize("L", [1, 333, 3510, 32_760, 75_600])
def test_chunks_of_the_summary(L: int, H: int) -> None:
    """Whole blocks, and programs that are all there are at a time, or fill nearly every turn."""
    chunk = chunk_tokens(L, H)
    assert chunk % 128 == 0
    turns = -(-L // chunk) * H / 264
    assert turns <= 1 or math.ceil(turns) / turns < 1.05
