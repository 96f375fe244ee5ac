"""Self-attention with a bias by distance, over the first keys of a padded sequence.

    o_i = softmax_j(q_i k_j^T + bias[j - i]) v_j, j < length

No factor 1/sqrt(D). The bias is read by distance, so that no [L, L] matrix of it exists. Queries at and after
`length` are padding: what they give is finite and means nothing.
Source: T5 and UMT5 (relative position bias).
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl

from turbo_kernels.checks import HEAD_DIMS, check_float
from turbo_kernels.providers import FUSE_FMA, device_of, resolve_provider

_BLOCK_Q, _BLOCK_S = 64, 64


def relative_attention(
    qkv_LM: torch.Tensor, bias_HO: torch.Tensor, length: torch.Tensor, *, provider: str | None = None
) -> torch.Tensor:
    """One sample's self-attention.

    Args:
        qkv_LM: [L, 3 H D]: of each token all heads' queries, then keys, then values; D 64 or 128; any row stride.
        bias_HO: [H, 2 L - 1]: of each head the bias of j - i at index j - i + L - 1, contiguous.
        length: int32 [1] on the device of q, 1 to L: the keys that count. It is read by the kernel, so that a
            recorded launch serves every length.

    Returns:
        [L, H D] in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or provider that do not fit.
    """
    for name, tensor in (("qkv", qkv_LM), ("bias", bias_HO)):
        check_float(name, tensor)
        if tensor.ndim != 2 or 0 in tensor.shape or tensor.device != qkv_LM.device:
            raise ValueError(f"{name} is {tuple(tensor.shape)} on {tensor.device}: empty, or not a matrix beside qkv")
    L, H = qkv_LM.shape[0], bias_HO.shape[0]
    head_dim, rest = divmod(qkv_LM.shape[1], 3 * H)
    if rest or head_dim not in HEAD_DIMS or qkv_LM.stride(1) != 1:
        raise ValueError(f"qkv is {tuple(qkv_LM.shape)} for {H} heads: must be rows of 3 x {H} x 64 or 128")
    if bias_HO.shape[1] != 2 * L - 1 or not bias_HO.is_contiguous():
        raise ValueError(f"bias is {tuple(bias_HO.shape)}: must be {(H, 2 * L - 1)}, contiguous")
    if length.dtype != torch.int32 or length.shape != (1,) or length.device != qkv_LM.device:
        raise ValueError(f"length is {length.dtype} {tuple(length.shape)} on {length.device}: must be int32 [1] by qkv")
    provider = resolve_provider(provider, qkv_LM.device, op="relative_attention")
    if provider == "triton":
        return _relative_attention_triton(qkv_LM, bias_HO, length, head_dim)
    q, k, v = qkv_LM.float().view(L, 3, H, head_dim).unbind(1)
    positions = torch.arange(L, device=qkv_LM.device)
    distances = positions[None, :] - positions[:, None] + L - 1
    scores = torch.einsum("lhd,shd->hls", q, k) + bias_HO.float()[:, distances]
    scores = scores.masked_fill(positions >= length, float("-inf"))
    return torch.einsum("hls,shd->lhd", scores.softmax(-1), v).flatten(1).to(qkv_LM.dtype)


@triton.jit(do_not_specialize=["L"])
@no_type_check
def relative_attention_kernel(
    qkv,  # [L, 3 H D]
    bias,  # [H, 2 L - 1]
    length,  # [1]
    out,  # [L, H D] contiguous
    L,
    H,
    log2_e,
    stride_l,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_h = tl.program_id(1)
    o_l = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, D)
    in_l = o_l < L
    S = tl.load(length)
    p_q = qkv + i_h * D + o_d[None, :]
    p_k = p_q + H * D
    p_v = p_k + H * D
    p_bias = bias + i_h * (2 * L - 1) + L - 1
    b_q = tl.load(p_q + o_l.to(tl.int64)[:, None] * stride_l, mask=in_l[:, None], other=0.0)  # [BLOCK_Q, D]
    row_max = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    acc = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
    for start in range(0, S, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        in_s = o_s < S
        o_kv = o_s.to(tl.int64)[:, None] * stride_l
        b_k = tl.load(p_k + o_kv, mask=in_s[:, None], other=0.0)  # [BLOCK_S, D]
        b_v = tl.load(p_v + o_kv, mask=in_s[:, None], other=0.0)  # [BLOCK_S, D]
        o_bias = o_s[None, :] - o_l[:, None]
        b_bias = tl.load(p_bias + o_bias, mask=in_l[:, None] & in_s[None, :], other=0.0).to(tl.float32)
        b_s = (tl.dot(b_q, tl.trans(b_k), input_precision="ieee") + b_bias) * log2_e
        b_s = tl.where(in_s[None, :], b_s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(b_p, 1)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    p_out = out + o_l.to(tl.int64)[:, None] * (H * D) + i_h * D + o_d[None, :]
    tl.store(p_out, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=in_l[:, None])


def _relative_attention_triton(
    qkv_LM: torch.Tensor, bias_HO: torch.Tensor, length: torch.Tensor, head_dim: int
) -> torch.Tensor:
    L, H = qkv_LM.shape[0], bias_HO.shape[0]
    out = torch.empty(L, H * head_dim, dtype=qkv_LM.dtype, device=qkv_LM.device)
    with device_of(qkv_LM):
        relative_attention_kernel[(triton.cdiv(L, _BLOCK_Q), H)](
            qkv_LM, bias_HO, length, out, L, H, math.log2(math.e), qkv_LM.stride(0),
            D=head_dim, BLOCK_Q=_BLOCK_Q, BLOCK_S=_BLOCK_S, num_warps=4, num_stages=2, enable_fp_fusion=FUSE_FMA,
        )  # fmt: skip
    return out
