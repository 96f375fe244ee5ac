"""W8A8 linears: int8 weights with one scale a 128 x 128 block, as in upstream's `-quant` checkpoints.

A block's scale is amax / 128 and its weights round_half_even(w / scale), saturated to [-128, 127]. Activations are
quantised the same way at every call, per sample, so that a sample's result never depends on its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from typing_extensions import Self

from turbo_kernels import default_provider, int8_linear, quantize_int8_blockwise

BLOCK = 128


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 W, for inference.

    Keys: `int8_weight` int8 [N, K], `scale` float32 [ceil(N / 128), ceil(K / 128)], and `bias` [N] in the
    network's dtype, if there is one.
    """

    int8_weight: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        num_blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
        self.register_buffer("int8_weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(num_blocks, dtype=torch.float32, device=device))
        self.bias: nn.Parameter | None
        if bias:
            bias_N = torch.empty(out_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(bias_N, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """The quantised twin of `linear` on its device; of a linear on `meta`, an empty one to load into."""
        weight = linear.weight
        quantized = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            device=torch.device("meta"),
        )
        if weight.is_meta:
            int8_weight, scale = quantized.int8_weight, quantized.scale
        else:
            int8_weight, scale = quantize_int8_blockwise(weight.detach())
        quantized.int8_weight, quantized.scale = int8_weight, scale
        if linear.bias is not None:
            quantized.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return quantized

    def forward(self, x_BLK: torch.Tensor, *, provider: str | None = None) -> torch.Tensor:
        """[B, L, K] to [B, L, N] in the dtype of x; `provider` as in turbo_kernels, by default the device's."""
        provider = provider or default_provider(x_BLK.device)
        return int8_linear(x_BLK, self.int8_weight, self.scale, self.bias, provider=provider)

    def dequantized_weight(self) -> torch.Tensor:
        """float32 [N, K]: int8_weight times its block's scale."""
        scale = self.scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return self.int8_weight.float() * scale[: self.out_features, : self.in_features]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # A cast of the whole network (`net.to(torch.bfloat16)`) must not round the scales.
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self


def quantize_linears(net: nn.Module) -> None:
    """Replaces every linear inside `net.blocks`, `proj_l` aside, by an `Int8Linear`, in place.

    Works on a net on `meta`, to load a quantised checkpoint into, and on a loaded net: then weights are quantised
    one at a time where they are, and each original is let go before the next.
    """
    names = [
        name
        for name, module in net.get_submodule("blocks").named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("proj_l")
    ]
    for name in names:
        parent_name, _, child_name = name.rpartition(".")
        parent = net.get_submodule("blocks").get_submodule(parent_name)
        linear = getattr(parent, child_name)
        assert isinstance(linear, nn.Linear)  # as selected above; tells mypy
        setattr(parent, child_name, Int8Linear.from_linear(linear))


def apply_linear(linear: nn.Module, x_BLK: torch.Tensor, *, provider: str) -> torch.Tensor:
    """Runs a linear of either kind on [B, L, K]; `provider` chooses the int8 kernel and means nothing to the rest."""
    if isinstance(linear, Int8Linear):
        return linear(x_BLK, provider=provider)  # type: ignore[no-any-return]
    return linear(x_BLK)  # type: ignore[no-any-return]
