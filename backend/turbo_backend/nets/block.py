"""A transformer block of the Wan diffusion transformer, as its formulas say.

Shapes: B batch, L tokens, M channels of the model.
"""

from __future__ import annotations

import torch
from torch import nn

from turbo_backend.config import DiTConfig
from turbo_backend.nets.attention import AttentionSettings, CrossAttention, SelfAttention
from turbo_backend.nets.text_context import TextContext
from turbo_backend.quantization import apply_linear
from turbo_kernels.residual_norm import gate_residual, layer_norm_modulate


class AffineNorm(nn.Module):
    """Weight and bias [M] of a LayerNorm that is computed by a fused kernel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))


class Block(nn.Module):
    """One transformer block.

    x += gate1 * SelfAttn(LN(x) (1 + scale1) + shift1)
    x += CrossAttn(LN_affine(x), text)
    x += gate2 * FFN(LN(x) (1 + scale2) + shift2),      FFN = Linear, GELU(tanh), Linear
    """

    def __init__(self, config: DiTConfig, *, sla: bool) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.self_attn = SelfAttention(config, sla=sla)
        self.cross_attn = CrossAttention(config)
        self.norm3 = AffineNorm(config.dim)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self,
        x_BLM: torch.Tensor,
        modulation_6BM: torch.Tensor,
        context: TextContext,
        layer: int,
        rope: torch.Tensor,
        attention: AttentionSettings,
    ) -> torch.Tensor:
        """x in the network's dtype; modulation float32: shift1, scale1, gate1, shift2, scale2, gate2."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_6BM.unbind(0)
        eps, provider = self.eps, attention.op_provider
        h = layer_norm_modulate(x_BLM, scale_BD=scale1, shift_BD=shift1, eps=eps)
        x_BLM = gate_residual(x_BLM, self.self_attn(h, rope, attention), gate1)
        norm3 = self.norm3
        h = layer_norm_modulate(x_BLM, weight=norm3.weight, bias=norm3.bias, eps=eps)
        x_BLM = x_BLM + self.cross_attn(h, context, layer, provider=provider)
        h = layer_norm_modulate(x_BLM, scale_BD=scale2, shift_BD=shift2, eps=eps)
        return gate_residual(x_BLM, self._feed_forward(h, provider), gate2)

    def _feed_forward(self, x_BLM: torch.Tensor, provider: str) -> torch.Tensor:
        up, gelu, down = self.ffn
        return apply_linear(down, gelu(apply_linear(up, x_BLM, provider=provider)), provider=provider)
