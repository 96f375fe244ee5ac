"""The Wan diffusion transformer (Wan2.1 T2V, Wan2.2 I2V), with upstream TurboDiffusion's module names.

Shapes: B batch, L tokens, H heads, D channels of a head, M channels of the model, S text rows; T, h, w latent
frames, height, width; C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from turbo_backend.config import DiTConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.block import Block
from turbo_backend.nets.fused import FusedStream, ffn_scales, run_block
from turbo_backend.nets.rope import rope_table
from turbo_backend.nets.text_context import LayerText, PromptContext, SampleContext, TextContext
from turbo_backend.quantization import (
    Fp8Linear,
    Int8Linear,
    LinearWeights,
    convert_to_fp8,
    lay_side_by_side,
)
from turbo_kernels import default_provider
from turbo_kernels.fp8_gelu_linear import multiplies_gelu_fp8
from turbo_kernels.fp8_linear import multiplies_fp8
from turbo_kernels.residual_norm import layer_norm_modulate

#: Parts of a key that mark tensors to keep in float32 whatever the network's dtype: the time path and the head are
#: computed in float32, norms apply their weights in float32, and int8 scales are float32 by format.
KEEP_FP32 = ("time_embedding.", "time_projection.", "modulation", "head.", "norm_q.", "norm_k.", "norm3.", ".scale")


class Head(nn.Module):
    """Linear(LN(x) (1 + scale) + shift) in float32, to one patch a token."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.head = nn.Linear(config.dim, config.out_channels * math.prod(config.patch_size))

    def forward(self, x_BLM: torch.Tensor, time_BM: torch.Tensor) -> torch.Tensor:
        shift, scale = self.shift_and_scale(time_BM)
        h = layer_norm_modulate(x_BLM.float(), scale_BD=scale, shift_BD=shift, eps=self.eps)
        return self.project(h)

    def shift_and_scale(self, time_BM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [B, M] each."""
        shift, scale = (self.modulation.float() + time_BM[:, None]).unbind(1)
        return shift, scale

    def project(self, h_BLM: torch.Tensor) -> torch.Tensor:
        """The modulated float32 norm to one patch a token."""
        return _linear_fp32(self.head, h_BLM)


class WanDiT(nn.Module):
    """Velocity v(x_t, t, text) of the rectified flow.

    State-dict keys equal those of the published checkpoints. The network is for inference: nothing requires
    gradients. It can be built on the `meta` device and have its weights assigned. The residual stream has the
    dtype of the patch embedding's weight; tensors named by `KEEP_FP32` may stay in float32.

    A sample's result is the same, bit for bit, alone or in any batch on the CPU.

    Args:
        sla: whether the linear branch's projections (`proj_l`) exist, as in every turbo checkpoint. A base Wan
            checkpoint has none and runs with attention type `original` alone.
    """

    def __init__(self, config: DiTConfig, *, sla: bool = True) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Linear(config.in_channels * math.prod(config.patch_size), dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, sla=sla) for _ in range(config.num_layers))
        self.head = Head(config)
        #: Called with a block's number once all that reads its weights is queued or done.
        self.after_block: Callable[[int], None] | None = None
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    @property
    def linear_kind(self) -> str:
        """How the blocks' linears multiply: `int8`, `fp8` (e4m3), or the dtype of the weights, such as `bfloat16`."""
        linear = self._typed_blocks()[0].ffn[0]
        if isinstance(linear, Int8Linear):
            return "int8"
        return "fp8" if isinstance(linear, Fp8Linear) else str(linear.weight.dtype).removeprefix("torch.")

    @torch.no_grad()
    def prepare_for_inference(self) -> None:
        """Suits loaded weights to their device; call it once, after loading. Does nothing on the CPU.

        On a GPU the projections of q, k and v become one product, under the same state-dict keys. Int8 linears of a
        bfloat16 network become e4m3 ones (`Fp8Linear`) where the GPU multiplies e4m3: `linear_kind` tells.
        """
        if self.device.type != "cuda":
            return
        if self.linear_kind == "int8" and self.dtype == torch.bfloat16 and multiplies_fp8(self.device):
            convert_to_fp8(self, fuse_gelu=multiplies_gelu_fp8(self.device))
        self.fuse_projections()

    def fuse_projections(self) -> None:
        """Lays q, k and v of every self-attention side by side, so that one product makes all three."""
        for block in self._typed_blocks():
            attn = block.self_attn
            lay_side_by_side((attn.q, attn.k, attn.v))

    @torch.no_grad()
    def prepare_context(
        self, text_embeddings_BSC: torch.Tensor, text_lengths: Sequence[int], *, provider: str | None = None
    ) -> TextContext:
        """Embeds prompts, once for all steps; each layer makes its keys and values of them when it first reads them.

        Wan pads text with zero rows to `text_len`, and the padding is attended to. All padding rows become the same
        key and value, so one row stands for them (see `attention.attend_to_text`).

        Args:
            text_embeddings_BSC: UMT5 output, S >= max(text_lengths); rows past a length are not read.
            text_lengths: valid rows of each prompt, 0 to text_len.
            provider: of the int8 linears and norms; by default the device's.

        Raises:
            InvalidArgument: shapes or lengths that do not fit.
        """
        config = self.config
        if text_embeddings_BSC.ndim != 3 or text_embeddings_BSC.shape[2] != config.text_dim:
            shape = tuple(text_embeddings_BSC.shape)
            raise InvalidArgument("text_embeddings", shape, f"of shape [B, S, {config.text_dim}]")
        batch_size, num_rows, _ = text_embeddings_BSC.shape
        longest = min(num_rows, config.text_len)
        if len(text_lengths) != batch_size or not all(0 <= length <= longest for length in text_lengths):
            fits = f"{batch_size} lengths of 0 to {longest}"
            raise InvalidArgument("text_lengths", list(text_lengths), fits)
        provider = provider or default_provider(self.device)
        text_embeddings_BSC = text_embeddings_BSC.to(device=self.device, dtype=self.dtype)
        return TextContext(
            tuple(
                self._prepare_sample(text_embeddings_BSC[i, :length], provider) for i, length in enumerate(text_lengths)
            )
        )

    def _prepare_sample(self, text_SC: torch.Tensor, provider: str) -> PromptContext:
        num_padding = self.config.text_len - text_SC.shape[0]
        if num_padding:
            text_SC = F.pad(text_SC, (0, 0, 0, 1))
        return PromptContext(self.text_embedding(text_SC), num_padding, provider)

    @torch.no_grad()
    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        context: TextContext,
        *,
        attention: AttentionSettings,
        rope: torch.Tensor | None = None,
        num_blocks: int | None = None,
    ) -> torch.Tensor:
        """One evaluation.

        Args:
            latents: [B, in_channels, T, h, w], any float dtype, h and w even; image conditioning is already
                concatenated on channels.
            timesteps: [B] float64 or float32, 1000 t as `sampler.RCMSchedule.network_timesteps` gives it.
            context: from `prepare_context`, of the same B.
            rope: table of `rope.rope_table`; looked up by default.
            num_blocks: run the first blocks alone, for a warm-up; all of them by default.

        Returns:
            float32 [B, out_channels, T, h, w].

        Raises:
            InvalidArgument: shapes that do not fit.
        """
        self._check_inputs(latents, timesteps, context)
        if rope is None:
            rope = rope_table(self.patch_grid(latents.shape), self.config.head_dim, self.device)
        sinusoids = sinusoidal_embedding(timesteps, self.config.freq_dim).to(self.device, non_blocking=True)
        return self.evaluate(latents, sinusoids, context, attention=attention, rope=rope, num_blocks=num_blocks)

    def evaluate(
        self,
        latents: torch.Tensor,
        sinusoids_BF: torch.Tensor,
        context: TextContext,
        *,
        attention: AttentionSettings,
        rope: torch.Tensor,
        num_blocks: int | None = None,
    ) -> torch.Tensor:
        """What `forward` does once its arguments are checked and on the device: all that a CUDA graph records.

        Args:
            sinusoids_BF: float32 [B, freq_dim] of the timesteps, from `sinusoidal_embedding`.
        """
        config, provider = self.config, attention.op_provider
        blocks = self._typed_blocks()[:num_blocks]
        time_BM, modulation = self._embed_time(sinusoids_BF, blocks)
        patches_BLC = patchify(latents.to(self.dtype), config.patch_size)
        if provider == "triton":
            x_BLM = LinearWeights.of(self.patch_embedding).multiply(patches_BLC, provider=provider)
            out_BLP = self._run_fused(blocks, x_BLM, time_BM, modulation, context, rope, attention)
        else:
            x_BLM = self.patch_embedding(patches_BLC)
            for layer, block in enumerate(blocks):
                x_BLM = block(x_BLM, modulation[layer], context, layer, rope, attention)
                if self.after_block is not None:
                    self.after_block(layer)
            out_BLP = self.head(x_BLM, time_BM)
        return unpatchify(out_BLP, self.patch_grid(latents.shape), config.patch_size)

    def _run_fused(
        self,
        blocks: Sequence[Block],
        x_BLM: torch.Tensor,
        time_BM: torch.Tensor,
        modulation: torch.Tensor,
        context: TextContext,
        rope: torch.Tensor,
        attention: AttentionSettings,
    ) -> torch.Tensor:
        """The blocks and the head; each branch's output joins the residual stream in the kernel of the next norm."""
        stream = FusedStream(x_BLM, attention.op_provider)
        all_scales = ffn_scales(blocks, modulation)
        for layer, block in enumerate(blocks):
            scales = None if all_scales is None else all_scales[layer]
            run_block(block, stream, modulation[layer], context, layer, rope, attention, scales)
            if self.after_block is not None:
                self.after_block(layer)
        shift, scale = self.head.shift_and_scale(time_BM)
        h = stream.norm(scale_BD=scale, shift_BD=shift, eps=self.head.eps, out_dtype=torch.float32)
        assert isinstance(h, torch.Tensor)
        return self.head.project(h)

    def patch_grid(self, shape: torch.Size) -> tuple[int, int, int]:
        """(T, h, w) in patches of latents [B, C, T, h, w]."""
        _, _, frames, height, width = shape
        p_t, p_h, p_w = self.config.patch_size
        return frames // p_t, height // p_h, width // p_w

    def _check_inputs(self, latents: torch.Tensor, timesteps: torch.Tensor, context: TextContext) -> None:
        config = self.config
        shape = tuple(latents.shape)
        p_t, p_h, p_w = config.patch_size
        if len(shape) != 5 or shape[1] != config.in_channels or shape[2] % p_t or shape[3] % p_h or shape[4] % p_w:
            fits = f"of shape [B, {config.in_channels}, T, h, w] in whole patches of {config.patch_size}"
            raise InvalidArgument("latents", shape, fits)
        if tuple(timesteps.shape) != shape[:1]:
            raise InvalidArgument("timesteps", tuple(timesteps.shape), f"of shape [{shape[0]}]")
        if len(context) != shape[0]:
            raise InvalidArgument("context", len(context), f"of {shape[0]} samples")

    def _embed_time(self, sinusoids_BF: torch.Tensor, blocks: Sequence[Block]) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 time embedding [B, M], and the blocks' modulations [num_blocks, 6, B, M]."""
        first, _, second = self.time_embedding
        _, projection = self.time_projection
        embeddings, projections = [], []
        # Sample by sample: a product with one row takes another path on the CPU than one with several.
        for sinusoid_1F in sinusoids_BF[:, None]:
            time_1M = _linear_fp32(second, F.silu(_linear_fp32(first, sinusoid_1F)))
            embeddings.append(time_1M)
            projections.append(_linear_fp32(projection, F.silu(time_1M)))
        time_6BM = torch.cat(projections).view(-1, 6, self.config.dim).transpose(0, 1)
        table = torch.stack([block.modulation[0] for block in blocks]).float()
        return torch.cat(embeddings), table[:, :, None] + time_6BM

    def read_text(self, sample: SampleContext) -> list[LayerText]:
        """A prompt as every layer reads it."""
        projections = [block.cross_attn.project_context for block in self._typed_blocks()]
        return [sample.read(layer, project) for layer, project in enumerate(projections)]

    def _typed_blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def sinusoidal_embedding(timesteps_B: torch.Tensor, dim: int) -> torch.Tensor:
    """[cos(t f), sin(t f)] with f_i = 10000^(-2i / dim), computed in float64, returned as float32 [B, dim]."""
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=timesteps_B.device) * (-2.0 / dim)
    angles = timesteps_B.double()[:, None] * 10000.0**exponents
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def patchify(x: torch.Tensor, patch_size: tuple[int, int, int]) -> torch.Tensor:
    """[B, C, T, h, w] to tokens [B, L, C p_t p_h p_w]: tokens by (t, h, w), features by (c, p_t, p_h, p_w)."""
    B, C, T, h, w = x.shape
    p_t, p_h, p_w = patch_size
    x = x.reshape(B, C, T // p_t, p_t, h // p_h, p_h, w // p_w, p_w)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x_BLP: torch.Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> torch.Tensor:
    """Tokens back to [B, C, T, h, w]; here, unlike `patchify`, features come by (p_t, p_h, p_w, c)."""
    (T, h, w), (p_t, p_h, p_w) = grid, patch_size
    x = x_BLP.reshape(x_BLP.shape[0], T, h, w, p_t, p_h, p_w, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _linear_fp32(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x W^T + b in float32 whatever the dtype of the weights."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"expected a linear, not {type(linear).__name__}")
    return F.linear(x, linear.weight.float(), linear.bias.float())
