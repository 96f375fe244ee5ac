"""Shapes of every network that can be served, and the table of named models (SPEC sections 1, 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from turbo_backend.errors import Misconfigured

#: Per-channel mean and standard deviation of the Wan2.1 latents; latents = (mean - LATENTS_MEAN) / LATENTS_STD.
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """A Wan diffusion transformer."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim not in (64, 128):
            raise ValueError(f"head_dim must be 64 or 128, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """A UMT5 encoder."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """The causal Wan VAE: 8x8 pixels and 4 frames to one latent."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One served model: its networks, the files they load from, and its request defaults.

    `dit_files` names the published denoiser files without suffix (`.pth` and `.safetensors` are both looked for);
    a model with two experts lists the high-noise expert first. `-quant` is added for quantized files. The defaults
    are those that all Wan models share. The weights of an `embedded` model come with the server.
    """

    name: str
    dit: DiTConfig
    dit_files: tuple[tuple[str, ...], ...]
    default_resolution: str
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoder_file: str = "models_t5_umt5-xxl-enc-bf16"
    vae_file: str = "Wan2.1_VAE"
    tokenizer: str = "google/umt5-xxl"
    resolutions: tuple[str, ...] = ("480p", "720p", "720", "512", "480")
    default_num_frames: int = 81
    default_sigma_max: float = 80.0
    embedded: bool = False

    @property
    def num_experts(self) -> int:
        return len(self.dit_files)

    @property
    def takes_image(self) -> bool:
        """Whether the denoiser is conditioned on an image: 4 channels of mask and the image's latents."""
        return self.dit.in_channels > self.dit.out_channels

    @property
    def num_mask_channels(self) -> int:
        """Channels that say which latent frames are given, before the image's latents; 0 without image."""
        return self.dit.in_channels - 2 * self.dit.out_channels if self.takes_image else 0

    @property
    def ensemble(self) -> str:
        """Name of the Triton ensemble that serves this model."""
        return "image_to_video" if self.takes_image else "text_to_video"

    @property
    def suffix(self) -> str:
        """What tells the model's parts from those of another one on the same server, such as `denoiser_14b`."""
        return self.name.rpartition("-")[2].lower().replace(".", "_")

    def shares_stages_with(self, other: ModelConfig) -> bool:
        """Whether one text encoder and one VAE serve both."""
        return self._shared == other._shared

    @property
    def _shared(self) -> tuple[object, ...]:
        return self.text_encoder, self.text_encoder_file, self.tokenizer, self.dit.text_len, self.vae, self.vae_file


#: Sized so that the files of both tiny models together stay under 24 MiB in bfloat16.
_TINY_DIT = DiTConfig(dim=256, ffn_dim=640, num_heads=4, num_layers=5, text_dim=128)
_TINY_TEXT_ENCODER = TextEncoderConfig(vocab_size=1024, dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=3)
_TINY_VAE = VAEConfig(base_dim=16, dim_mult=(1, 2, 4, 3), num_res_blocks=1)

MODELS: dict[str, ModelConfig] = {
    model.name: model
    for model in (
        ModelConfig(
            name="tiny",
            dit=_TINY_DIT,
            text_encoder=_TINY_TEXT_ENCODER,
            vae=_TINY_VAE,
            dit_files=(("tiny-T2V",),),
            text_encoder_file="tiny-umt5",
            vae_file="tiny-VAE",
            tokenizer="tokenizer",
            resolutions=("144p",),
            default_resolution="144p",
            default_num_frames=33,
            embedded=True,
        ),
        ModelConfig(
            name="tiny-I2V",
            dit=replace(_TINY_DIT, in_channels=36),
            text_encoder=_TINY_TEXT_ENCODER,
            vae=_TINY_VAE,
            dit_files=(("tiny-I2V",), ("tiny-I2V",)),  # one network stands for both experts
            text_encoder_file="tiny-umt5",
            vae_file="tiny-VAE",
            tokenizer="tokenizer",
            resolutions=("144p",),
            default_resolution="144p",
            default_num_frames=33,
            default_sigma_max=200.0,
            embedded=True,
        ),
        ModelConfig(
            name="Wan2.1-1.3B",
            dit=DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
            dit_files=(("TurboWan2.1-T2V-1.3B-480P",),),
            default_resolution="480p",
        ),
        ModelConfig(
            name="Wan2.1-14B",
            dit=DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
            dit_files=(("TurboWan2.1-T2V-14B-720P", "TurboWan2.1-T2V-14B-480P"),),
            default_resolution="720p",
        ),
        ModelConfig(
            name="Wan2.2-A14B",
            dit=DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_channels=36),
            dit_files=(("TurboWan2.2-I2V-A14B-high-720P",), ("TurboWan2.2-I2V-A14B-low-720P",)),
            default_resolution="720p",
            default_sigma_max=200.0,
        ),
    )
}


def name_ensembles(models: Sequence[ModelConfig]) -> dict[str, ModelConfig]:
    """The networks of one server by the name of their ensemble: plain for the first of a kind, then with a suffix."""
    names: dict[str, ModelConfig] = {}
    for model in models:
        names[f"{model.ensemble}_{model.suffix}" if model.ensemble in names else model.ensemble] = model
    return names


def find_model(name: str) -> ModelConfig:
    """The model of exactly that name.

    Raises:
        Misconfigured: no such model; the message lists those there are.
    """
    try:
        return MODELS[name]
    except KeyError:
        raise Misconfigured(f"unknown model {name!r}: one of {', '.join(MODELS)}") from None
