"""Numeric check of a provider on the device it will serve on, run when a server loads.

Every op runs once on fresh random inputs, ragged in every blocked dimension, and is compared with the fp32 PyTorch
formula *without* quantisation:

    error = ||out - reference|| / ||reference||

The limits are about twice what the formats cost:
    rounding operands and results           fp32 1e-4, fp16 2e-3, bf16 1e-2
    int8 linear, 128 x 128 blocks           each operand keeps amax/128 of about 4.4 sigma: 1.4 % together, limit 3 %
    int8 QK with fp16 P and V               about 1.3 %, limit 3 %
    int8 QK with e4m3 P and V               2.6 % from each of P and V besides: 4 %, limit 8 %
    e4m3 with upstream's V range (spargeattn)   values below amax/144 turn subnormal, limit 12 %
    block map                               score lost against the best choice, relative to the scores' spread: 1e-3
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from turbo_kernels.attention import attention_geometry, dense_attention, sla_attention
from turbo_kernels.block_map import BlockMap, block_map, pool_blocks_reference
from turbo_kernels.gate_residual import gate_residual
from turbo_kernels.int8_linear import int8_linear, quantize_int8_blockwise
from turbo_kernels.layer_norm import layer_norm_modulate
from turbo_kernels.linear_attention import linear_attention, linear_attention_reference
from turbo_kernels.providers import has_fp8, resolve_provider
from turbo_kernels.rms_norm_rope import rms_norm_rope
from turbo_kernels.sage_attention import sage_attention
from turbo_kernels.sparse_attention import sparse_attention, sparse_attention_reference

_LENGTH, _HEADS, _TOPK, _EPS = 333, 2, 0.4, 1e-6
_ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Outcome of a check.

    Attributes:
        passed: no op is over its limit.
        details: error of each op.
        limits: the largest error allowed for each op.
        dtype: what the inputs were rounded to.
    """

    passed: bool
    details: dict[str, float]
    limits: dict[str, float] = field(default_factory=dict)
    dtype: str = ""


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| in fp32; infinite where out is not finite."""
    error = (out.float() - reference.float()).norm() / reference.float().norm()
    return float(error) if bool(torch.isfinite(error)) else math.inf


def score_lost(selected: BlockMap, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor) -> float:
    """How far the worst row's chosen scores sum below the best choice, relative to the scores' spread.

    Zero for the exact top-k; near-ties that fp32 sums in another order may swap cost next to nothing.
    """
    worst = 0.0
    for b in range(q_BLHD.shape[0]):
        q_HLD, k_HLD = q_BLHD[b].transpose(0, 1).double(), k_BLHD[b].transpose(0, 1).double()
        pooled_k = pool_blocks_reference(k_HLD - k_HLD.mean(1, keepdim=True), selected.block_k)
        scores = pool_blocks_reference(q_HLD, selected.block_q) @ pooled_k.transpose(1, 2)
        best = scores.topk(selected.num_selected, dim=-1).values.sum(-1)
        chosen = scores.gather(-1, selected.indices[b].long()).sum(-1)
        spread = scores.std() + scores.abs().amax() * 1e-6 if scores.numel() > 1 else scores.abs().amax() + 1.0
        worst = max(worst, float(((best - chosen) / spread).max()))
    return worst


def self_check(device: torch.device | str, head_dim: int, provider: str | None = None) -> SelfCheck:
    """Run every op that `provider` offers and compare it with the fp32 reference.

    Inputs are bf16 on a GPU, fp32 on the CPU. A kernel that does not compile or launch raises its own error.

    Raises:
        ValueError: a provider that cannot run on this device, or a head_dim other than 64 and 128.
    """
    device = torch.device(device)
    available = ("reference", "triton", "spargeattn")
    provider = resolve_provider(provider, device, op="the self-check", available=available)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(20251123)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    D, model_dim = head_dim, _HEADS * head_dim
    # Keys with a mean, as real ones have it: smoothing must matter.
    q, k, v = draw(2, _LENGTH, _HEADS, D), draw(2, _LENGTH, _HEADS, D) + 2 * draw(D), draw(2, _LENGTH, _HEADS, D)
    weight, bias = draw(D, D) / D**0.5, 0.1 * draw(D)
    errors: dict[str, float] = {}
    limits: dict[str, float] = {}

    def check(name: str, limit: float, out: Callable[[], torch.Tensor], reference: torch.Tensor) -> None:
        errors[name], limits[name] = relative_error(out(), reference), limit

    rounding = _ROUNDING[dtype]
    quantized = 0.12 if provider == "spargeattn" else 0.08 if has_fp8(device) else 0.03
    map_by = "triton" if provider == "spargeattn" else provider
    for attention_type in ("sla", "sagesla"):
        if attention_type == "sla" and provider == "spargeattn":
            continue
        block_q, block_k = attention_geometry(attention_type, device)
        selected = block_map(q, k, block_q=block_q, block_k=block_k, topk=_TOPK, provider=map_by)
        errors[f"block_map {attention_type}"] = score_lost(selected, q, k)
        limits[f"block_map {attention_type}"] = 1e-3
        sparse = sparse_attention_reference(q, k, v, selected)
        projected = F.linear(linear_attention_reference(q, k, v), weight.float(), bias.float())
        op = sparse_attention if attention_type == "sla" else sage_attention
        limit = rounding if attention_type == "sla" else quantized
        check(op.__name__, limit, lambda op=op, m=selected: op(q, k, v, m, provider=provider), sparse)  # type: ignore[misc]
        check(
            f"sla_attention {attention_type}",
            limit,
            lambda t=attention_type: sla_attention(  # type: ignore[misc]
                q, k, v, weight, bias, attention_type=t, topk=_TOPK, provider=provider
            ),
            sparse + projected,
        )
    if provider != "spargeattn":
        x, y, gate, shift = (
            draw(2, _LENGTH, model_dim) + 1,
            draw(2, _LENGTH, model_dim),
            draw(2, model_dim),
            draw(2, model_dim),
        )
        scale_D, rope = draw(model_dim), torch.randn(_LENGTH, D // 2, 2, generator=generator).to(device)
        linear_weight, linear_bias = draw(200, model_dim), draw(200)
        weight_8 = quantize_int8_blockwise(linear_weight, provider=provider)
        everything = block_map(q, k, block_q=128, block_k=64, topk=1.0, provider=map_by)
        normed = F.layer_norm(x.float(), (model_dim,), eps=_EPS) * (1 + gate.float()[:, None]) + shift.float()[:, None]
        check(
            "dense_attention",
            rounding,
            lambda: dense_attention(q, k, v, provider=provider),
            sparse_attention_reference(q, k, v, everything),
        )
        check(
            "linear_attention",
            rounding,
            lambda: linear_attention(q, k, v, provider=provider),
            linear_attention_reference(q, k, v),
        )
        check(
            "layer_norm_modulate",
            rounding,
            lambda: layer_norm_modulate(x, scale_BD=gate, shift_BD=shift, eps=_EPS, provider=provider),
            normed,
        )
        check(
            "rms_norm_rope",
            rounding,
            lambda: rms_norm_rope(x, scale_D, rope, num_heads=_HEADS, eps=_EPS, provider=provider),
            rms_norm_rope(x.float(), scale_D.float(), rope, num_heads=_HEADS, eps=_EPS, provider="reference"),
        )
        check(
            "gate_residual",
            rounding,
            lambda: gate_residual(x, y, gate, provider=provider),
            x.float() + y.float() * gate.float()[:, None],
        )
        check(
            "int8_linear",
            0.03,
            lambda: int8_linear(x, *weight_8, linear_bias, provider=provider),
            F.linear(x.float(), linear_weight.float(), linear_bias.float()),
        )
    passed = all(errors[name] <= limits[name] for name in errors)
    return SelfCheck(passed, errors, limits, str(dtype).removeprefix("torch."))
