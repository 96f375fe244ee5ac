"""Telling from keys and shapes alone which network a weight file belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from turbo_backend.config import MODELS, DiTConfig, TextEncoderConfig, VAEConfig

TensorSpec = tuple[tuple[int, ...], torch.dtype]
Specs = Mapping[str, TensorSpec]
Kind = Literal["denoiser", "text encoder", "vae", "foreign", "unknown"]

#: A key that only the layout has, and what that layout is. The first that matches counts.
_FOREIGN_LAYOUTS = (
    (r"(^|\.)lora_(A|B|down|up)\b|\.lora_", "a LoRA, not a whole network: merge it into its base model first"),
    (r"^condition_embedder\.|^blocks\.\d+\.attn1\.to_q\.", "a diffusers denoiser (WanTransformer3DModel layout)"),
    (r"^encoder\.down_blocks\.|^quant_conv\.|^decoder\.up_blocks\.", "a diffusers VAE (AutoencoderKLWan layout)"),
    (r"^encoder\.block\.\d+\.layer\.|^shared\.weight$", "a transformers text encoder (UMT5EncoderModel layout)"),
    (r"^vace_blocks\.", "a Wan VACE denoiser"),
    (r"^img_emb\.", "a Wan2.1 image-to-video denoiser with CLIP conditioning"),
    (r"\.(weight_scale_inv|weight_scale|scale_weight)$", "a quantized file of another project (FP8 or renamed int8)"),
    (r"^visual\.transformer\.|^textual\.", "a CLIP image or text encoder"),
    (r"^net_ema\.", "a training checkpoint that holds EMA weights (net_ema.): export one set of weights first"),
)

_LOADABLE = "the file published by upstream is needed (turbodiffusion-server weights MODEL lists them)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognised:
    """What a set of keys and shapes is.

    Attributes:
        kind: the network, `foreign` for a known layout that is not loaded, or `unknown`.
        description: in words, fit for `this file is ...`.
        models: names in `config.MODELS` whose network of that kind has these sizes.
        quantized: whether block linears are stored as int8 (the published `-quant` files).
        advice: what to do instead, for a foreign layout.
    """

    kind: Kind
    description: str
    models: tuple[str, ...] = ()
    quantized: bool = False
    advice: str = ""


def recognise(specs: Specs) -> Recognised:
    """Names the network that has these keys (prefixes stripped) and shapes."""
    for pattern, what in _FOREIGN_LAYOUTS:
        expression = re.compile(pattern)
        if any(expression.search(key) for key in specs):
            return Recognised(kind="foreign", description=what, advice=_LOADABLE)
    if "patch_embedding.weight" in specs and any(key.startswith("blocks.0.self_attn.q.") for key in specs):
        return _recognise_denoiser(specs)
    if "token_embedding.weight" in specs and "blocks.0.attn.q.weight" in specs:
        return _recognise_text_encoder(specs)
    if "encoder.conv1.weight" in specs and "decoder.conv1.weight" in specs:
        return _recognise_vae(specs)
    return Recognised(kind="unknown", description="of no known layout")


def _recognise_denoiser(specs: Specs) -> Recognised:
    patch = specs["patch_embedding.weight"][0]
    if len(patch) != 2:
        what = "a denoiser of the original Wan release (convolutional patch embedding, no sparse-linear attention)"
        return Recognised(kind="foreign", description=what, advice=_LOADABLE)
    dim = patch[0]
    in_channels = patch[1] // 4
    num_layers = _count_blocks(specs)
    ffn_dim = _first_length(specs, "blocks.0.ffn.0.weight", "blocks.0.ffn.0.int8_weight")
    quantized = any(key.endswith(".int8_weight") for key in specs)
    has_sla = any(".proj_l." in key for key in specs)

    def fits(config: DiTConfig) -> bool:
        sizes = (config.dim, config.in_channels, config.num_layers, config.ffn_dim)
        return sizes == (dim, in_channels, num_layers, ffn_dim)

    models = tuple(model.name for model in MODELS.values() if fits(model.dit))
    name = " or ".join(models) if models else "unknown model"
    details = f"dim {dim}, {num_layers} layers, {in_channels} input channels"
    description = f"a {'quantized ' if quantized else ''}denoiser of {name} ({details})"
    if not has_sla:
        description += " without sparse-linear attention"
    return Recognised(kind="denoiser", description=description, models=models, quantized=quantized)


def _recognise_text_encoder(specs: Specs) -> Recognised:
    shape = specs["token_embedding.weight"][0]
    if len(shape) != 2:
        return Recognised(kind="unknown", description="of no known layout")
    vocab_size, dim = shape
    num_layers = _count_blocks(specs)

    def fits(config: TextEncoderConfig) -> bool:
        return (config.vocab_size, config.dim, config.num_layers) == (vocab_size, dim, num_layers)

    models = tuple(model.name for model in MODELS.values() if fits(model.text_encoder))
    name = "UMT5-xxl" if dim == 4096 else "UMT5"
    description = f"a {name} text encoder (vocabulary {vocab_size}, dim {dim}, {num_layers} layers)"
    return Recognised(kind="text encoder", description=description, models=models)


def _recognise_vae(specs: Specs) -> Recognised:
    encoder = specs["encoder.conv1.weight"][0]
    decoder = specs["decoder.conv1.weight"][0]
    if len(encoder) != 5 or len(decoder) != 5:
        return Recognised(kind="unknown", description="of no known layout")
    base_dim, z_dim = encoder[0], decoder[1]
    if z_dim == 48:
        what = "the Wan2.2 VAE (48 latent channels), which only Wan2.2-TI2V-5B uses"
        return Recognised(kind="foreign", description=what, advice="Wan2.1_VAE.pth is needed, for Wan2.2-A14B too")

    def fits(config: VAEConfig) -> bool:
        return (config.base_dim, config.z_dim) == (base_dim, z_dim)

    models = tuple(model.name for model in MODELS.values() if fits(model.vae))
    description = f"a Wan VAE (base width {base_dim}, {z_dim} latent channels)"
    return Recognised(kind="vae", description=description, models=models)


def _count_blocks(specs: Specs) -> int:
    numbers = {int(found[1]) for key in specs if (found := re.match(r"blocks\.(\d{1,4})\.", key))}
    return max(numbers) + 1 if numbers else 0


def _first_length(specs: Specs, *keys: str) -> int:
    for key in keys:
        if key in specs and specs[key][0]:
            return specs[key][0][0]
    return 0
