"""The Wan transformer once more for training: whole batches, gradients, and forward-mode derivatives.

`turbo_backend.nets.dit.WanDiT` is for inference: it runs without gradients and keeps samples apart. Here the same
weights are evaluated as one differentiable function; a test holds both to the same numbers. Block-sparse attention is
dense attention under the block map's mask, which costs what dense attention costs: right for the short sequences of
tiny models, wrong for large ones.

Shapes: B batch, L tokens, H heads, D channels of a head, M = H D, S text rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from turbo_backend.nets.attention import CrossAttention, SelfAttention
from turbo_backend.nets.dit import Block, WanDiT, patchify, sinusoidal_embedding, unpatchify
from turbo_backend.nets.rope import rope_table
from turbo_kernels.block_map import num_blocks, num_selected_blocks
from turbo_kernels.linear_attention import DENOMINATOR_FLOOR


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Text embeddings [B, S, C] and each prompt's number of rows [B]; rows past it are not read."""

    embeddings: Tensor
    lengths: Tensor

    def __getitem__(self, rows: slice) -> TextBatch:
        return TextBatch(self.embeddings[rows], self.lengths[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingAttention:
    """How self-attention is computed.

    Attributes:
        topk: share of key blocks in the sparse branch of sparse-linear attention; None for dense attention.
        block_q, block_k: its geometry.
        explicit: softmax(q k^T) v written out, which has forward-mode derivatives; fused kernels have none.
    """

    topk: float | None = None
    block_q: int = 128
    block_k: int = 64
    explicit: bool = False


DENSE = TrainingAttention()


def velocity(
    net: WanDiT, latents: Tensor, timesteps: Tensor, text: TextBatch, *, attention: TrainingAttention = DENSE
) -> Tensor:
    """The velocity of a batch, differentiable in weights, latents, timesteps and text.

    Args:
        latents: [B, in_channels, T, h, w].
        timesteps: [B], 1000 t.

    Returns:
        float32 [B, out_channels, T, h, w].
    """
    config = net.config
    p_t, p_h, p_w = config.patch_size
    grid = (latents.shape[2] // p_t, latents.shape[3] // p_h, latents.shape[4] // p_w)
    rope = rope_table(grid, config.head_dim, latents.device)
    with torch.autocast(latents.device.type, enabled=False):
        first, act, second = net.time_embedding
        act_again, projection = net.time_projection
        time_BM = second(act(first(sinusoidal_embedding(timesteps, config.freq_dim))))
        modulation_B6M = projection(act_again(time_BM)).unflatten(-1, (6, config.dim))
    context_BSM, bias = _embed_text(net, text)
    x_BLM = net.patch_embedding(patchify(latents, config.patch_size))
    for block in net.blocks:
        assert isinstance(block, Block)
        x_BLM = _block(block, x_BLM, block.modulation + modulation_B6M, context_BSM, bias, rope, attention)
    shift, scale = (net.head.modulation + time_BM[:, None]).unbind(1)
    with torch.autocast(latents.device.type, enabled=False):
        out_BLP = net.head.head(_modulate(x_BLM, shift, scale, config.eps))
    return unpatchify(out_BLP, grid, config.patch_size)


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


def _block(
    block: Block,
    x_BLM: Tensor,
    modulation_B6M: Tensor,
    context_BSM: Tensor,
    bias: Tensor,
    rope: Tensor,
    attention: TrainingAttention,
) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in modulation_B6M.unbind(1))
    eps, dim = block.eps, (x_BLM.shape[-1],)
    h = F.layer_norm(x_BLM.float(), dim, eps=eps) * (1 + scale1) + shift1
    x_BLM = x_BLM + gate1 * _self_attention(block.self_attn, h, rope, attention)
    h = F.layer_norm(x_BLM.float(), dim, block.norm3.weight, block.norm3.bias, eps)
    x_BLM = x_BLM + _cross_attention(block.cross_attn, h, context_BSM, bias, explicit=attention.explicit)
    h = F.layer_norm(x_BLM.float(), dim, eps=eps) * (1 + scale2) + shift2
    out: Tensor = x_BLM + gate2 * block.ffn(h)
    return out


def _modulate(x_BLM: Tensor, shift_BM: Tensor, scale_BM: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_BLM.float(), (x_BLM.shape[-1],), eps=eps) * (1 + scale_BM[:, None]) + shift_BM[:, None]


def _heads(x_BLM: Tensor, num_heads: int) -> Tensor:
    """[B, L, M] to [B, H, L, D]."""
    return x_BLM.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _normalize(x_BLM: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x_BLM.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x_BHLD: Tensor, rope: Tensor) -> Tensor:
    even, odd = x_BHLD[..., 0::2], x_BHLD[..., 1::2]
    cos, sin = rope[..., 0], rope[..., 1]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def _self_attention(layer: SelfAttention, h_BLM: Tensor, rope: Tensor, attention: TrainingAttention) -> Tensor:
    dtype = torch.get_autocast_dtype(h_BLM.device.type) if torch.is_autocast_enabled(h_BLM.device.type) else h_BLM.dtype
    q = _rotate(_heads(_normalize(layer.q(h_BLM), layer.norm_q.weight, layer.eps), layer.num_heads), rope).to(dtype)
    k = _rotate(_heads(_normalize(layer.k(h_BLM), layer.norm_k.weight, layer.eps), layer.num_heads), rope).to(dtype)
    v = _heads(layer.v(h_BLM), layer.num_heads)
    if attention.topk is None:
        out = _attend(q, k, v, None, explicit=attention.explicit)
    else:
        assert layer.attn_op is not None
        bias = _block_bias(q, k, attention)
        out = _attend(q, k, v, bias, explicit=attention.explicit)
        out = out + layer.attn_op.local_attn.proj_l(_linear_attention(q, k, v))
    result: Tensor = layer.o(out.transpose(1, 2).flatten(2))
    return result


def _cross_attention(
    layer: CrossAttention, h_BLM: Tensor, context_BSM: Tensor, bias: Tensor, *, explicit: bool
) -> Tensor:
    q = _heads(_normalize(layer.q(h_BLM), layer.norm_q.weight, layer.eps), layer.num_heads)
    k = _heads(_normalize(layer.k(context_BSM), layer.norm_k.weight, layer.eps), layer.num_heads)
    v = _heads(layer.v(context_BSM), layer.num_heads)
    out = _attend(q.to(v.dtype), k.to(v.dtype), v, bias, explicit=explicit)
    result: Tensor = layer.o(out.transpose(1, 2).flatten(2))
    return result


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, explicit: bool) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, [B, H, L, D]."""
    if explicit:
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return weights.to(v.dtype) @ v
    if bias is not None:
        bias = bias.to(q.dtype).expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _block_bias(q: Tensor, k: Tensor, attention: TrainingAttention) -> Tensor:
    """0 for keys of the selected blocks and -inf for others, [B, H, L, L]: the choice of `turbo_kernels.block_map`."""
    assert attention.topk is not None
    length = q.shape[2]
    pooled_q = _pool(q.detach().float(), attention.block_q)
    keys = k.detach().float()
    pooled_k = _pool(keys - keys.mean(2, keepdim=True), attention.block_k)
    num_selected = num_selected_blocks(attention.topk, num_blocks(length, attention.block_k))
    chosen = (pooled_q @ pooled_k.transpose(-1, -2)).topk(num_selected, dim=-1).indices
    blocks = torch.arange(pooled_k.shape[2], device=q.device)
    is_chosen = (chosen[..., None] == blocks).any(-2)  # [B, H, num_q_blocks, num_k_blocks]
    by_query = is_chosen.repeat_interleave(attention.block_q, 2)[:, :, :length]
    mask = by_query.repeat_interleave(attention.block_k, 3)[..., :length]
    return torch.where(mask, 0.0, -torch.inf)


def _pool(x_BHLD: Tensor, block: int) -> Tensor:
    length = x_BHLD.shape[2]
    blocks = num_blocks(length, block)
    sums = F.pad(x_BHLD, (0, 0, 0, blocks * block - length)).unflatten(2, (blocks, block)).sum(3)
    counts = torch.full((blocks, 1), float(block), device=x_BHLD.device)
    counts[-1] = length - (blocks - 1) * block
    return sums / counts


def _linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """phi(q) (phi(k)^T v) / (floor + phi(q) sum phi(k)) with phi the softmax over channels."""
    phi_q, phi_k = q.float().softmax(-1), k.float().softmax(-1)
    numerator = phi_q.to(v.dtype) @ (phi_k.to(v.dtype).transpose(-1, -2) @ v)
    denominator = DENOMINATOR_FLOOR + phi_q @ phi_k.sum(2, keepdim=True).transpose(-1, -2)
    return (numerator / denominator).to(v.dtype)
