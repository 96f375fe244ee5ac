"""A transformer block as a GPU runs it: the formulas of `block.Block` in the fewest passes over memory.

    norm, modulation and 8-bit rounding ride on the addition of the branch before     (`residual_norm`)
    q, k, v              one product; norm and rotation of q and k, and what attention
                         needs to know of them, in one kernel                          (`qk_norm_rope_gather`)
    self-attention       both branches and, as `sagesla`, 8-bit rounding in one kernel
                                                                              (`sla_attention_of_projections`)
    cross-attention      softmax and 8-bit rounding in one kernel                      (`text_attention`)
    GELU                 in the epilogue of its product, its 8-bit rounding too where cuBLASLt offers that
                         (`fp8_gelu_linear`), else together with that rounding         (`quantize_fp8_rows`)

Shapes: B batch, L tokens, H heads, D channels of a head, M channels of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from turbo_backend.nets.attention import AttentionSettings, CrossAttention, SelfAttention
from turbo_backend.nets.block import Block
from turbo_backend.nets.text_context import TextContext
from turbo_backend.quantization import Fp8Linear, LinearWeights
from turbo_kernels.fp8_gelu_linear import Fp8Samples, ffn_bounds, fp8_gelu_linear
from turbo_kernels.fp8_linear import Fp8Rows, quantize_fp8_rows
from turbo_kernels.residual_norm import residual_norm
from turbo_kernels.text_attention import text_attention

Activations = torch.Tensor | Fp8Rows


@dataclass(frozen=True, slots=True)
class FFNScales:
    """Scales of one layer's feed-forward, known before it runs: of its input h and of GELU(h W^T + b), float32 [B]."""

    h: torch.Tensor
    hidden: torch.Tensor


def ffn_scales(blocks: Sequence[Block], modulation: torch.Tensor) -> list[FFNScales] | None:
    """Every layer's, from one step's modulation [num_layers, 6, B, M]; None unless its linears are uniform e4m3.

    Sample by sample: the order of a sum over M may change with the shape of what is summed.
    """
    ups = [block.ffn[0] for block in blocks]
    if not all(isinstance(up, Fp8Linear) and up.uniform for up in ups):
        return None
    weight_norm = torch.stack([up.get_buffer("weight_norm") for up in ups])
    bias_amax = torch.stack([up.get_buffer("bias_amax") for up in ups])
    samples = [
        ffn_bounds(one[:, 4].contiguous(), one[:, 3].contiguous(), weight_norm, bias_amax)
        for one in modulation.unbind(2)
    ]
    h, hidden = (torch.stack(scales, dim=1) for scales in zip(*samples, strict=True))
    return [FFNScales(h_B, hidden_B) for h_B, hidden_B in zip(h, hidden, strict=True)]


class FusedStream:
    """The residual stream [B, L, M], and the last branch's output, which the next norm adds to it."""

    def __init__(self, x_BLM: torch.Tensor, provider: str) -> None:
        self._x = x_BLM
        self._branch: torch.Tensor | None = None
        self._gate: torch.Tensor | None = None
        self._provider = provider

    def add(self, branch_BLM: torch.Tensor, gate_BM: torch.Tensor | None) -> None:
        """Leaves x + branch * gate to the next `norm`."""
        assert self._branch is None
        self._branch, self._gate = branch_BLM, gate_BM

    def norm(self, **parameters: Any) -> Activations:
        """Completes the stream and returns its norm; `parameters` as `residual_norm` takes them."""
        h = self._norm(**parameters)
        assert not isinstance(h, Fp8Samples)
        return h

    def norm_by_scale(self, out_scale_B: torch.Tensor, **parameters: Any) -> Fp8Samples:
        """The same in e4m3 with given scales."""
        h = self._norm(out_scale_B=out_scale_B, out_dtype=torch.float8_e4m3fn, **parameters)
        assert isinstance(h, Fp8Samples)
        return h

    def _norm(self, **parameters: Any) -> Activations | Fp8Samples:
        self._x, h = residual_norm(self._x, self._branch, self._gate, **parameters, provider=self._provider)
        self._branch = self._gate = None
        return h


def run_block(
    block: Block,
    stream: FusedStream,
    modulation_6BM: torch.Tensor,
    context: TextContext,
    layer: int,
    rope: torch.Tensor,
    attention: AttentionSettings,
    scales: FFNScales | None,
) -> None:
    """One block; modulation float32: shift1, scale1, gate1, shift2, scale2, gate2; scales from `ffn_scales`."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation_6BM.unbind(0)
    eps, provider = block.eps, attention.op_provider
    self_attn, cross_attn = block.self_attn, block.cross_attn
    h = stream.norm(scale_BD=scale1, shift_BD=shift1, eps=eps, out_dtype=_input_dtype(self_attn.q))
    stream.add(_attend_to_video(self_attn, h, rope, attention), gate1)
    norm3 = block.norm3
    h = stream.norm(weight=norm3.weight, bias=norm3.bias, eps=eps, out_dtype=_input_dtype(cross_attn.q))
    stream.add(_attend_to_text(cross_attn, h, context, layer, provider), None)
    if scales is None:
        h = stream.norm(scale_BD=scale2, shift_BD=shift2, eps=eps, out_dtype=_input_dtype(block.ffn[0]))
        hidden = _expand(block.ffn, h, provider)
    else:
        h8 = stream.norm_by_scale(scales.h, scale_BD=scale2, shift_BD=shift2, eps=eps)
        hidden = _expand_fp8(block.ffn, h8, scales.hidden, provider)
    stream.add(LinearWeights.of(block.ffn[2]).multiply(hidden, provider=provider), gate2)


def _input_dtype(linear: nn.Module) -> torch.dtype | None:
    """e4m3 for a linear that multiplies it; None is the dtype of the stream."""
    return torch.float8_e4m3fn if isinstance(linear, Fp8Linear) else None


def _attend_to_video(
    attn: SelfAttention, h: Activations, rope: torch.Tensor, attention: AttentionSettings
) -> torch.Tensor:
    provider = attention.op_provider
    linears = (attn.q, attn.k, attn.v)
    joint = LinearWeights.joined(linears)
    if joint is None:  # not laid side by side: three products
        q, k, v = (LinearWeights.of(linear).multiply(h, provider=provider) for linear in linears)
    else:
        q, k, v = joint.multiply(h, provider=provider).chunk(3, dim=-1)
    v_BLHD = v.view(*v.shape[:-1], attn.num_heads, -1)
    out_BLM = attn.attend_projections(q, k, v_BLHD, rope, attention, fp8=isinstance(attn.o, Fp8Linear))
    return LinearWeights.of(attn.o).multiply(out_BLM, provider=provider)


def _attend_to_text(
    attn: CrossAttention, h: Activations, context: TextContext, layer: int, provider: str
) -> torch.Tensor:
    q_BLM = LinearWeights.of(attn.q).multiply(h, provider=provider)
    in_fp8 = isinstance(attn.o, Fp8Linear)
    outs = []
    for q_LM, sample in zip(q_BLM, context.samples, strict=True):  # prompts differ in length
        text = sample.read(layer, attn.project_context)
        outs.append(
            text_attention(
                q_LM,
                attn.norm_q.weight,
                text.keys,
                text.values,
                eps=attn.eps,
                text=sample.rows,
                value_amax=text.value_amax if in_fp8 else None,
                provider=provider,
            )
        )
    return LinearWeights.of(attn.o).multiply(_stack(outs), provider=provider)


def _stack(samples: list[Activations]) -> Activations:
    """[B, ...] of samples alike; one alone is not copied."""
    rows = [sample for sample in samples if isinstance(sample, Fp8Rows)]
    if rows:
        values = [row.values.view(torch.uint8) for row in rows]
        scales = [row.scale for row in rows]
        if len(rows) == 1:
            return Fp8Rows(rows[0].values[None], scales[0][None])
        return Fp8Rows(torch.stack(values).view(torch.float8_e4m3fn), torch.stack(scales))
    tensors = [sample for sample in samples if isinstance(sample, torch.Tensor)]
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _expand(ffn: nn.Sequential, h: Activations, provider: str) -> Activations:
    """GELU(h W^T + b), as the second linear reads it."""
    up, _, down = ffn
    weights = LinearWeights.of(up)
    if isinstance(down, Fp8Linear):
        return quantize_fp8_rows(weights.multiply(h, provider=provider), gelu=True, provider=provider)
    return weights.multiply(h, provider=provider, gelu=True)


def _expand_fp8(ffn: nn.Sequential, h: Fp8Samples, hidden_scale_B: torch.Tensor, provider: str) -> Fp8Rows:
    """The same in one kernel."""
    up = ffn[0]
    assert isinstance(up, Fp8Linear)
    assert up.bias is not None
    return fp8_gelu_linear(h, Fp8Rows(up.fp8_weight, up.scale), up.bias, hidden_scale_B, provider=provider)
