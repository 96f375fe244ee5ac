"""How large a training run is: the full one for a GPU, and the smoke run that checks every stage on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from turbo_backend.config import MODELS, DiTConfig, ModelConfig, TextEncoderConfig, VAEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShape:
    """One stage: steps at most, share of the total time, batch size, learning rate."""

    max_steps: int
    share: float
    batch_size: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShape:
    """Everything that sizes a run.

    Attributes:
        model: shapes of the networks.
        num_frames, height, width: of the clips.
        crop: side of the squares that the VAE is trained on, in pixels.
        num_latents: clips whose latents are kept for the denoiser's stages.
        latents_share: of the total time, for encoding them.
    """

    model: ModelConfig
    num_frames: int
    height: int
    width: int
    crop: int
    num_latents: int
    latents_share: float
    vae: StageShape
    text: StageShape
    teacher: StageShape
    sla: StageShape
    rcm: StageShape


FULL = RunShape(
    model=MODELS["tiny"],
    num_frames=33,
    height=144,
    width=256,
    crop=112,
    num_latents=40_000,
    latents_share=0.12,
    vae=StageShape(max_steps=20_000, share=0.20, batch_size=16, learning_rate=1e-3),
    text=StageShape(max_steps=3_000, share=0.06, batch_size=512, learning_rate=1e-3),
    teacher=StageShape(max_steps=60_000, share=0.38, batch_size=128, learning_rate=8e-4),
    sla=StageShape(max_steps=10_000, share=0.08, batch_size=64, learning_rate=2e-4),
    rcm=StageShape(max_steps=20_000, share=0.16, batch_size=48, learning_rate=5e-5),
)

SMOKE = RunShape(
    model=ModelConfig(
        name="smoke",
        dit=DiTConfig(dim=64, ffn_dim=128, num_heads=1, num_layers=2, text_dim=32, text_len=256),
        text_encoder=TextEncoderConfig(vocab_size=512, dim=32, dim_attn=32, dim_ffn=64, num_heads=2, num_layers=1),
        vae=VAEConfig(base_dim=4),
        dit_files=(("tiny-T2V",),),
        text_encoder_file="tiny-umt5",
        vae_file="tiny-VAE",
        tokenizer="tokenizer",
        resolutions=("144p",),
        default_resolution="144p",
        default_num_frames=5,
    ),
    num_frames=5,
    height=48,
    width=64,
    crop=32,
    num_latents=8,
    latents_share=0.1,
    vae=StageShape(max_steps=3, share=0.2, batch_size=2, learning_rate=1e-3),
    text=StageShape(max_steps=3, share=0.1, batch_size=4, learning_rate=1e-3),
    teacher=StageShape(max_steps=4, share=0.3, batch_size=4, learning_rate=1e-3),
    sla=StageShape(max_steps=3, share=0.1, batch_size=2, learning_rate=1e-4),
    rcm=StageShape(max_steps=6, share=0.2, batch_size=2, learning_rate=1e-4),
)
