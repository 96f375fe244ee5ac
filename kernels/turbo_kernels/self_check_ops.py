"""The ops of the self-check: each against the fp32 formula, with its limit.

The limits are about twice what the formats cost:
    rounding operands and results           fp32 1e-4, fp16 2e-3, bf16 1e-2
    int8 linear, 128 x 128 blocks           each operand keeps amax/128 of about 4.4 sigma: 1.4 % together, limit 3 %
    rounding to e4m3                        2.6 %, limit 6 %; of attention with e4m3 P and V 4.8 %, limit 10 %
    e4m3 linear                             2.6 % from each operand: 3.7 %, limit 8 %; a result in e4m3: 4.6 %, 10 %
    int8 QK with fp16 P and V               about 1.3 %, limit 3 %
    int8 QK with e4m3 P and V               2.6 % from each of P and V besides: 4 %, limit 8 %
    e4m3 with upstream's V range (spargeattn)   values below amax/144 turn subnormal, limit 12 %
    block map                               score lost against the best choice, relative to the scores' spread: 1e-3
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from turbo_kernels.attention import (
    attention_geometry,
    dense_attention,
    sagesla_attention_fp8,
    sla_attention,
    sla_attention_of_projections,
)
from turbo_kernels.block_map import BlockMap, block_map, pool_blocks_reference
from turbo_kernels.fp8_gelu_linear import Fp8Samples, fp8_gelu_linear, multiplies_gelu_fp8
from turbo_kernels.fp8_linear import FP8_MAX, Fp8Rows, fp8_linear, multiplies_fp8, quantize_fp8_rows
from turbo_kernels.int8_linear import int8_linear, quantize_int8_blockwise
from turbo_kernels.linear_attention import linear_attention, linear_attention_reference
from turbo_kernels.providers import has_fp8
from turbo_kernels.residual_norm import residual_norm
from turbo_kernels.rms_norm_rope import rms_norm_rope
from turbo_kernels.sage_attention import sage_attention
from turbo_kernels.sparse_attention import sparse_attention, sparse_attention_reference
from turbo_kernels.text_attention import TextRows, text_attention

LENGTH, HEADS = 333, 2
_TOPK, _EPS = 0.4, 1e-6
_ROUNDING = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| in fp32; infinite where out is not finite."""
    error = (out.float() - reference.float()).norm() / reference.float().norm()
    return float(error) if bool(torch.isfinite(error)) else math.inf


class OpErrors:
    """Draws inputs for one provider and collects the error of each op beside its limit."""

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int, provider: str) -> None:
        self.device, self.dtype, self.head_dim, self.provider = device, dtype, head_dim, provider
        self.errors: dict[str, float] = {}
        self.limits: dict[str, float] = {}
        self._generator = torch.Generator().manual_seed(20251123)

    @property
    def model_dim(self) -> int:
        return HEADS * self.head_dim

    @property
    def rounding(self) -> float:
        """The limit of an op that only rounds."""
        return _ROUNDING[self.dtype]

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, dtype or self.dtype)

    def check(self, name: str, limit: float, out: Callable[[], torch.Tensor], reference: torch.Tensor) -> None:
        self.errors[name], self.limits[name] = relative_error(out(), reference), limit


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


def check_attention(ops: OpErrors) -> None:
    """Block maps, the sparse branches, and attention as a whole."""
    device, provider, D = ops.device, ops.provider, ops.head_dim
    # Keys with a mean, as real ones have it: smoothing must matter.
    shape = 2, LENGTH, HEADS, D
    q, k, v = ops.draw(*shape), ops.draw(*shape) + 2 * ops.draw(D), ops.draw(*shape)
    weight, bias = ops.draw(D, D) / D**0.5, 0.1 * ops.draw(D)
    quantized = 0.12 if provider == "spargeattn" else 0.08 if has_fp8(device) else 0.03
    map_by = "triton" if provider == "spargeattn" else provider
    for attention_type in ("sla", "sagesla"):
        if attention_type == "sla" and provider == "spargeattn":
            continue
        block_q, block_k = attention_geometry(attention_type, device)
        selected = block_map(q, k, block_q=block_q, block_k=block_k, topk=_TOPK, provider=map_by)
        ops.errors[f"block_map {attention_type}"] = score_lost(selected, q, k)
        ops.limits[f"block_map {attention_type}"] = 1e-3
        sparse = sparse_attention_reference(q, k, v, selected)
        projected = F.linear(linear_attention_reference(q, k, v), weight.float(), bias.float())
        op = sparse_attention if attention_type == "sla" else sage_attention
        limit = ops.rounding if attention_type == "sla" else quantized
        ops.check(op.__name__, limit, lambda op=op, m=selected: op(q, k, v, m, provider=provider), sparse)  # type: ignore[misc]
        ops.check(
            f"sla_attention {attention_type}",
            limit,
            lambda t=attention_type: sla_attention(  # type: ignore[misc]
                q, k, v, weight, bias, attention_type=t, topk=_TOPK, provider=provider
            ),
            sparse + projected,
        )
    if provider == "spargeattn":
        return
    if _has_e4m3(ops):
        arguments = q, k, v, weight, bias
        ops.check(
            "sagesla_attention_fp8",
            0.10,
            lambda: sagesla_attention_fp8(*arguments, topk=_TOPK, provider=provider).dequantize(),
            (sparse + projected).flatten(2),
        )
    everything = block_map(q, k, block_q=128, block_k=64, topk=1.0, provider=provider)
    exact = sparse_attention_reference(q, k, v, everything)
    ops.check("dense_attention", ops.rounding, lambda: dense_attention(q, k, v, provider=provider), exact)
    exact = linear_attention_reference(q, k, v)
    ops.check("linear_attention", ops.rounding, lambda: linear_attention(q, k, v, provider=provider), exact)


def check_row_ops(ops: OpErrors) -> None:
    """The norm of text keys and the linears, each alone."""
    provider, M = ops.provider, ops.model_dim
    x, weight_M = ops.draw(2, LENGTH, M) + 1, ops.draw(M)
    rope = ops.draw(LENGTH, ops.head_dim // 2, 2, dtype=torch.float32)
    weight, bias = ops.draw(200, M), ops.draw(200)
    weight_8 = quantize_int8_blockwise(weight, provider=provider)
    ops.check(
        "rms_norm_rope",
        ops.rounding,
        lambda: rms_norm_rope(x, weight_M, rope, num_heads=HEADS, eps=_EPS, provider=provider),
        rms_norm_rope(x.float(), weight_M.float(), rope, num_heads=HEADS, eps=_EPS, provider="reference"),
    )
    exact = F.linear(x.float(), weight.float(), bias.float())
    ops.check("int8_linear", 0.03, lambda: int8_linear(x, *weight_8, bias, provider=provider), exact)
    if _has_e4m3(ops):
        _check_fp8_products(ops)


def _check_fp8_products(ops: OpErrors) -> None:
    """cuBLAS's, at sizes that it takes: channels in multiples of 16."""
    provider, out_dtype = ops.provider, ops.dtype
    x, weight, bias = ops.draw(2, 328, ops.model_dim) + 1, ops.draw(256, ops.model_dim), ops.draw(256)
    exact = F.linear(x.float(), weight.float(), bias.float())
    rows = quantize_fp8_rows(weight, provider=provider)
    ops.check(
        "fp8_linear",
        0.08,
        lambda: fp8_linear(quantize_fp8_rows(x, provider=provider), rows, bias, out_dtype=out_dtype, provider=provider),
        exact,
    )
    if provider != "reference" and not multiplies_gelu_fp8(ops.device):
        return
    scale = weight.float().abs().amax() / FP8_MAX
    uniform = Fp8Rows((weight / scale).to(torch.float8_e4m3fn), scale.repeat(len(weight)))
    x_scale, y_scale = (t.float().abs().amax((1, 2)) / FP8_MAX for t in (x, exact))
    x8 = Fp8Samples((x / x_scale[:, None, None]).to(torch.float8_e4m3fn), x_scale)
    ops.check(
        "fp8_gelu_linear",
        0.10,
        lambda: fp8_gelu_linear(x8, uniform, bias, y_scale, provider=provider).dequantize(),
        F.gelu(exact, approximate="tanh"),
    )


def _has_e4m3(ops: OpErrors) -> bool:
    """Not under the interpreter, which rounds to e4m3 towards zero."""
    return ops.provider == "reference" or multiplies_fp8(ops.device)


def check_block(ops: OpErrors) -> None:
    """What a transformer block runs in one kernel each."""
    provider, M, D = ops.provider, ops.model_dim, ops.head_dim
    x, y = ops.draw(2, LENGTH, M) + 1, ops.draw(2, LENGTH, M)
    gate, scale, shift = (ops.draw(2, M, dtype=torch.float32) for _ in range(3))
    exact_x = x.float() + y.float() * gate[:, None]
    exact_h = F.layer_norm(exact_x, (M,), eps=_EPS) * (1 + scale[:, None]) + shift[:, None]

    def both() -> torch.Tensor:
        x_out, h = residual_norm(x, y, gate, scale_BD=scale, shift_BD=shift, eps=_EPS, provider=provider)
        assert isinstance(h, torch.Tensor)
        return torch.stack((x_out, h))

    ops.check("residual_norm", ops.rounding, both, torch.stack((exact_x, exact_h)))

    q, k, _ = ops.draw(2, LENGTH, 3 * M).chunk(3, dim=-1)
    q_weight, rope = ops.draw(M), ops.draw(LENGTH, D // 2, 2, dtype=torch.float32)
    _check_projections(ops, q, k, rope)

    text = q[0], q_weight, ops.draw(77, HEADS, D), ops.draw(77, HEADS, D)

    def attend(*tensors: torch.Tensor, by: str = provider, value_amax: torch.Tensor | None = None) -> torch.Tensor:
        rows = TextRows.of(77, last_count=9, device=q.device)
        out = text_attention(*tensors, eps=_EPS, text=rows, value_amax=value_amax, provider=by)
        return out.dequantize() if isinstance(out, Fp8Rows) else out

    exact = attend(*(tensor.float() for tensor in text), by="reference")
    ops.check("text_attention", ops.rounding, lambda: attend(*text), exact)
    if not _has_e4m3(ops):
        return

    def normalise_fp8() -> torch.Tensor:
        _, h = residual_norm(
            x, y, gate, scale_BD=scale, shift_BD=shift, eps=_EPS, out_dtype=torch.float8_e4m3fn, provider=provider
        )
        assert isinstance(h, Fp8Rows)
        return h.dequantize()

    value_amax = text[3].abs().amax().float()
    ops.check("residual_norm in e4m3", 0.06, normalise_fp8, exact_h)
    ops.check("text_attention in e4m3", 0.06, lambda: attend(*text, value_amax=value_amax), exact)


def _check_projections(ops: OpErrors, q: torch.Tensor, k: torch.Tensor, rope: torch.Tensor) -> None:
    """Attention from projections on, over all blocks: so no choice of blocks is part of the error."""
    M, D, provider = ops.model_dim, ops.head_dim, ops.provider
    rope = F.normalize(rope, dim=-1)  # rotations: what they do not lengthen, 8 bits hold as well as other values
    weights = 1 + 0.1 * ops.draw(M), 1 + 0.1 * ops.draw(M)
    v, proj_weight, proj_bias = ops.draw(2, LENGTH, HEADS, D), ops.draw(D, D) / D**0.5, 0.1 * ops.draw(D)
    exact_q, exact_k = (
        rms_norm_rope(part.float(), weight.float(), rope, num_heads=HEADS, eps=_EPS, provider="reference")
        for part, weight in zip((q, k), weights, strict=True)
    )
    everything = block_map(exact_q, exact_k, block_q=128, block_k=64, topk=1.0, provider="reference")
    linear = linear_attention_reference(exact_q, exact_k, v.float())
    exact = sparse_attention_reference(exact_q, exact_k, v.float(), everything)
    exact += F.linear(linear, proj_weight.float(), proj_bias.float())

    def attend(attention_type: str, fp8: bool = False) -> torch.Tensor:
        arguments = q, k, v, *weights, rope, proj_weight, proj_bias
        out = sla_attention_of_projections(
            *arguments, attention_type=attention_type, topk=1.0, eps=_EPS, fp8=fp8, provider=provider
        )
        return out.dequantize() if isinstance(out, Fp8Rows) else out

    quantized = 0.08 if has_fp8(ops.device) else 0.03
    ops.check("attention of projections, sla", ops.rounding, lambda: attend("sla"), exact)
    ops.check("attention of projections, sagesla", quantized, lambda: attend("sagesla"), exact)
    if _has_e4m3(ops):
        in_fp8 = "attention of projections, sagesla in e4m3"
        ops.check(in_fp8, 0.10, lambda: attend("sagesla", fp8=True), exact.flatten(2))
