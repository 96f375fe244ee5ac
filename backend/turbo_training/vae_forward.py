"""The Wan VAE for training: whole clips of a batch at once, with gradients.

`turbo_backend.nets.vae.WanVAE` streams one sample chunk by chunk without gradients. Its causal convolutions see no
future, so running them over the whole clip gives the same numbers; a test holds both together.

Inside, channels lie last and a convolution in time becomes one of each frame alone, with the frames that it sees side
by side as channels: cuDNN has fast kernels in both directions for these, and not for few channels in three dimensions.

Shapes: B batch, C channels, T or F frames, h, w and H, W heights and widths.
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
    x = _convolve(vae.encoder.conv1, video_BCFHW.permute(0, 2, 3, 4, 1))
    for layer in vae.encoder.downsamples:
        x = _downsample(layer, x) if isinstance(layer, Downsample) else _residual(layer, x)
    x = _head(vae.encoder.head, _middle(vae.encoder.middle, x))
    mean, log_variance = _convolve(vae.conv1, x).permute(0, 4, 1, 2, 3).chunk(2, dim=1)
    return mean.float(), log_variance.float().clamp(-20, 10)


def decode_latents(vae: WanVAE, z_BCThw: Tensor) -> Tensor:
    """Latents that are not normalised to frames [B, 3, F, H, W]."""
    x = _convolve(vae.decoder.conv1, _convolve(vae.conv2, z_BCThw.permute(0, 2, 3, 4, 1)))
    x = _middle(vae.decoder.middle, x)
    for layer in vae.decoder.upsamples:
        x = _upsample(layer, x) if isinstance(layer, Upsample) else _residual(layer, x)
    return _head(vae.decoder.head, x).permute(0, 4, 1, 2, 3).float()


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


def _convolve(conv: Convolution, x_BThwC: Tensor, *, stride: int = 1) -> Tensor:
    """A convolution of kernel [(kt,) kh, kw] that sees kt - 1 earlier frames, zeros before the first."""
    weight = conv.weight if conv.weight.dim() == 5 else conv.weight.unsqueeze(2)
    num_times = weight.shape[2]
    x = F.pad(x_BThwC, (0, 0, 0, 0, 0, 0, num_times - 1, 0)) if num_times > 1 else x_BThwC
    return _convolve_times(x, weight, conv, stride=stride)


def _convolve_times(
    x_BThwC: Tensor, weight_OCtkl: Tensor, conv: Convolution, *, stride: int = 1, time_stride: int = 1
) -> Tensor:
    """Over frames that are padded in time already.

    A GPU's kernels want channels in multiples of eight: others are filled up.
    """
    B, num_frames = x_BThwC.shape[:2]
    num_out, num_in, num_times = weight_OCtkl.shape[:3]
    num_frames = 1 + (num_frames - num_times) // time_stride
    seen = [x_BThwC[:, i : i + time_stride * (num_frames - 1) + 1 : time_stride] for i in range(num_times)]
    x = (torch.cat(seen, dim=-1) if num_times > 1 else seen[0]).flatten(0, 1)
    weight = weight_OCtkl.transpose(1, 2).flatten(1, 2)
    bias: Tensor = conv.bias
    missing_out, missing_in = -num_out % 8, -(num_in * num_times) % 8
    if x.is_cuda and (missing_out or missing_in):
        weight = F.pad(weight, (0, 0, 0, 0, 0, missing_in, 0, missing_out))
        x, bias = F.pad(x, (0, missing_in)), F.pad(bias, (0, missing_out))
    weight = weight.contiguous(memory_format=torch.channels_last)
    padding = (0, 0) if stride > 1 else conv.padding
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=stride, padding=padding)
    return y.permute(0, 2, 3, 1).unflatten(0, (B, num_frames))[..., :num_out]


def _norm(gamma: Tensor, x_NC: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) sqrt(C) gamma over channels, in float32, returned in x's dtype."""
    y = F.normalize(x_NC.float(), dim=1, eps=1e-12) * math.sqrt(x_NC.shape[1]) * gamma.flatten()
    return y.to(x_NC.dtype)


def _norm_silu(gamma: Tensor, x_NC: Tensor) -> Tensor:
    return F.silu(_norm(gamma, x_NC))


@lru_cache(maxsize=1)
def _compiled_norm_silu() -> Callable[[Tensor, Tensor], Tensor]:
    return compile_often(_norm_silu)


def _by_place(function: Callable[[Tensor, Tensor], Tensor], norm: nn.Module, x_BThwC: Tensor) -> Tensor:
    """The function of all places' channels [N, C]."""
    assert isinstance(norm, RMSNorm)
    rows = x_BThwC.reshape(-1, x_BThwC.shape[-1])
    if x_BThwC.is_cuda:
        torch._dynamo.maybe_mark_dynamic(rows, 0)
    return function(norm.gamma, rows).view(x_BThwC.shape)


def _activate(norm: nn.Module, x_BThwC: Tensor) -> Tensor:
    """silu(norm(x)); one pass over memory on a GPU, where it would otherwise take most of the time."""
    return _by_place(_compiled_norm_silu() if x_BThwC.is_cuda else _norm_silu, norm, x_BThwC)


def _residual(block: nn.Module, x_BThwC: Tensor) -> Tensor:
    assert isinstance(block, ResidualBlock)
    layers = block.residual
    y = _convolve(layers["2"], _activate(layers["0"], x_BThwC))  # type: ignore[arg-type]
    y = _convolve(layers["6"], _activate(layers["3"], y))  # type: ignore[arg-type]
    return y + (x_BThwC if block.shortcut is None else _convolve(block.shortcut, x_BThwC))


def _middle(blocks: MiddleBlocks, x_BThwC: Tensor) -> Tensor:
    before, attention, after = blocks
    return _residual(after, _attention(attention, _residual(before, x_BThwC)))


def _attention(block: nn.Module, x_BThwC: Tensor) -> Tensor:
    assert isinstance(block, FrameAttention)
    B, T, h, w, C = x_BThwC.shape
    qkv = _convolve(block.to_qkv, _by_place(_norm, block.norm, x_BThwC)).reshape(B * T, 1, h * w, 3 * C)
    q, k, v = qkv.chunk(3, dim=-1)
    attended = F.scaled_dot_product_attention(q, k, v)
    return x_BThwC + _convolve(block.proj, attended.view(B, T, h, w, C))


def _head(head: Head, x_BThwC: Tensor) -> Tensor:
    return _convolve(head["2"], _activate(head["0"], x_BThwC))  # type: ignore[arg-type]


def _upsample(layer: Upsample, x_BThwC: Tensor) -> Tensor:
    x = x_BThwC
    if layer.time_conv is not None:
        first, later = x[:, :1], x[:, 1:]
        if later.shape[1]:
            # The first C channels are the earlier of two frames; the first latent is no part of the past.
            pair = _convolve(layer.time_conv, later).unflatten(-1, (2, -1))
            later = pair.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        x = torch.cat((first, later), dim=1)
    B, T, h, w, C = x.shape
    doubled = x[:, :, :, None, :, None].expand(B, T, h, 2, w, 2, C).reshape(B, T, 2 * h, 2 * w, C)
    return _convolve(layer.resample["1"], doubled)  # type: ignore[arg-type]


def _downsample(layer: Downsample, x_BThwC: Tensor) -> Tensor:
    x = _convolve(layer.resample["1"], F.pad(x_BThwC, (0, 0, 0, 1, 0, 1)), stride=2)  # type: ignore[arg-type]
    conv = layer.time_conv
    if conv is None or x.shape[1] == 1:
        return x
    later = _convolve_times(x, conv.weight, conv, time_stride=2)
    return torch.cat((x[:, :1], later), dim=1)
