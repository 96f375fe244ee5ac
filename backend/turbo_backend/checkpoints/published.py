"""The published files of every model: where they live and, where upstream's records are known, size and SHA-256."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from turbo_backend.config import MODELS, ModelConfig

FileKind = Literal["denoiser", "text encoder", "vae", "tokenizer"]

_WAN_REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """One file on the Hugging Face hub.

    Attributes:
        kind: what it holds.
        repository: `owner/name` on the hub.
        name: path in the repository, and below the checkpoint folder.
        size: bytes, where recorded; the hub's own answer is used when downloading.
        sha256: of the contents, where recorded.
        quantized: a denoiser whose block linears are int8.
        required: False for a file that another listed one can stand in for.
    """

    kind: FileKind
    repository: str
    name: str
    size: int | None = None
    sha256: str | None = None
    quantized: bool = False
    required: bool = True


#: Common to every Wan model. Sizes and hashes are the hub's records of Wan-AI/Wan2.1-T2V-1.3B.
WAN_FILES = (
    PublishedFile(
        kind="text encoder",
        repository=_WAN_REPOSITORY,
        name="models_t5_umt5-xxl-enc-bf16.pth",
        size=11_361_920_418,
        sha256="7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d",
    ),
    PublishedFile(
        kind="vae",
        repository=_WAN_REPOSITORY,
        name="Wan2.1_VAE.pth",
        size=507_609_880,
        sha256="38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981",
    ),
    PublishedFile(
        kind="tokenizer",
        repository=_WAN_REPOSITORY,
        name="google/umt5-xxl/tokenizer.json",
        size=16_837_417,
        sha256="6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b",
    ),
    PublishedFile(
        kind="tokenizer",
        repository=_WAN_REPOSITORY,
        name="google/umt5-xxl/spiece.model",
        size=4_548_313,
        sha256="e3909a67b780650b35cf529ac782ad2b6b26e6d1f849d3fbb6a872905f452458",
        required=False,
    ),
)

#: Repository of each published denoiser, by the file name that `config.MODELS` uses.
DENOISER_REPOSITORIES = {
    "TurboWan2.1-T2V-1.3B-480P": "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P",
    "TurboWan2.1-T2V-14B-480P": "TurboDiffusion/TurboWan2.1-T2V-14B-480P",
    "TurboWan2.1-T2V-14B-720P": "TurboDiffusion/TurboWan2.1-T2V-14B-720P",
    "TurboWan2.2-I2V-A14B-high-720P": "TurboDiffusion/TurboWan2.2-I2V-A14B-720P",
    "TurboWan2.2-I2V-A14B-low-720P": "TurboDiffusion/TurboWan2.2-I2V-A14B-720P",
}


def published_files(model: ModelConfig, *, quant_linear: bool) -> tuple[PublishedFile, ...]:
    """The files to have for one model, in the order denoiser, text encoder, VAE, tokenizer.

    Where a model names several interchangeable denoisers (14B at 720p or 480p) the first is listed.
    `tiny` needs none: its weights come with the server.
    """
    if not all(name in DENOISER_REPOSITORIES for names in model.dit_files for name in names):
        return ()
    denoisers = tuple(
        PublishedFile(
            kind="denoiser",
            repository=DENOISER_REPOSITORIES[names[0]],
            name=f"{names[0]}{'-quant' if quant_linear else ''}.pth",
            quantized=quant_linear,
        )
        for names in model.dit_files
    )
    return denoisers + WAN_FILES


def models_with_published_files() -> tuple[str, ...]:
    """Names of the models whose files are on the hub."""
    return tuple(name for name, model in MODELS.items() if published_files(model, quant_linear=False))
