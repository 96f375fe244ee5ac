"""The published file layouts, one class each: which keys and shapes a file must have, and the network it fills.

A network's module names are upstream's keys, so a layout is derived from the network itself, built on the meta
device where it takes no memory; nothing is listed twice.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from turbo_backend.checkpoints.comparison import Comparison, compare
from turbo_backend.checkpoints.loader import load_into, network_specs
from turbo_backend.checkpoints.reader import Checkpoint
from turbo_backend.checkpoints.recognise import Specs
from turbo_backend.config import DiTConfig, ModelConfig, TextEncoderConfig, VAEConfig

if TYPE_CHECKING:
    from turbo_backend.nets.dit import WanDiT
    from turbo_backend.nets.umt5 import UMT5Encoder
    from turbo_backend.nets.vae import WanVAE


class Layout(Protocol):
    """A kind of weight file."""

    @property
    def specs(self) -> Specs:
        """Keys, shapes and dtypes of the file."""

    def compare(self, checkpoint: Checkpoint) -> Comparison:
        """How an open file differs."""


class DenoiserLayout:
    """`TurboWan*.pth`, and `TurboWan*-quant.pth` when `quant_linear`.

    In a quantized file every linear of the blocks has `X.int8_weight` (int8) and `X.scale` (float32, one for each
    128 x 128 block) for `X.weight`; `proj_l` and everything outside the blocks stay floating.
    """

    def __init__(self, config: DiTConfig, *, quant_linear: bool) -> None:
        self.config = config
        self.quant_linear = quant_linear

    @property
    def keep_fp32(self) -> tuple[str, ...]:
        """Parts of the keys whose tensors are float32 whatever the network's dtype."""
        from turbo_backend.nets.dit import KEEP_FP32

        return KEEP_FP32

    def build(self) -> WanDiT:
        """The network on the meta device, its block linears replaced when `quant_linear`."""
        from turbo_backend.nets.dit import WanDiT
        from turbo_backend.quantization import quantize_linears

        with torch.device("meta"):
            network = WanDiT(self.config)
            if self.quant_linear:
                quantize_linears(network)
        return network

    @cached_property
    def specs(self) -> Specs:
        return network_specs(self.build())

    def compare(self, checkpoint: Checkpoint) -> Comparison:
        """Strict, but a file that is not quantized also fits a quantized layout: it is quantized while loading."""
        return compare(checkpoint_specs(checkpoint), self.specs, quantize=self.quant_linear)

    def load(self, checkpoint: Checkpoint, *, device: torch.device | str, dtype: torch.dtype) -> WanDiT:
        """A network filled from the file; a floating file is quantized tensor by tensor when `quant_linear`."""
        network = self.build()
        keep = self.keep_fp32
        load_into(network, checkpoint, device=device, dtype=dtype, keep_fp32=keep, quantize=self.quant_linear)
        return network


class TextEncoderLayout:
    """`models_t5_umt5-xxl-enc-bf16.pth`."""

    keep_fp32: tuple[str, ...] = ()

    def __init__(self, config: TextEncoderConfig) -> None:
        self.config = config

    def build(self) -> UMT5Encoder:
        """The network on the meta device."""
        from turbo_backend.nets.umt5 import UMT5Encoder

        with torch.device("meta"):
            return UMT5Encoder(self.config)

    @cached_property
    def specs(self) -> Specs:
        return network_specs(self.build())

    def compare(self, checkpoint: Checkpoint) -> Comparison:
        return compare(checkpoint_specs(checkpoint), self.specs)

    def load(self, checkpoint: Checkpoint, *, device: torch.device | str, dtype: torch.dtype) -> UMT5Encoder:
        """A network filled from the file."""
        network = self.build()
        load_into(network, checkpoint, device=device, dtype=dtype)
        return network


class VAELayout:
    """`Wan2.1_VAE.pth`, which Wan2.2-A14B uses as well."""

    keep_fp32: tuple[str, ...] = ()

    def __init__(self, config: VAEConfig) -> None:
        self.config = config

    def build(self) -> WanVAE:
        """The network on the meta device."""
        from turbo_backend.nets.vae import WanVAE

        with torch.device("meta"):
            return WanVAE(self.config)

    @cached_property
    def specs(self) -> Specs:
        return network_specs(self.build())

    def compare(self, checkpoint: Checkpoint) -> Comparison:
        return compare(checkpoint_specs(checkpoint), self.specs)

    def load(self, checkpoint: Checkpoint, *, device: torch.device | str, dtype: torch.dtype) -> WanVAE:
        """A network filled from the file."""
        network = self.build()
        load_into(network, checkpoint, device=device, dtype=dtype)
        return network


def checkpoint_specs(checkpoint: Checkpoint) -> Specs:
    """Keys, shapes and dtypes of an open file."""
    return {key: (checkpoint.shape(key), checkpoint.dtype(key)) for key in checkpoint}


def layout_of(model: ModelConfig, kind: str, *, quant_linear: bool = False) -> Layout:
    """The layout of one file of a model; `kind` is `denoiser`, `text encoder` or `vae`."""
    if kind == "denoiser":
        return DenoiserLayout(model.dit, quant_linear=quant_linear)
    if kind == "text encoder":
        return TextEncoderLayout(model.text_encoder)
    if kind == "vae":
        return VAELayout(model.vae)
    raise ValueError(f"no layout for {kind!r}")
