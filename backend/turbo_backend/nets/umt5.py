"""The UMT5 encoder that turns a prompt's tokens into text embeddings.

Parameter names are those of `models_t5_umt5-xxl-enc-bf16.pth`. Shapes: B batch, S tokens with padding, L tokens of
one prompt, D model width, H heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo_backend.config import TextEncoderConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.nets.umt5_fused import FusedEncoder
from turbo_backend.quantization import quantize_to_fp8
from turbo_kernels.checks import HEAD_DIMS


def relative_buckets(length: int, *, num_buckets: int, max_distance: int) -> Tensor:
    """The bias bucket of each distance between key and query (T5, bidirectional).

    Half the buckets are for keys after the query. Of each half, one half holds single distances |j - i| and the
    other a logarithmic scale from there to `max_distance`; the last takes everything beyond.

    Args:
        length: L, the number of tokens.
        num_buckets: of both directions together.
        max_distance: from which all distances share a bucket.

    Returns:
        int64 [2 L - 1]: the bucket of j - i at index j - i + L - 1; on the CPU.
    """
    one_way = num_buckets // 2
    num_exact = one_way // 2
    offsets = torch.arange(1 - length, length, device="cpu")
    distances = offsets.abs()
    ratio = torch.log(distances.clamp_min(1).float() / num_exact) / math.log(max_distance / num_exact)
    scaled = (num_exact + (ratio * (one_way - num_exact)).long()).clamp_max(one_way - 1)
    return torch.where(distances < num_exact, distances, scaled) + one_way * (offsets > 0)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistics in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        scale = torch.rsqrt(x_fp32.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x_fp32 * scale).to(self.weight.dtype) * self.weight


class RelativeBias(nn.Module):
    """A learned addition to the attention logits for each head and bucket of distance."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """Buckets [2 L - 1] to logit bias [1, H, L, L] (query, key)."""
        length = (buckets.shape[0] + 1) // 2
        by_offset: Tensor = self.embedding(buckets).t()
        # Row i holds the offsets -i .. L - 1 - i, that is a window of L values that starts at L - 1 - i.
        return by_offset.unfold(1, length, 1).flip(1).unsqueeze(0)


class SelfAttention(nn.Module):
    """softmax(q k^T + bias) v, without the usual 1/sqrt(d)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.k = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.v = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def forward(self, x_1LD: Tensor, bias_1HLL: Tensor) -> Tensor:
        q, k, v = (
            linear(x_1LD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        # The softmax inside is taken in fp32 whatever the dtype of its operands.
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_1HLL, scale=1.0)
        out: Tensor = self.o(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """fc2(fc1(x) * gelu_tanh(gate(x)))."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x) * self.gate(x))
        return out


class Block(nn.Module):
    """x + attention(norm1(x)), then x + ffn(norm2(x)); each block has a relative bias of its own."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = SelfAttention(config)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.pos_embedding = RelativeBias(config)

    def forward(self, x_1LD: Tensor, buckets: Tensor) -> Tensor:
        x_1LD = x_1LD + self.attn(self.norm1(x_1LD), self.pos_embedding(buckets))
        return x_1LD + self.ffn(self.norm2(x_1LD))  # type: ignore[no-any-return]


class UMT5Encoder(nn.Module):
    """Token ids to text embeddings.

    Each prompt runs alone. Padding that every row is masked against changes nothing but the cost, and matrix products
    of another number of rows may round differently: so a prompt runs at its true length, or prepared for a GPU at that
    length rounded up to a multiple of 32, and has the same embedding, bit for bit, in any batch.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.eps)
        self._fused: FusedEncoder | None = None

    @property
    def device(self) -> torch.device:
        """Where the blocks run; the token table may be elsewhere."""
        return self.norm.weight.device

    @torch.no_grad()
    def prepare_for_inference(self, device: torch.device, *, quantize: bool = False) -> None:
        """Moves loaded weights to where they run and suits them to it; call it once, after loading.

        On a GPU in 16 bits the projections of q, k and v become one product, and so do those of gate and fc1, under
        the same state-dict keys, and a block runs through fused kernels (`umt5_fused`): the weights must then stay
        where they are. On the CPU, in float32, or with heads that those kernels do not take, the plain layers run.

        Args:
            device: of the blocks.
            quantize: turn the linears of the blocks into e4m3 ones (`Fp8Linear`), one at a time, and keep the token
                table, of which a prompt takes a few rows, in the host's memory; for a bfloat16 network on a GPU that
                multiplies e4m3.
        """
        if quantize:
            quantize_to_fp8(self, device)
            self.token_embedding.cpu()
            self.blocks.to(device)
            self.norm.to(device)
        else:
            self.to(device)
        fits = self.config.dim_attn // self.config.num_heads in HEAD_DIMS
        if device.type == "cuda" and self.norm.weight.dtype != torch.float32 and fits:
            self._fused = FusedEncoder(self)

    def warm_up(self, max_tokens: int) -> None:
        """Compiles and records now, on a GPU, what prompts of up to `max_tokens` tokens will run."""
        if self._fused is not None:
            self._fused.record(max_tokens)

    def bias_by_distance(self, num_tokens: int) -> Tensor:
        """[num_layers, H, 2 L - 1]: every layer's bias of key j to query i at index j - i + L - 1."""
        config = self.config
        buckets = relative_buckets(num_tokens, num_buckets=config.num_buckets, max_distance=config.max_distance)
        biases = [block.pos_embedding for block in self.blocks]
        tables = torch.stack([bias.embedding.weight for bias in biases])  # type: ignore[union-attr, misc]
        return tables[:, buckets.to(tables.device)].transpose(1, 2).contiguous()

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
        """Embeds a batch of prompts.

        Args:
            token_ids: int64 [B, S], best on the CPU; what stands at and after a prompt's length is not looked at.
            lengths: [B], 1 to S tokens, the closing </s> included.

        Returns:
            [B, S, D] in the dtype of the weights, on their device; zeros at and after each length.

        Raises:
            InvalidArgument: shapes, lengths or ids that do not fit.
        """
        if token_ids.dim() != 2 or token_ids.is_floating_point():
            shown = (token_ids.dtype, tuple(token_ids.shape))
            raise InvalidArgument("token_ids", shown, "integers [B, S]")
        batch, size = token_ids.shape
        counts = [int(length) for length in lengths]
        if len(counts) != batch or not all(1 <= count <= size for count in counts):
            raise InvalidArgument("lengths", counts, f"{batch} of 1 to {size} tokens")
        embeddings = self.norm.weight.new_zeros(batch, size, self.config.dim)
        for i_sample, count in enumerate(counts):
            embeddings[i_sample, :count] = self._encode(token_ids[i_sample, :count].cpu())
        return embeddings

    def _encode(self, token_ids_L: Tensor) -> Tensor:
        """[L] token ids of one prompt, on the CPU, to [L, D]."""
        config = self.config
        low, high = (int(bound) for bound in token_ids_L.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise InvalidArgument("token_ids", (low, high), f"within 0 .. {config.vocab_size - 1}")
        if self._fused is not None:
            return self._fused(token_ids_L)
        buckets = relative_buckets(
            token_ids_L.shape[0], num_buckets=config.num_buckets, max_distance=config.max_distance
        ).to(self.device)
        x_1LD = self.token_embedding(token_ids_L.to(self.device)).unsqueeze(0)
        for block in self.blocks:
            x_1LD = block(x_1LD, buckets)
        return self.norm(x_1LD)[0]  # type: ignore[no-any-return]
