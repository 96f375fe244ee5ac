"""Settings to stages: finds the weight files, builds each network on `meta`, loads it, and warms the stage up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from turbo_kernels import self_check

from turbo_backend.checkpoints import ModelFiles, find_files, load_into, open_checkpoint, tiny_checkpoint_folder
from turbo_backend.config import ModelConfig
from turbo_backend.errors import Misconfigured, TurboError
from turbo_backend.nets.dit import KEEP_FP32, WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.nets.vae import WanVAE
from turbo_backend.parameters import Delivery
from turbo_backend.quantization import quantize_linears
from turbo_backend.settings import Settings
from turbo_backend.stages.denoiser import DenoisedStep, DenoiserStage, DenoiseRequest
from turbo_backend.stages.text_encoder import TextEncoderStage
from turbo_backend.stages.vae_decoder import DecodeRequest, VAEDecoderStage
from turbo_backend.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_Net = TypeVar("_Net", bound=nn.Module)

#: Seed of `TURBO_WEIGHTS=random`.
_RANDOM_SEED = 0
#: A request longer than this runs alone: on a GPU one such sample fills the machine already.
_GPU_BATCH_TOKENS = 8192
_CPU_BATCH_TOKENS = 65536
#: Pixels decoded together: those of one 720p video of 81 frames.
_BATCH_PIXELS = 81 * 1280 * 720


def load_text_encoder(settings: Settings) -> TextEncoderStage:
    """The text encoder stage, loaded and warm."""
    _prepare_process(settings)
    model, files = settings.served_model, _find_files(settings)
    encoder, _ = _load(lambda: UMT5Encoder(model.text_encoder), files and files.text_encoder, settings)
    stage = TextEncoderStage(
        encoder,
        Tokenizer.from_folder(files.tokenizer if files else tiny_checkpoint_folder() / "tokenizer"),
        text_len=model.dit.text_len,
        cache_entries=settings.text_cache_entries,
    )
    (warm,) = stage.encode(["warm-up"])
    if isinstance(warm, TurboError):
        raise warm
    return stage


def load_denoiser(settings: Settings, *, ensemble: str) -> DenoiserStage:
    """The denoiser stage, its kernels checked, loaded and warm.

    Args:
        ensemble: name of the ensemble that this denoiser serves, for the replay manifest.

    Raises:
        Misconfigured: the chosen kernels give wrong numbers on this machine.
    """
    _prepare_process(settings)
    model, files = settings.served_model, _find_files(settings)
    if model.num_experts != 1:
        raise Misconfigured(f"{model.name} has {model.num_experts} experts: the text_to_video denoiser runs one")
    check = self_check(settings.device, model.dit.head_dim, settings.provider)
    if not check.passed:
        raise Misconfigured(f"attention provider {settings.provider} fails its self-check: {check.details}")

    def build() -> WanDiT:
        net = WanDiT(model.dit)
        if settings.quant_linear:
            quantize_linears(net)
        return net

    net, fingerprint = _load(
        build, files and files.dit[0], settings, keep_fp32=KEEP_FP32, quantize=settings.quant_linear
    )
    stage = DenoiserStage(
        net,
        model,
        provider=settings.provider,
        max_batch_tokens=_GPU_BATCH_TOKENS if settings.device.type == "cuda" else _CPU_BATCH_TOKENS,
        identity={
            "ensemble": ensemble,
            "weights": {"denoiser": fingerprint},
            "quant_linear": settings.quant_linear,
            "self_check": "passed",
        },
    )
    _warm_denoiser(stage, model)
    return stage


def load_vae_decoder(settings: Settings) -> VAEDecoderStage:
    """The VAE decoder stage, loaded and warm."""
    _prepare_process(settings)
    model, files = settings.served_model, _find_files(settings)
    vae, _ = _load(lambda: WanVAE(model.vae), files and files.vae, settings)
    stage = VAEDecoderStage(vae, max_batch_pixels=_BATCH_PIXELS)
    _, h, w = _warm_shape(model)
    request = DecodeRequest(
        latents=torch.zeros(model.vae.z_dim, 2, h, w), report={"stages": {}}, delivery=Delivery(container="raw")
    )
    for _, update in stage.decode([request]):
        if isinstance(update, TurboError):
            raise update
    return stage


def _prepare_process(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)


def _find_files(settings: Settings) -> ModelFiles | None:
    """The weight files, or None where weights are random."""
    if settings.weights == "random":
        return None
    folder = settings.checkpoint_dir or tiny_checkpoint_folder()
    return find_files(
        settings.served_model, folder, quant_linear=settings.quant_linear, dit=settings.dit_checkpoint or None
    )


def _load(
    build: Callable[[], _Net],
    path: Path | None,
    settings: Settings,
    *,
    keep_fp32: Sequence[str] = (),
    quantize: bool = False,
) -> tuple[_Net, str]:
    """The network on its device and the fingerprint of its weights."""
    started = time.perf_counter()
    device, dtype = settings.device, settings.dtype
    with torch.device("meta"):
        net = build().eval().requires_grad_(False)
    if path is None:
        generator_device = device if device.type == "cuda" else None
        initialize_random(
            net, _RANDOM_SEED, device=device, dtype=dtype, keep_fp32=keep_fp32, generator_device=generator_device
        )
        fingerprint = f"random, seed {_RANDOM_SEED}"
    else:
        checkpoint = open_checkpoint(path)
        load_into(net, checkpoint, device=device, dtype=dtype, keep_fp32=keep_fp32, quantize=quantize)
        fingerprint = checkpoint.fingerprint()
    _log.info("%s: %s loaded in %.1f s", path or "random", type(net).__name__, time.perf_counter() - started)
    return net, fingerprint


def _warm_shape(model: ModelConfig) -> tuple[int, int, int]:
    from turbo_backend.parameters import make_parameters

    return make_parameters(model, {}, seed=1).latent_shape


def _warm_denoiser(stage: DenoiserStage, model: ModelConfig) -> None:
    """One short request of each attention type at the default size."""
    for attention_type in ("original", "sla", "sagesla"):
        request = DenoiseRequest(
            text_embeddings=torch.zeros(model.dit.text_len, model.dit.text_dim),
            text_length=8,
            values={"NUM_STEPS": 1, "NUM_FRAMES": 9, "ATTENTION_TYPE": attention_type, "SEED": 1},
            report={"stages": {}},
            preview=True,
        )
        for _, update in stage.denoise([request]):
            if isinstance(update, TurboError):
                raise update
            assert isinstance(update, DenoisedStep)
