"""The Wan VAE for training: whole clips of a batch at once, with gradients.

`turbo_backend.nets.vae.WanVAE` streams one sample chunk by chunk without gradients. Its causal convolutions see no
future, so running them over the whole clip gives the same numbers; a test holds both together.

Shapes: B batch, C channels, T or F frames, h, w and H, W heights and widths, channels first. In memory channels lie
last, which convolutions of few channels are fastest with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from turbo_backend.nets.vae import WanVAE
from turbo_backend.nets.vae_decoder import Upsample
from turbo_backend.nets.vae_encoder import Downsample
from turbo_backend.nets.vae_layers import Convolution, FrameAttention, Head, MiddleBlocks, ResidualBlock, RMSNorm
from turbo_training.compiling import compile_often


def encode_moments(vae: WanVAE, video_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, z_dim, T, h, w] of the latents, not normalised; F = 4k + 1."""
    x = _causal(vae.encoder.conv1, video_BCFHW.contiguous(memory_format=torch.channels_last_3d))
    for layer in vae.encoder.downsamples:
        x = _downsample(layer, x) if isinstance(layer, Downsample) else _residual(layer, x)
    x = _head(vae.encoder.head, _middle(vae.encoder.middle, x))
    mean, log_variance = _frames(vae.conv1, x).chunk(2, dim=1)
    return mean.float(), log_variance.float().clamp(-20, 10)


def decode_latents(vae: WanVAE, z_BCThw: Tensor) -> Tensor:
    """Latents that are not normalised to frames [B, 3, F, H, W]."""
    z_BCThw = z_BCThw.contiguous(memory_format=torch.channels_last_3d)
    x = _middle(vae.decoder.middle, _causal(vae.decoder.conv1, _frames(vae.conv2, z_BCThw)))
    for layer in vae.decoder.upsamples:
        x = _upsample(layer, x) if isinstance(layer, Upsample) else _residual(layer, x)
    return _head(vae.decoder.head, x).float()


def normalize_latents(vae: WanVAE, mean_BCThw: Tensor) -> Tensor:
    """What serving calls latents: (mean - latents_mean) / latents_std."""
    shift, scale = latent_statistics(vae, mean_BCThw.device)
    return (mean_BCThw - shift) / scale


def latent_statistics(vae: WanVAE, device: torch.device) -> tuple[Tensor, Tensor]:
    """The configured mean and standard deviation of each channel, [1, C, 1, 1, 1]."""
    config = vae.config
    mean = torch.tensor(config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    return mean, torch.tensor(config.latents_std, device=device).view(1, -1, 1, 1, 1)


@torch.no_grad()
def fold_statistics(vae: WanVAE, mean_C: Tensor, std_C: Tensor) -> None:
    """Moves measured statistics of the latents into the weights, so that the configured ones hold.

    Files of the published layout carry no statistics: readers assume the configured ones. conv1 (the encoder's last
    layer) and conv2 (the decoder's first) act on each place alone, so an affine change of the latents between them
    is exact: z' = (z - mean) / std * latents_std + latents_mean.
    """
    z_dim = vae.config.z_dim
    shift, scale = (part.flatten() for part in latent_statistics(vae, mean_C.device))
    factor = scale / std_C
    offset = shift - mean_C * factor
    weight, bias = vae.conv1.weight, vae.conv1.bias
    weight[:z_dim] *= factor.view(-1, 1, 1, 1, 1)
    bias[:z_dim] = bias[:z_dim] * factor + offset
    # z = (z' - offset) / factor
    vae.conv2.bias.sub_(vae.conv2.weight[..., 0, 0, 0] @ (offset / factor))
    vae.conv2.weight.div_(factor.view(1, -1, 1, 1, 1))


def _frames(conv: Convolution, x: Tensor) -> Tensor:
    """A convolution of each frame alone; kernel [.., kh, kw] or [.., 1, kh, kw]."""
    weight = conv.weight if conv.weight.dim() == 5 else conv.weight.unsqueeze(2)
    return _convolve(x, weight, conv)


def _causal(conv: Convolution, x: Tensor) -> Tensor:
    return _convolve(F.pad(x, (0, 0, 0, 0, conv.weight.shape[2] - 1, 0)), conv.weight, conv)


def _convolve(x: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    """Over frames padded in time already. A GPU's kernels want channels in multiples of eight: others are filled up."""
    num_out, num_in = weight.shape[:2]
    missing_out, missing_in = -num_out % 8, -num_in % 8
    bias: Tensor = conv.bias
    if x.is_cuda and (missing_out or missing_in):
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, missing_in, 0, missing_out))
        x, bias = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing_in)), F.pad(bias, (0, missing_out))
    return F.conv3d(x, weight, bias, padding=(0, *conv.padding))[:, :num_out]


def _norm(gamma: Tensor, x_NC: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) sqrt(C) gamma over channels, in float32, returned in x's dtype."""
    y = F.normalize(x_NC.float(), dim=1, eps=1e-12) * math.sqrt(x_NC.shape[1]) * gamma.flatten()
    return y.to(x_NC.dtype)


def _norm_silu(gamma: Tensor, x_NC: Tensor) -> Tensor:
    return F.silu(_norm(gamma, x_NC))


@lru_cache(maxsize=1)
def _compiled_norm_silu() -> Callable[[Tensor, Tensor], Tensor]:
    return compile_often(_norm_silu)


def _by_place(function: Callable[[Tensor, Tensor], Tensor], norm: nn.Module, x: Tensor) -> Tensor:
    """The function of all places' channels [N, C]; a view, since channels lie last."""
    assert isinstance(norm, RMSNorm)
    B, C, T, h, w = x.shape
    rows = x.permute(0, 2, 3, 4, 1).reshape(-1, C)
    if x.is_cuda:
        torch._dynamo.maybe_mark_dynamic(rows, 0)
    return function(norm.gamma, rows).view(B, T, h, w, C).permute(0, 4, 1, 2, 3)


def _activate(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)); one pass over memory on a GPU, where it would otherwise take most of the time."""
    return _by_place(_compiled_norm_silu() if x.is_cuda else _norm_silu, norm, x)


def _residual(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, ResidualBlock)
    layers = block.residual
    y = _causal(layers["2"], _activate(layers["0"], x))  # type: ignore[arg-type]
    y = _causal(layers["6"], _activate(layers["3"], y))  # type: ignore[arg-type]
    return y + (x if block.shortcut is None else _frames(block.shortcut, x))


def _middle(blocks: MiddleBlocks, x: Tensor) -> Tensor:
    before, attention, after = blocks
    return _residual(after, _attention(attention, _residual(before, x)))


def _attention(block: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(block, FrameAttention)
    B, C, T, h, w = x.shape
    qkv = _frames(block.to_qkv, _by_place(_norm, block.norm, x)).permute(0, 2, 3, 4, 1).reshape(B * T, 1, h * w, 3 * C)
    q, k, v = qkv.chunk(3, dim=-1)
    attended = F.scaled_dot_product_attention(q, k, v)
    return x + _frames(block.proj, attended.view(B, T, h, w, C).permute(0, 4, 1, 2, 3))


def _head(head: Head, x: Tensor) -> Tensor:
    return _causal(head["2"], _activate(head["0"], x))  # type: ignore[arg-type]


def _upsample(layer: Upsample, x: Tensor) -> Tensor:
    if layer.time_conv is not None:
        first, later = x[:, :, :1], x[:, :, 1:]
        if later.shape[2]:
            # The first C channels are the earlier of two frames; the first latent is no part of the past.
            pair = _causal(layer.time_conv, later).permute(0, 2, 3, 4, 1).unflatten(-1, (2, -1))
            later = pair.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).permute(0, 4, 1, 2, 3)
        x = torch.cat((first, later), dim=2)
    B, C, T, h, w = x.shape
    doubled = x.permute(0, 2, 3, 4, 1)[:, :, :, None, :, None].expand(B, T, h, 2, w, 2, C)
    x = doubled.reshape(B, T, 2 * h, 2 * w, C).permute(0, 4, 1, 2, 3)
    return _frames(layer.resample["1"], x)  # type: ignore[arg-type]


def _downsample(layer: Downsample, x: Tensor) -> Tensor:
    conv = layer.resample["1"]
    assert isinstance(conv, Convolution)
    padded = F.pad(x, (0, 1, 0, 1))
    x = F.conv3d(padded, conv.weight.unsqueeze(2), conv.bias, stride=(1, 2, 2))
    if layer.time_conv is None or x.shape[2] == 1:
        return x
    later = F.conv3d(x, layer.time_conv.weight, layer.time_conv.bias, stride=(2, 1, 1))
    return torch.cat((x[:, :, :1], later), dim=2)
