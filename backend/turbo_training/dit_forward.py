"""The Wan transformer once more for training: whole batches, gradients, and forward-mode derivatives.

`turbo_backend.nets.dit.WanDiT` is for inference: it runs without gradients and keeps samples apart. Here the same
weights are evaluated as one differentiable function; a test holds both to the same numbers.

Shapes: B batch, L tokens, H heads, D channels of a head, M = H D, S text rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from turbo_backend.nets.attention import CrossAttention, SelfAttention
from turbo_backend.nets.block import Block
from turbo_backend.nets.dit import WanDiT, patchify, sinusoidal_embedding, unpatchify
from turbo_backend.nets.rope import rope_table
from turbo_training.attention_forward import (
    DENSE,
    TrainingAttention,
    attend,
    linear_attend,
    select_blocks,
    sparse_attend,
)
from turbo_training.compiling import compile_often


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Text embeddings [B, S, C] and each prompt's number of rows [B]; rows past it are not read."""

    embeddings: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class Condition:
    """What clips shall show: a text each and, of image-to-video, the mask and latents of an image [B, 20, T, h, w]."""

    text: TextBatch
    image: Tensor | None = None

    def first(self, count: int) -> Condition:
        """The first of the batch."""
        text = TextBatch(self.text.embeddings[:count], self.text.lengths[:count])
        return Condition(text, None if self.image is None else self.image[:count])


def velocity(
    net: WanDiT,
    latents: Tensor,
    timesteps: Tensor,
    condition: Condition,
    *,
    attention: TrainingAttention = DENSE,
    compiled: bool = False,
    streams: list[Tensor] | None = None,
) -> Tensor:
    """The velocity of a batch, differentiable in weights, latents, timesteps and text.

    Args:
        latents: [B, 16, T, h, w].
        timesteps: [B], 1000 t.
        compiled: let torch.compile fuse what lies between the matrix products; it knows no forward mode.
        streams: if given, the residual stream after each block, float32 [B, L, M], is appended.

    Returns:
        float32 [B, out_channels, T, h, w].
    """
    config = net.config
    p_t, p_h, p_w = config.patch_size
    grid = (latents.shape[2] // p_t, latents.shape[3] // p_h, latents.shape[4] // p_w)
    rope = rope_table(grid, config.head_dim, latents.device)
    if condition.image is not None:
        latents = torch.cat((latents, condition.image), dim=1)
    with torch.autocast(latents.device.type, enabled=False):
        first, act, second = net.time_embedding
        act_again, projection = net.time_projection
        time_BM = second(act(first(sinusoidal_embedding(timesteps, config.freq_dim))))
        modulation_B6M = projection(act_again(time_BM)).unflatten(-1, (6, config.dim))
    context_BSM, bias = _embed_text(net, condition.text)
    between = _compiled_between() if compiled else _BETWEEN
    stream = _Stream(net.patch_embedding(patchify(latents, config.patch_size)).float())
    for index, block in enumerate(net.blocks):
        assert isinstance(block, Block)
        modulation = tuple((block.modulation + modulation_B6M)[:, :, None].unbind(1))
        stream, x_BLM = _block(block, stream, modulation, context_BSM, bias, rope, attention, between)
        if streams is not None and index:
            streams.append(x_BLM)
    shift, scale = (net.head.modulation + time_BM[:, None])[:, :, None].unbind(1)
    with torch.autocast(latents.device.type, enabled=False):
        x_BLM, h = between.join_norm(stream.x, stream.out, stream.gate, 1 + scale, shift, config.eps, torch.float32)
        out_BLP = net.head.head(h)
    if streams is not None:
        streams.append(x_BLM)
    return unpatchify(out_BLP, grid, config.patch_size)


@dataclass(frozen=True, slots=True)
class _Stream:
    """The residual stream x + gate out, of which the sum is taken together with the next norm."""

    x: Tensor
    out: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Between:
    """What a block does between its matrix products."""

    join_norm: Callable[..., tuple[Tensor, Tensor]]
    norm_rotate: Callable[..., Tensor]
    select_blocks: Callable[..., Tensor] = select_blocks
    linear_attend: Callable[..., Tensor] = linear_attend


def _join_norm(
    x_BLM: Tensor, out: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + gate out, and LN(x + gate out) scale + shift in `dtype`."""
    if out is not None:
        x_BLM = x_BLM + (out if gate is None else gate * out)
    return x_BLM, (F.layer_norm(x_BLM, (x_BLM.shape[-1],), eps=eps) * scale + shift).to(dtype)


def _norm_rotate(
    x_BLM: Tensor, weight: Tensor, rope: Tensor | None, num_heads: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """RMSNorm over all heads together, then the rotation of pairs: [B, L, M] to [B, H, L, D] in `dtype`."""
    x = x_BLM.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    x = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    if rope is not None:
        even, odd = x[..., 0::2], x[..., 1::2]
        cos, sin = rope[..., 0], rope[..., 1]
        x = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return x.to(dtype)


_BETWEEN = _Between(_join_norm, _norm_rotate)


@lru_cache(maxsize=1)
def _compiled_between() -> _Between:
    return _Between(
        join_norm=_compile_for_any_batch(_join_norm),
        norm_rotate=_compile_for_any_batch(_norm_rotate),
        select_blocks=_compile_for_any_batch(select_blocks),
        linear_attend=_compile_for_any_batch(linear_attend),
    )


def _compile_for_any_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = compile_often(function)

    def call(*arguments: object) -> Any:
        for tensor in arguments:
            # The table of the rotation alone has three dimensions and no batch.
            if isinstance(tensor, Tensor) and tensor.dim() >= 3 and tensor.shape[0] > 1 and tensor.shape[-1] != 2:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*arguments)

    return call


def _block(
    block: Block,
    stream: _Stream,
    modulation: tuple[Tensor, ...],
    context_BSM: Tensor,
    bias: Tensor,
    rope: Tensor,
    attention: TrainingAttention,
    between: _Between,
) -> tuple[_Stream, Tensor]:
    """The stream after a block and, joined, before it: in float32, matrix products in autocast's dtype.

    Args:
        modulation: [B, 1, M] each.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    eps, dtype, norm3 = block.eps, _compute_dtype(stream.x), block.norm3
    before_BLM, h = between.join_norm(stream.x, stream.out, stream.gate, 1 + scale1, shift1, eps, dtype)
    out = _self_attention(block.self_attn, h, rope, attention, between)
    x_BLM, h = between.join_norm(before_BLM, out, gate1, norm3.weight, norm3.bias, eps, dtype)
    out = _cross_attention(block.cross_attn, h, context_BSM, bias, attention.explicit, between)
    x_BLM, h = between.join_norm(x_BLM, out, None, 1 + scale2, shift2, eps, dtype)
    return _Stream(x_BLM, block.ffn(h), gate2), before_BLM


def _self_attention(
    layer: SelfAttention, h_BLM: Tensor, rope: Tensor, attention: TrainingAttention, between: _Between
) -> Tensor:
    num_heads, eps, dtype = layer.num_heads, layer.eps, _compute_dtype(h_BLM)
    q = between.norm_rotate(layer.q(h_BLM), layer.norm_q.weight, rope, num_heads, eps, dtype)
    k = between.norm_rotate(layer.k(h_BLM), layer.norm_k.weight, rope, num_heads, eps, dtype)
    v = layer.v(h_BLM).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    if attention.topk is None:
        out = attend(q, k, v, explicit=attention.explicit)
    else:
        assert layer.attn_op is not None
        chosen = between.select_blocks(q, k, attention)
        out = sparse_attend(q, k, v, chosen, attention)
        out = out + layer.attn_op.local_attn.proj_l(between.linear_attend(q, k, v))
    result: Tensor = layer.o(out.transpose(1, 2).flatten(2))
    return result


def _cross_attention(
    layer: CrossAttention, h_BLM: Tensor, context_BSM: Tensor, bias: Tensor, explicit: bool, between: _Between
) -> Tensor:
    num_heads, eps = layer.num_heads, layer.eps
    v = layer.v(context_BSM).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    q = between.norm_rotate(layer.q(h_BLM), layer.norm_q.weight, None, num_heads, eps, v.dtype)
    k = between.norm_rotate(layer.k(context_BSM), layer.norm_k.weight, None, num_heads, eps, v.dtype)
    result: Tensor = layer.o(attend(q, k, v, bias, explicit=explicit).transpose(1, 2).flatten(2))
    return result


def _embed_text(net: WanDiT, text: TextBatch) -> tuple[Tensor, Tensor]:
    """Embedded rows [B, S + 8, M], the first after the text standing for all padding, and biases [B, 1, 1, S + 8].

    The other seven rows weigh nothing: fused attention wants biases whose rows are multiples of eight long.
    """
    batch_size, num_rows, _ = text.embeddings.shape
    is_text = torch.arange(num_rows, device=text.embeddings.device) < text.lengths[:, None]
    rows = F.pad(text.embeddings * is_text[..., None], (0, 0, 0, 8))
    num_padding = (net.config.text_len - text.lengths).float()
    bias = F.pad(torch.where(is_text, 0.0, -torch.inf), (0, 8), value=-torch.inf)
    bias[:, num_rows] = num_padding.log()
    return net.text_embedding(rows), bias.view(batch_size, 1, 1, -1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
