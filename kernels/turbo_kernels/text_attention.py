"""Cross-attention of video tokens to one short text, with the RMSNorm of the queries.

    r   = 1 / sqrt(mean(q^2) + eps)                                       over all heads together
    o   = softmax(r q (weight k)^T / sqrt(D) + [0, ..., 0, ln n]) v       n: how many equal keys the last one stands for
    out = o, or e4m3(o / scale) with scale = max|v| / 448

o is a mean of values, so max|v| bounds it and no row needs its own maximum: the bound lies a few binades above the
largest output, of which e4m3 has fifteen.
Source: Wan2.1 (cross-attention); upstream attends to every padding row, which the one weighted key stands for exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.checks import HEAD_DIMS, check_float
from turbo_kernels.fp8_linear import AMAX_FLOOR, FP8_MAX, Fp8Rows, row_pieces
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

_BLOCK_S = 64
#: Of a text that fits into one block, which a program then keeps, and of a longer one: queries in a block, blocks of a
#: program, and registers a thread (of a longer one so that two programs share a multiprocessor).
_SHORT, _LONG = (64, 8, None), (128, 1, 128)
#: Values of the heads of its rows that a program of the norm takes.
_VALUES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRows:
    """How long a text is, where the device reads it: one recorded launch then serves every text of up to `most` rows.

    Attributes:
        most: rows that there may be, which decides what kernel is compiled.
        count: int32 [1], rows that there are, 1 to `most`.
        last_log2: fp32 [1], log2 of how many equal keys the last row stands for.
    """

    most: int
    count: torch.Tensor
    last_log2: torch.Tensor

    @classmethod
    def of(cls, count: int, *, last_count: int = 1, device: torch.device) -> TextRows:
        """Of a text whose length the host knows.

        Raises:
            ValueError: a count under one.
        """
        if count < 1 or last_count < 1:
            raise ValueError(f"count is {count}, last_count {last_count}: must be 1 or more")
        return cls(
            most=count,
            count=torch.full((1,), count, dtype=torch.int32, device=device),
            last_log2=torch.full((1,), math.log2(last_count), dtype=torch.float32, device=device),
        )

    def allowing(self, most: int) -> TextRows:
        """The same of a text that may have so many rows."""
        return TextRows(most=most, count=self.count, last_log2=self.last_log2)


def rows_compiled_for(count: int) -> int | None:
    """The most rows that the kernel for texts of `count` rows takes: up to 32, up to 64, or any number (None)."""
    return next((rows for rows in (_BLOCK_S // 2, _BLOCK_S) if count <= rows), None)


def text_attention(
    q_LM: torch.Tensor,
    q_weight_M: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    *,
    eps: float,
    text: TextRows | None = None,
    value_amax: torch.Tensor | None = None,
    provider: str | None = None,
) -> torch.Tensor | Fp8Rows:
    """One sample's queries over its text.

    Args:
        q_LM: [L, H * D], not yet normalised, any row stride.
        q_weight_M: [H * D] of the queries' RMSNorm.
        k_SHD, v_SHD: [S, H, D], contiguous; D 64 or 128.
        text: which rows of them are read, and how the last one counts; all, each for itself, by default.
        value_amax: fp32 scalar, max|v|; asks for e4m3 rows.

    Returns:
        [L, H * D] in q's dtype, or `Fp8Rows` of that shape.

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    for name, tensor in (("q", q_LM), ("q_weight", q_weight_M), ("k", k_SHD), ("v", v_SHD)):
        check_float(name, tensor)
        if 0 in tensor.shape or tensor.device != q_LM.device:
            raise ValueError(f"{name} is {tuple(tensor.shape)} on {tensor.device}: empty, or not on {q_LM.device}")
    if k_SHD.ndim != 3 or k_SHD.shape != v_SHD.shape or not (k_SHD.is_contiguous() and v_SHD.is_contiguous()):
        raise ValueError(f"k and v are {tuple(k_SHD.shape)}, {tuple(v_SHD.shape)}: must be [S, H, D], contiguous")
    if not q_LM.dtype == k_SHD.dtype == v_SHD.dtype:
        raise ValueError(f"q, k, v are {q_LM.dtype}, {k_SHD.dtype}, {v_SHD.dtype}: must have one dtype")
    _, H, D = k_SHD.shape
    if q_LM.ndim != 2 or q_LM.shape[1] != H * D or q_LM.stride(1) != 1 or q_weight_M.shape != (H * D,):
        raise ValueError(f"q is {tuple(q_LM.shape)}, its weight {tuple(q_weight_M.shape)}: must be [L, {H * D}] rows")
    if D not in HEAD_DIMS:
        raise ValueError(f"head_dim is {D}: must be 64 or 128")
    if text is not None and (text.most > len(k_SHD) or text.count.device != q_LM.device):
        raise ValueError(f"text has up to {text.most} rows on {text.count.device}: k has {len(k_SHD)} on {q_LM.device}")
    if value_amax is not None and (value_amax.numel() != 1 or value_amax.dtype != torch.float32):
        raise ValueError(f"value_amax is {value_amax.dtype} {tuple(value_amax.shape)}: must be one float32")
    provider = resolve_provider(provider, q_LM.device, op="text_attention")
    if text is None:
        text = TextRows.of(len(k_SHD), device=q_LM.device)
    if provider == "triton":
        return _text_attention_triton(q_LM, q_weight_M, k_SHD, v_SHD, eps, text, value_amax)
    k_SHD, v_SHD = k_SHD[: int(text.count)], v_SHD[: int(text.count)]
    q = q_LM.float()
    q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps) * q_weight_M.float()
    scores = torch.einsum("lhd,shd->hls", q.view(-1, H, D), k_SHD.float()) * D**-0.5
    scores[..., -1] += text.last_log2 * math.log(2)
    out = torch.einsum("hls,shd->lhd", scores.softmax(-1), v_SHD.float()).flatten(1)
    if value_amax is None:
        return out.to(q_LM.dtype)
    scale = value_amax.view(1).clamp_min(AMAX_FLOOR) * (1.0 / FP8_MAX)
    return Fp8Rows((out / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale.repeat(len(out)))


@triton.jit
@no_type_check
def _load_text(k, v, weight, start, S, last_logit, i_h, H, D: tl.constexpr, BLOCK_S: tl.constexpr):
    """One block of a head's text: keys with the queries' weight in them, values, and what is added to the logits."""
    o_s = start + tl.arange(0, BLOCK_S)
    in_text = o_s < S
    o_m = i_h * D + tl.arange(0, D)
    o_kv = o_s[:, None] * (H * D) + o_m[None, :]
    b_k = tl.load(k + o_kv, mask=in_text[:, None], other=0.0)  # [BLOCK_S, D]
    b_v = tl.load(v + o_kv, mask=in_text[:, None], other=0.0)  # [BLOCK_S, D]
    b_k = (b_k.to(tl.float32) * tl.load(weight + o_m).to(tl.float32)[None, :]).to(b_v.dtype)
    b_bias = tl.where(in_text, tl.where(o_s == S - 1, last_logit, 0.0), float("-inf"))
    return b_k, b_v, b_bias


@triton.jit(do_not_specialize=["L"])
@no_type_check
def query_rstd_kernel(
    q,  # [L, M]
    rstd,  # [L]
    L,
    M,
    eps,
    stride_ql,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_l = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, TAIL)
    inside = (o_l < L)[:, None]
    p_q = q + o_l[:, None] * stride_ql
    b_0 = tl.load(p_q + o_0[None, :], mask=inside, other=0.0).to(tl.float32)
    b_1 = tl.load(p_q + o_1[None, :], mask=inside & (o_1 < M)[None, :], other=0.0).to(tl.float32)
    squares = tl.sum(b_0 * b_0, 1) + tl.sum(b_1 * b_1, 1)
    tl.store(rstd + o_l, 1.0 / tl.sqrt(squares / M + eps), mask=o_l < L)


@triton.jit(do_not_specialize=["L"])
@no_type_check
def text_attention_kernel(
    q,  # [L, H * D]
    rstd,  # [L]
    weight,  # [H * D]
    k,  # [S, H, D]
    v,  # [S, H, D]
    value_amax,  # [1], QUANTIZE only
    out,  # [L, H * D] contiguous
    out_scale,  # [L], QUANTIZE only
    text_rows,  # [1]
    text_last,  # [1], log2 of how many keys the last one stands for
    L,
    scale,
    amax_floor,
    fp8_max,
    stride_ql,
    H,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    TILES: tl.constexpr,  # blocks of queries of a program
    QUANTIZE: tl.constexpr,
):
    # Programs of the same queries are neighbours: together they read whole rows.
    i_h = tl.program_id(0)
    o_m = i_h * D + tl.arange(0, D)
    S = tl.load(text_rows)
    last_logit = tl.load(text_last)
    if ONE_BLOCK:
        b_k, b_v, b_bias = _load_text(k, v, weight, 0, S, last_logit, i_h, H, D, BLOCK_S)
    if QUANTIZE:
        row_scale = tl.maximum(tl.load(value_amax), amax_floor) * (1.0 / fp8_max)
    first = tl.program_id(1) * (TILES * BLOCK_Q)
    for start in range(first, tl.minimum(first + TILES * BLOCK_Q, L), BLOCK_Q):
        o_l = (start + tl.arange(0, BLOCK_Q)).to(tl.int64)
        in_l = o_l < L
        b_q = tl.load(q + o_l[:, None] * stride_ql + o_m[None, :], mask=in_l[:, None], other=0.0)
        # The norm is a factor a row, and its weight lies in the keys: queries go to the tensor cores as they are.
        b_factor = tl.load(rstd + o_l, mask=in_l, other=0.0) * scale  # logits in units of log 2
        if ONE_BLOCK:
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * b_factor[:, None] + b_bias[None, :]
            b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
            row_sum = tl.sum(b_p, 1)
            acc = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        else:
            row_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
            row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
            acc = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
            for i_s in range(0, S, BLOCK_S):
                b_k, b_v, b_bias = _load_text(k, v, weight, i_s, S, last_logit, i_h, H, D, BLOCK_S)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * b_factor[:, None] + b_bias[None, :]
                new_max = tl.maximum(row_max, tl.max(b_s, 1))
                b_p = tl.exp2(b_s - new_max[:, None])
                shrink = tl.exp2(row_max - new_max)
                row_sum = row_sum * shrink + tl.sum(b_p, 1)
                acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision="ieee")
                row_max = new_max
        acc = acc * (1.0 / row_sum)[:, None]
        if QUANTIZE:
            acc = tl.minimum(tl.maximum(acc * (1.0 / row_scale), -fp8_max), fp8_max)
            if i_h == 0:
                tl.store(out_scale + o_l, tl.broadcast_to(row_scale, [BLOCK_Q]), mask=in_l)
        tl.store(out + o_l[:, None] * (H * D) + o_m[None, :], acc.to(out.dtype.element_ty), mask=in_l[:, None])


def _text_attention_triton(
    q_LM: torch.Tensor,
    q_weight_M: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    eps: float,
    text: TextRows,
    value_amax: torch.Tensor | None,
) -> torch.Tensor | Fp8Rows:
    L, M = q_LM.shape
    _, H, D = k_SHD.shape
    quantize = value_amax is not None
    out = torch.empty(L, M, dtype=torch.float8_e4m3fn if quantize else q_LM.dtype, device=q_LM.device)
    out_scale = torch.empty(L, dtype=torch.float32, device=q_LM.device) if quantize else out
    rstd = torch.empty(L, dtype=torch.float32, device=q_LM.device)
    head, tail = row_pieces(M)
    rows = max(_VALUES // head, 1)
    one_block = rows_compiled_for(text.most)
    block_q, tiles, registers = _LONG if one_block is None else _SHORT
    with device_of(q_LM):
        query_rstd_kernel[(triton.cdiv(L, rows),)](
            q_LM, rstd, L, M, eps, q_LM.stride(0), HEAD=head, TAIL=tail, ROWS=rows,
            num_warps=8 if rows == 1 else 4, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
        text_attention_kernel[(H, triton.cdiv(L, block_q * tiles))](
            q_LM, rstd, q_weight_M.contiguous(), k_SHD, v_SHD, q_LM if value_amax is None else value_amax, out,
            out_scale, text.count, text.last_log2, L, D**-0.5 * math.log2(math.e), AMAX_FLOOR, FP8_MAX, q_LM.stride(0),
            H, D=D, BLOCK_Q=block_q, BLOCK_S=one_block or _BLOCK_S, ONE_BLOCK=one_block is not None, TILES=tiles,
            QUANTIZE=quantize, num_warps=block_q // 16, num_stages=2, maxnreg=registers, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return Fp8Rows(out, out_scale) if quantize else out
