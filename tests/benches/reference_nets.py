"""The same networks by diffusers and transformers, to check against and to time beside ours."""

from __future__ import annotations

import re

import torch
from gpu_rows import CUDA
from torch import nn

from turbo_backend.config import DiTConfig
from turbo_backend.nets.umt5 import UMT5Encoder

#: Parameter names of UMT5 as published, and as transformers has them.
_UMT5_NAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


def umt5_of_transformers(encoder: UMT5Encoder) -> nn.Module:
    """Transformers' encoder with the weights of ours, in their dtype and on their device."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = encoder.config
    with torch.device("meta"):
        net = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.dim_attn // config.num_heads,
                d_ff=config.dim_ffn,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.num_buckets,
                relative_attention_max_distance=config.max_distance,
                feed_forward_proj="gated-gelu",
                dense_act_fn="gelu_new",
                dropout_rate=0.0,
            )
        )
    weights = {}
    for name, value in encoder.state_dict().items():
        for ours, theirs in _UMT5_NAMES:
            name = re.sub(ours, theirs, name)
        weights[name] = value
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    net.load_state_dict(weights, strict=True, assign=True)
    return net.eval()


def dit_of_diffusers(config: DiTConfig) -> nn.Module:
    """WanTransformer3DModel of a published shape, in bf16 on the GPU, with the weights that it starts from."""
    from diffusers import WanTransformer3DModel

    with CUDA:
        net = WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    return net.to(torch.bfloat16).eval()


def vae_of_diffusers() -> nn.Module:
    """AutoencoderKLWan of Wan2.1 in bf16 on the GPU, with the weights that it starts from."""
    from diffusers import AutoencoderKLWan

    with CUDA:
        net = AutoencoderKLWan()
    return net.to(torch.bfloat16).eval()
