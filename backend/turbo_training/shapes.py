"""How large a training run is: the full one for a GPU, and the smoke run that checks every stage on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from turbo_backend.config import MODELS, DiTConfig, ModelConfig, TextEncoderConfig, VAEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShape:
    """One stage: steps at most, share of the total time, batch size, learning rate."""

    max_steps: int
    share: float
    batch_size: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsShape:
    """Clips whose latents are kept: how many at most, and the share of the total time for encoding them."""

    num_clips: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShape:
    """Everything that sizes a run.

    Attributes:
        model, image_model: shapes of the networks; the second differs in what its denoiser takes.
        num_frames, height, width: of the clips.
        crop: side of the squares that the VAE is trained on, in pixels.
        vae, text, teacher, sla, rcm, i2v, i2v_sla, i2v_rcm: stages by name.
        latents, i2v_latents: what the denoiser's stages train on.
    """

    model: ModelConfig
    image_model: ModelConfig
    num_frames: int
    height: int
    width: int
    crop: int
    vae: StageShape
    text: StageShape
    latents: LatentsShape
    teacher: StageShape
    sla: StageShape
    rcm: StageShape
    i2v_latents: LatentsShape
    i2v: StageShape
    i2v_sla: StageShape
    i2v_rcm: StageShape


FULL = RunShape(
    model=MODELS["tiny"],
    image_model=MODELS["tiny-I2V"],
    num_frames=33,
    height=144,
    width=256,
    crop=112,
    vae=StageShape(max_steps=40_000, share=0.12, batch_size=8, learning_rate=2e-3),
    text=StageShape(max_steps=6_000, share=0.02, batch_size=512, learning_rate=1e-3),
    latents=LatentsShape(num_clips=32_000, share=0.05),
    teacher=StageShape(max_steps=60_000, share=0.20, batch_size=64, learning_rate=2e-3),
    sla=StageShape(max_steps=40_000, share=0.17, batch_size=64, learning_rate=1.5e-3),
    rcm=StageShape(max_steps=30_000, share=0.20, batch_size=16, learning_rate=1e-4),
    i2v_latents=LatentsShape(num_clips=8_000, share=0.03),
    i2v=StageShape(max_steps=20_000, share=0.06, batch_size=64, learning_rate=1e-3),
    i2v_sla=StageShape(max_steps=20_000, share=0.07, batch_size=64, learning_rate=1.5e-3),
    i2v_rcm=StageShape(max_steps=20_000, share=0.08, batch_size=16, learning_rate=1e-4),
)

_SMOKE_MODEL = ModelConfig(
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
)

SMOKE = RunShape(
    model=_SMOKE_MODEL,
    image_model=replace(
        _SMOKE_MODEL,
        dit=replace(_SMOKE_MODEL.dit, in_channels=36),
        dit_files=(("tiny-I2V",), ("tiny-I2V",)),
        default_sigma_max=200.0,
    ),
    num_frames=5,
    height=48,
    width=64,
    crop=32,
    vae=StageShape(max_steps=3, share=0.2, batch_size=2, learning_rate=1e-3),
    text=StageShape(max_steps=3, share=0.1, batch_size=4, learning_rate=1e-3),
    latents=LatentsShape(num_clips=8, share=0.1),
    teacher=StageShape(max_steps=4, share=0.2, batch_size=4, learning_rate=1e-3),
    sla=StageShape(max_steps=3, share=0.1, batch_size=2, learning_rate=1e-4),
    rcm=StageShape(max_steps=6, share=0.1, batch_size=2, learning_rate=1e-4),
    i2v_latents=LatentsShape(num_clips=4, share=0.1),
    i2v=StageShape(max_steps=3, share=0.1, batch_size=2, learning_rate=1e-4),
    i2v_sla=StageShape(max_steps=3, share=0.1, batch_size=2, learning_rate=1e-4),
    i2v_rcm=StageShape(max_steps=6, share=0.1, batch_size=2, learning_rate=1e-4),
)
