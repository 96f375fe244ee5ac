"""Self- and cross-attention of the Wan transformer.

Shapes: B batch, L tokens, H heads, D channels of a head, M = H * D channels of the model, S text rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from turbo_backend.config import DiTConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.nets.text_context import LayerText, PromptContext, TextContext
from turbo_backend.quantization import apply_linear
from turbo_kernels import dense_attention, rms_norm_rope, sla_attention
from turbo_kernels.attention import sla_attention_of_projections
from turbo_kernels.fp8_linear import Fp8Rows

ATTENTION_TYPES = ("original", "sla", "sagesla")


def offered_types(provider: str) -> tuple[str, ...]:
    """The attention types that a provider computes."""
    return ("sagesla",) if provider == "spargeattn" else ATTENTION_TYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """How self-attention is computed.

    Attributes:
        attention_type: `original` (dense), `sla` or `sagesla` (sparse plus linear; the latter with 8-bit products).
        sla_topk: share of key blocks in the sparse branch, in (0, 1]; `original` does not use it.
        provider: implementation, as in turbo_kernels: `reference`, `triton`, or `spargeattn` (`sagesla` only).
    """

    attention_type: str
    sla_topk: float = 0.1
    provider: str

    def __post_init__(self) -> None:
        if self.attention_type not in ATTENTION_TYPES:
            raise InvalidArgument("ATTENTION_TYPE", self.attention_type, f"one of {', '.join(ATTENTION_TYPES)}")
        if not 0 < self.sla_topk <= 1:
            raise InvalidArgument("SLA_TOPK", self.sla_topk, "over 0, at most 1")
        if self.attention_type not in offered_types(self.provider):
            raise InvalidArgument("attention provider", self.provider, "reference or triton unless sagesla")

    @property
    def op_provider(self) -> str:
        """Provider of everything but self-attention; SpargeAttn brings attention alone."""
        return "triton" if self.provider == "spargeattn" else self.provider


class RMSNormWeight(nn.Module):
    """Weight [M] of an RMSNorm over all heads together; the norm itself is fused with the rotation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class _LocalAttention(nn.Module):
    """The linear branch's output projection, [D, D], shared by all heads (SLA paper)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.proj_l = nn.Linear(head_dim, head_dim)


class _AttentionOp(nn.Module):
    """A level of upstream's module tree; holds nothing of its own."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.local_attn = _LocalAttention(head_dim)


class _Attention(nn.Module):
    """The projections that self- and cross-attention have in common."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.eps = config.eps
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNormWeight(config.dim)
        self.norm_k = RMSNormWeight(config.dim)

    def _norm_rope(
        self, x_BLM: torch.Tensor, norm: RMSNormWeight, rope: torch.Tensor | None, provider: str
    ) -> torch.Tensor:
        return rms_norm_rope(x_BLM, norm.weight, rope, num_heads=self.num_heads, eps=self.eps, provider=provider)

    def _split_heads(self, x_BLM: torch.Tensor) -> torch.Tensor:
        return x_BLM.view(*x_BLM.shape[:-1], self.num_heads, -1)


class SelfAttention(_Attention):
    """q, k, v of the video tokens; RMSNorm and RoPE on q and k; attention of the chosen type; output projection."""

    def __init__(self, config: DiTConfig, *, sla: bool) -> None:
        super().__init__(config)
        self.attn_op = _AttentionOp(config.head_dim) if sla else None

    def project_qkv(self, x_BLM: torch.Tensor, *, provider: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v as [B, L, M], of any strides with the last dimension contiguous."""
        q, k, v = (apply_linear(linear, x_BLM, provider=provider) for linear in (self.q, self.k, self.v))
        return q, k, v

    def forward(self, x_BLM: torch.Tensor, rope: torch.Tensor, attention: AttentionSettings) -> torch.Tensor:
        provider = attention.op_provider
        q_BLM, k_BLM, v_BLM = self.project_qkv(x_BLM, provider=provider)
        q_BLHD = self._norm_rope(q_BLM, self.norm_q, rope, provider)
        k_BLHD = self._norm_rope(k_BLM, self.norm_k, rope, provider)
        out_BLHD = self.attend(q_BLHD, k_BLHD, self._split_heads(v_BLM), attention)
        return apply_linear(self.o, out_BLHD.flatten(-2), provider=provider)

    def attend(
        self, q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor, attention: AttentionSettings
    ) -> torch.Tensor:
        """Attention of the chosen type on normalised, rotated queries and keys."""
        if attention.attention_type == "original":
            return dense_attention(q_BLHD, k_BLHD, v_BLHD, provider=attention.op_provider)
        proj_l = self._proj_l(attention)
        return sla_attention(
            q_BLHD,
            k_BLHD,
            v_BLHD,
            proj_l.weight,
            proj_l.bias,
            attention_type=attention.attention_type,
            topk=attention.sla_topk,
            provider=attention.provider,
        )

    def attend_projections(
        self,
        q_BLM: torch.Tensor,
        k_BLM: torch.Tensor,
        v_BLHD: torch.Tensor,
        rope: torch.Tensor,
        attention: AttentionSettings,
        *,
        fp8: bool,
    ) -> torch.Tensor | Fp8Rows:
        """Norm, rotation and `attend` in the fewest passes; [B, L, M], as e4m3 rows where asked for and offered.

        Our kernels offer them as `sagesla`.
        """
        if attention.attention_type == "original":
            q_BLHD = self._norm_rope(q_BLM, self.norm_q, rope, attention.op_provider)
            k_BLHD = self._norm_rope(k_BLM, self.norm_k, rope, attention.op_provider)
            return self.attend(q_BLHD, k_BLHD, v_BLHD, attention).flatten(-2)
        proj_l = self._proj_l(attention)
        out = sla_attention_of_projections(
            q_BLM,
            k_BLM,
            v_BLHD,
            self.norm_q.weight,
            self.norm_k.weight,
            rope,
            proj_l.weight,
            proj_l.bias,
            attention_type=attention.attention_type,
            topk=attention.sla_topk,
            eps=self.eps,
            fp8=fp8 and attention.attention_type == "sagesla" and attention.provider != "spargeattn",
            provider=attention.provider,
        )
        return out if isinstance(out, Fp8Rows) else out.flatten(-2)

    def _proj_l(self, attention: AttentionSettings) -> nn.Linear:
        if self.attn_op is None:
            raise InvalidArgument("ATTENTION_TYPE", attention.attention_type, "original: this network has no proj_l")
        return self.attn_op.local_attn.proj_l


class CrossAttention(_Attention):
    """Video tokens read the text; RMSNorm on q and k, no RoPE, dense."""

    def project_context(self, context_SM: torch.Tensor, *, provider: str) -> LayerText:
        """Keys and values of one prompt's embedded text [S, M]."""
        context_BSM = context_SM[None]
        k_BSM = apply_linear(self.k, context_BSM, provider=provider)
        k_BSHD = self._norm_rope(k_BSM, self.norm_k, None, provider)
        v_BSHD = self._split_heads(apply_linear(self.v, context_BSM, provider=provider))
        return LayerText(keys=k_BSHD[0], values=v_BSHD[0], value_amax=v_BSHD.abs().amax().float())

    def forward(self, x_BLM: torch.Tensor, context: TextContext, layer: int, *, provider: str) -> torch.Tensor:
        q_BLM = apply_linear(self.q, x_BLM, provider=provider)
        q_BLHD = self._norm_rope(q_BLM, self.norm_q, None, provider)
        # Sample by sample: prompts differ in length, and a sample's result must not depend on its neighbours.
        outs = []
        for q_LHD, sample in zip(q_BLHD, context.samples, strict=True):
            assert isinstance(sample, PromptContext)
            text = sample.read(layer, self.project_context)
            outs.append(attend_to_text(q_LHD[None], text.keys, text.values, sample.num_padding))
        out_BLHD = torch.cat(outs)
        return apply_linear(self.o, out_BLHD.flatten(-2), provider=provider)


def attend_to_text(
    q_BLHD: torch.Tensor, keys_SHD: torch.Tensor, values_SHD: torch.Tensor, num_padding: int
) -> torch.Tensor:
    """Dense attention to one prompt whose padding rows are collapsed into the last key.

    n equal keys with equal values weigh n exp(s) = exp(s + ln n) together: one key with ln n added to its
    logit is the same, exactly.
    """
    q_BHLD = q_BLHD.transpose(1, 2)
    k_BHSD = keys_SHD.transpose(0, 1)[None]
    v_BHSD = values_SHD.transpose(0, 1)[None]
    bias = None
    if num_padding > 1:
        bias = q_BLHD.new_zeros(1, 1, 1, keys_SHD.shape[0])
        bias[..., -1] = math.log(num_padding)
        bias = bias.expand(1, 1, q_BHLD.shape[2], -1)
    return F.scaled_dot_product_attention(q_BHLD, k_BHSD, v_BHSD, attn_mask=bias).transpose(1, 2)
