"""Gated GELU of a joint product, and 8-bit rounding for the next one: one pass.

    out = up * GELU(gate), GELU in its tanh form, in fp32; or e4m3 of it with one scale a token

Source: T5 v1.1 and UMT5 (feed-forward with a gate).
"""

from __future__ import annotations

from typing import no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from turbo_kernels.checks import check_float
from turbo_kernels.fp8_linear import (
    AMAX_FLOOR,
    FP8_MAX,
    Fp8Rows,
    gelu_tanh,
    piece_warps,
    quantize_fp8_rows,
    row_pieces,
)
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider


def gelu_gate(
    gate_and_up_L2F: torch.Tensor, *, quantize: bool = False, provider: str | None = None
) -> torch.Tensor | Fp8Rows:
    """The hidden activations of a gated feed-forward.

    Args:
        gate_and_up_L2F: [L, 2 F]: of each token the F values of the gate, then the F values that it scales; F 2 or
            more.
        quantize: give `Fp8Rows`.

    Returns:
        [L, F] in the dtype of the input, or e4m3 rows of that shape.

    Raises:
        ValueError: shape, dtype or provider that does not fit.
    """
    x = gate_and_up_L2F
    check_float("gate_and_up", x)
    if x.ndim != 2 or 0 in x.shape or x.shape[1] % 2 or x.shape[1] < 4:
        raise ValueError(f"gate_and_up has shape {tuple(x.shape)}: must be [L, 2 F], F 2 or more, not empty")
    provider = resolve_provider(provider, x.device, op="gelu_gate")
    if provider == "triton":
        return _gelu_gate_triton(x, quantize)
    gate, up = x.float().chunk(2, dim=1)
    hidden = up * F.gelu(gate, approximate="tanh")
    return quantize_fp8_rows(hidden, provider=provider) if quantize else hidden.to(x.dtype)


@triton.jit
@no_type_check
def gelu_gate_kernel(
    x,  # [L, 2 F]
    out,  # [L, F] contiguous
    out_scale,  # [L], QUANTIZE only
    F,
    amax_floor,
    fp8_max,
    stride_x,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    i_l = tl.program_id(0).to(tl.int64)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, TAIL)
    inside = o_1 < F
    p_gate = x + i_l * stride_x
    p_up = p_gate + F
    b_0 = gelu_tanh(tl.load(p_gate + o_0).to(tl.float32)) * tl.load(p_up + o_0).to(tl.float32)
    b_1 = gelu_tanh(tl.load(p_gate + o_1, mask=inside, other=0.0).to(tl.float32))
    b_1 = b_1 * tl.load(p_up + o_1, mask=inside, other=0.0).to(tl.float32)
    if QUANTIZE:
        amax = tl.maximum(tl.max(tl.abs(b_0), 0), tl.max(tl.abs(b_1), 0))
        row_scale = tl.maximum(amax, amax_floor) * (1.0 / fp8_max)
        tl.store(out_scale + i_l, row_scale)
        inverse = 1.0 / row_scale
        b_0 = tl.minimum(tl.maximum(b_0 * inverse, -fp8_max), fp8_max)
        b_1 = tl.minimum(tl.maximum(b_1 * inverse, -fp8_max), fp8_max)
    tl.store(out + i_l * F + o_0, b_0.to(out.dtype.element_ty))
    tl.store(out + i_l * F + o_1, b_1.to(out.dtype.element_ty), mask=inside)


def _gelu_gate_triton(x: torch.Tensor, quantize: bool) -> torch.Tensor | Fp8Rows:
    L, F = x.shape[0], x.shape[1] // 2
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(L, F, dtype=torch.float8_e4m3fn if quantize else x.dtype, device=x.device)
    out_scale = torch.empty(L, dtype=torch.float32, device=x.device) if quantize else x
    head, tail = row_pieces(F)
    with device_of(x):
        gelu_gate_kernel[(L,)](
            x, out, out_scale, F, AMAX_FLOOR, FP8_MAX, x.stride(0),
            HEAD=head, TAIL=tail, QUANTIZE=quantize, num_warps=piece_warps(head), enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return Fp8Rows(out, out_scale) if quantize else out
