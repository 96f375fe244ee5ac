"""Linear layer of e4m3 operands whose GELU and e4m3 rounding happen in the product's epilogue.

    y  = e4m3(GELU(x w^T + bias) / y_scale)        x, w and y each with one scale a sample, known before the product

A scale known in advance takes a bound instead of the largest value. e4m3 is a floating-point format: over a bound that
is 2^8 too large it still has seven binades of whole precision left, which bounds of norms keep (`ffn_bounds`).
The product is cuBLASLt's (`cublas_lt.py`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from turbo_kernels.cublas_lt import gelu_product_fp8
from turbo_kernels.fp8_linear import FP8_MAX, Fp8Rows, multiplies_fp8
from turbo_kernels.providers import resolve_provider

_log = logging.getLogger(__name__)
#: e4m3 rounds up by at most 2^-4: what a bound leaves for the rounding of an operand.
_MARGIN = 1.0 + 2.0**-4
#: Largest magnitude of GELU below zero, rounded up.
_GELU_FLOOR = 0.2


@dataclass(frozen=True, slots=True)
class Fp8Samples:
    """Samples of e4m3 values, each with one scale.

    Attributes:
        values: e4m3 [B, L, K].
        scale: fp32 [B]; a sample is values * scale.
    """

    values: torch.Tensor
    scale: torch.Tensor


def ffn_bounds(
    scale_BD: torch.Tensor, shift_BD: torch.Tensor, weight_norm: torch.Tensor, bias_amax: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of h = LN(x) (1 + scale) + shift and of GELU(h w^T + bias), from bounds that hold for every x.

    |LN(x)| <= sqrt(D) and ||LN(x)|| <= sqrt(D), so  |h| <= sqrt(D) max|1 + scale| + max|shift|  and, by Cauchy and
    Schwarz,  |h w^T + bias| <= (sqrt(D) max|1 + scale| + ||shift||) max||w|| + max|bias|.

    Args:
        scale_BD, shift_BD: fp32 [..., D], one sample's.
        weight_norm, bias_amax: fp32, largest norm of w's rows and largest |bias|; broadcast against [...].

    Returns:
        fp32 [...] each.
    """
    spread = (1.0 + scale_BD).abs().amax(-1) * math.sqrt(scale_BD.shape[-1])
    h_amax = spread + shift_BD.abs().amax(-1)
    u_amax = ((spread + shift_BD.norm(dim=-1)) * weight_norm * _MARGIN + bias_amax).clamp_min(_GELU_FLOOR)
    return h_amax * (1.0 / FP8_MAX), u_amax * (1.0 / FP8_MAX)


def fp8_gelu_linear(
    x: Fp8Samples,
    weight: Fp8Rows,
    bias_N: torch.Tensor,
    y_scale_B: torch.Tensor,
    *,
    provider: str | None = None,
) -> Fp8Rows:
    """The formula above, a sample at a time; the rows of a sample share its scale.

    Args:
        x: values [B, L, K].
        weight: values [N, K], all rows of one scale.
        bias_N: [N], bfloat16 on a GPU.
        y_scale_B: fp32 [B].
        provider: `triton` is the GPU's product; `reference`, and the interpreter, compute in fp32.

    Raises:
        ValueError: shapes or provider that do not fit.
    """
    B, L, K = x.values.shape
    N = weight.values.shape[0]
    if weight.values.shape != (N, K) or bias_N.shape != (N,) or x.scale.shape != (B,) or y_scale_B.shape != (B,):
        raise ValueError(
            f"x is {(B, L, K)}, {tuple(x.scale.shape)}, weight {tuple(weight.values.shape)}, bias "
            f"{tuple(bias_N.shape)}, y_scale {tuple(y_scale_B.shape)}: must be [B, L, K], [B], [N, K], [N], [B]"
        )
    device = x.values.device
    provider = resolve_provider(provider, device, op="fp8_gelu_linear")
    if provider == "reference" or device.type != "cuda":
        dense = weight.dequantize()
        samples = []
        for values, x_scale, y_scale in zip(x.values, x.scale, y_scale_B, strict=True):
            y = F.gelu(F.linear(values.float() * x_scale, dense, bias_N.float()), approximate="tanh") / y_scale
            samples.append(y.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))
    else:
        inverse_B = 1.0 / y_scale_B
        samples = [
            gelu_product_fp8(x8_LK, _aligned(x_scale), weight.values, weight.scale[0], bias_N, _aligned(inverse))
            for x8_LK, x_scale, inverse in zip(x.values, x.scale, inverse_B, strict=True)
        ]
    values = samples[0][None] if B == 1 else torch.stack([y.view(torch.uint8) for y in samples]).view(samples[0].dtype)
    return Fp8Rows(values, y_scale_B[:, None].expand(B, L).contiguous())


def _aligned(scalar: torch.Tensor) -> torch.Tensor:
    """Where cuBLASLt may fetch 16 bytes at once."""
    return scalar.clone() if scalar.data_ptr() % 16 else scalar


@cache
def multiplies_gelu_fp8(device: torch.device) -> bool:
    """Whether `fp8_gelu_linear` runs on this GPU with this cuBLAS: a small product is tried and compared."""
    if not multiplies_fp8(device):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*shape, generator=generator).to(device, torch.float8_e4m3fn)
        for shape in ((1, 256, 256), (128, 256))
    )
    bias = torch.randn(128, generator=generator).to(device, torch.bfloat16)
    scale = torch.full((1,), 0.25, device=device)
    arguments = Fp8Samples(x, scale), Fp8Rows(weight, scale.repeat(128)), bias, scale
    try:
        out = fp8_gelu_linear(*arguments).dequantize()
    except (RuntimeError, OSError, AttributeError) as error:
        _log.warning("%s does not multiply e4m3 with GELU: %s", device, error)
        return False
    expected = fp8_gelu_linear(*arguments, provider="reference").dequantize()
    return bool((out - expected).norm() <= 0.03 * expected.norm())
