"""W8A8 linears: int8 by 128 x 128 blocks, as in upstream's `-quant` checkpoints, and e4m3 by rows.

Int8: a block's scale is amax / 128 and its weights round_half_even(w / scale), saturated to [-128, 127]. Activations
are quantised the same way at every call, per sample, so that a sample's result never depends on its batch.

e4m3 is what a published int8 network is turned into where the GPU multiplies it (`convert_to_fp8`). Error of one
linear against fp32, on normal inputs and weights: int8 1.4 %, e4m3 3.7 %, e4m3 made from int8 weights 3.9 %. It is
taken for speed (cuBLAS: 1.1 to 1.4 PFLOP/s on an H100, where no int8 product by blocks passes 0.75), and since an
outlier in a token costs its small neighbours nothing: int8 keeps amax / 256 of a block, e4m3 1/32 of each value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import Self

from turbo_kernels import default_provider, int8_linear, quantize_int8_blockwise
from turbo_kernels.fp8_linear import AMAX_FLOOR, FP8_MAX, Fp8Rows, fp8_linear, quantize_fp8_rows

BLOCK = 128
_Linear = TypeVar("_Linear", bound=nn.Module)


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


class Fp8Linear(nn.Module):
    """y = x W^T + b with e4m3 W and one scale an output channel, for inference on a GPU that multiplies e4m3.

    Keys: `fp8_weight` e4m3 [N, K], `scale` float32 [N], and `bias` [N] in the network's dtype, if there is one.

    Attributes:
        uniform: all channels have one scale, as a product with GELU in its epilogue needs it.
        weight_norm, bias_amax: float32 scalars of such a linear: the largest norm of a row, the largest |bias|.
    """

    fp8_weight: torch.Tensor
    scale: torch.Tensor
    weight_norm: torch.Tensor
    bias_amax: torch.Tensor

    def __init__(self, weight: Fp8Rows, bias_N: torch.Tensor | None, *, uniform: bool = False) -> None:
        super().__init__()
        self.uniform = uniform
        if uniform:
            assert bias_N is not None
            self.register_buffer("weight_norm", weight.dequantize().norm(dim=1).amax(), persistent=False)
            self.register_buffer("bias_amax", bias_N.detach().abs().amax().float(), persistent=False)
        self.out_features, self.in_features = weight.values.shape
        self.register_buffer("fp8_weight", weight.values)
        self.register_buffer("scale", weight.scale)
        self.bias: nn.Parameter | None
        if bias_N is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias_N.detach(), requires_grad=False)

    @classmethod
    def from_int8(cls, linear: Int8Linear, *, uniform: bool = False) -> Self:
        """Rounds what the int8 weights stand for to e4m3 rows, on their device."""
        weight = linear.dequantized_weight()
        if not uniform:
            return cls(quantize_fp8_rows(weight), linear.bias)
        scale = weight.abs().amax().clamp_min(AMAX_FLOOR) * (1.0 / FP8_MAX)
        values = weight.div_(scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return cls(Fp8Rows(values, scale.repeat(len(values))), linear.bias, uniform=True)

    @classmethod
    def from_linear(cls, linear: nn.Linear, device: torch.device) -> Self:
        """The twin of a linear with e4m3 rows, rounded on `device` and left there."""
        weight, bias = linear.weight.detach().to(device), linear.bias
        return cls(quantize_fp8_rows(weight), None if bias is None else bias.detach().to(device))

    def forward(self, x_BLK: torch.Tensor, *, provider: str | None = None) -> torch.Tensor:
        """[B, L, K] to [B, L, N] in the dtype of x; `provider` as in turbo_kernels, by default the device's."""
        provider = provider or default_provider(x_BLK.device)
        rows = quantize_fp8_rows(x_BLK, provider=provider)
        weight = Fp8Rows(self.fp8_weight, self.scale)
        return fp8_linear(rows, weight, self.bias, out_dtype=x_BLK.dtype, provider=provider)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # A cast of the whole network must neither widen the weights nor round the scales.
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            applied = self.get_buffer(name)
            if applied.dtype != tensor.dtype:
                setattr(self, name, tensor.to(applied.device))
        return self


def quantize_linears(net: nn.Module) -> None:
    """Replaces every linear inside `net.blocks`, `proj_l` aside, by an `Int8Linear`, in place.

    Works on a net on `meta`, to load a quantised checkpoint into, and on a loaded net: then weights are quantised
    one at a time where they are, and each original is let go before the next.
    """
    for parent, child_name, linear in _children(net, nn.Linear):
        setattr(parent, child_name, Int8Linear.from_linear(linear))


def convert_to_fp8(net: nn.Module, *, fuse_gelu: bool) -> None:
    """Replaces every `Int8Linear` inside `net.blocks` by the `Fp8Linear` of the same weights, one at a time.

    Args:
        fuse_gelu: make the linears that GELU follows, each the first of its `ffn`, uniform.
    """
    for parent, child_name, linear in _children(net, Int8Linear):
        before_gelu = isinstance(parent, nn.Sequential) and child_name == "0"
        setattr(parent, child_name, Fp8Linear.from_int8(linear, uniform=fuse_gelu and before_gelu))


def quantize_to_fp8(net: nn.Module, device: torch.device) -> None:
    """Replaces every linear inside `net.blocks` by the `Fp8Linear` of its rows on `device`, one at a time."""
    for parent, child_name, linear in _children(net, nn.Linear):
        setattr(parent, child_name, Fp8Linear.from_linear(linear, device))


def _children(net: nn.Module, kind: type[_Linear]) -> Iterator[tuple[nn.Module, str, _Linear]]:
    """(parent, name, linear) of the linears of one kind inside `net.blocks`, `proj_l` aside."""
    blocks = net.get_submodule("blocks")
    names = [name for name, module in blocks.named_modules() if isinstance(module, kind)]
    for name in names:
        parent_name, _, child_name = name.rpartition(".")
        if child_name != "proj_l":
            parent = blocks.get_submodule(parent_name)
            linear = getattr(parent, child_name)
            assert isinstance(linear, kind)  # as selected above; tells mypy
            yield parent, child_name, linear


def apply_linear(linear: nn.Module, x_BLK: torch.Tensor, *, provider: str) -> torch.Tensor:
    """Runs a linear of any kind on [B, L, K]; `provider` chooses the 8-bit kernels and means nothing to the rest."""
    if isinstance(linear, Int8Linear | Fp8Linear):
        return linear(x_BLK, provider=provider)  # type: ignore[no-any-return]
    return linear(x_BLK)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """Tensors of one linear, or of several that read the same input and lie side by side in memory.

    Attributes:
        weight: [N, K] in floating point, int8, or e4m3, which says how the product is computed.
        scale: of an 8-bit weight, else None.
        bias: [N] or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def of(cls, linear: nn.Module) -> Self:
        """Those of a linear of any kind, shared with it."""
        names = _tensor_names(linear)
        weight, scale, bias = (None if name is None else getattr(linear, name) for name in names)
        return cls(weight, scale, bias)  # type: ignore[arg-type]

    @classmethod
    def joined(cls, linears: Sequence[nn.Module]) -> Self | None:
        """All of them as one, if `lay_side_by_side` was called on them and nothing has moved them since."""
        parts = [cls.of(linear) for linear in linears]
        joint = []
        for tensors in ([p.weight for p in parts], [p.scale for p in parts], [p.bias for p in parts]):
            present = [tensor for tensor in tensors if tensor is not None]
            joint.append(_spanning(present) if present else None)
            if present and joint[-1] is None:
                return None
        return cls(*joint)  # type: ignore[arg-type]

    def multiply(self, x: torch.Tensor | Fp8Rows, *, provider: str, gelu: bool = False) -> torch.Tensor:
        """x W^T + b, or GELU of it in its tanh form: [B, L, K] to [B, L, N].

        Floating-point samples are multiplied one at a time, since cuBLAS picks an algorithm by the shape.
        """
        if self.weight.dtype == torch.float8_e4m3fn:
            assert self.scale is not None
            rows = x if isinstance(x, Fp8Rows) else quantize_fp8_rows(x, provider=provider)
            out_dtype = torch.bfloat16 if self.bias is None else self.bias.dtype
            y = fp8_linear(rows, Fp8Rows(self.weight, self.scale), self.bias, out_dtype=out_dtype, provider=provider)
            return F.gelu(y, approximate="tanh") if gelu else y
        assert isinstance(x, torch.Tensor)
        if self.weight.dtype == torch.int8:
            assert self.scale is not None
            y = int8_linear(x, self.weight, self.scale, self.bias, provider=provider)
            return F.gelu(y, approximate="tanh") if gelu else y
        if gelu and self.bias is not None and x.is_cuda:
            # The one way to cuBLASLt's epilogue, whose GELU is the tanh form (on the CPU it is the other).
            samples = [torch._addmm_activation(self.bias, x_LK, self.weight.t(), use_gelu=True) for x_LK in x]
        else:
            samples = [F.linear(x_LK, self.weight, self.bias) for x_LK in x]
            samples = [F.gelu(y, approximate="tanh") for y in samples] if gelu else samples
        return samples[0][None] if len(samples) == 1 else torch.stack(samples)


def lay_side_by_side(linears: Sequence[nn.Module]) -> None:
    """Moves the tensors of linears of one kind and width into joint memory, so that one product serves them all.

    State-dict keys and values stay as they are. Loading, or moving the module, takes them apart again.

    Raises:
        ValueError: int8 linears whose blocks of output channels would not line up.
    """
    if any(isinstance(linear, Int8Linear) and linear.out_features % BLOCK for linear in linears):
        raise ValueError(f"int8 linears lie side by side only in whole blocks of {BLOCK} output channels")
    for name in _tensor_names(linears[0]):
        if name is None or getattr(linears[0], name) is None:
            continue
        tensors: list[torch.Tensor] = [getattr(linear, name) for linear in linears]
        # As bytes: not every build of PyTorch joins e4m3 tensors.
        joint = torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)
        start = 0
        for linear, tensor in zip(linears, tensors, strict=True):
            # `.data`: a view would keep the joint memory when the part has long been moved elsewhere.
            part = joint[start : start + len(tensor)].data
            start += len(tensor)
            setattr(linear, name, nn.Parameter(part, requires_grad=False) if name in linear._parameters else part)


def _tensor_names(linear: nn.Module) -> tuple[str, str | None, str]:
    if isinstance(linear, Int8Linear):
        return "int8_weight", "scale", "bias"
    if isinstance(linear, Fp8Linear):
        return "fp8_weight", "scale", "bias"
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"expected a linear, not {type(linear).__name__}")
    return "weight", None, "bias"


def _spanning(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor over all rows of tensors that follow each other in memory, or None."""
    end = tensors[0].data_ptr()
    storage = tensors[0].untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != storage:
            return None
        end += tensor.numel() * tensor.itemsize
    rows = sum(len(tensor) for tensor in tensors)
    return tensors[0].as_strided((rows, *tensors[0].shape[1:]), tensors[0].stride())
