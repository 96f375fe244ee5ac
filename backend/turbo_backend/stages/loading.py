"""Settings to stages: finds the weight files, builds each network on `meta`, loads it, and warms the stage up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import nn

from turbo_backend.cancellation import Cancellations
from turbo_backend.checkpoints import (
    Checkpoint,
    DenoiserLayout,
    ModelFiles,
    TextEncoderLayout,
    VAELayout,
    find_files,
    open_checkpoint,
    tiny_checkpoint_folder,
)
from turbo_backend.errors import Misconfigured, TurboError
from turbo_backend.manifest import device_name, versions
from turbo_backend.memory import free_bytes, plan_with_gpu_memory, settle_gpu
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.parameters import make_parameters
from turbo_backend.planner import Placement, choose_placement, workspace_bytes
from turbo_backend.settings import Settings
from turbo_backend.stages.denoiser import DenoiserStage
from turbo_backend.stages.experts import Experts, ResidentExperts, SpreadExperts, SwappedExperts
from turbo_backend.stages.image_encoder import ImageEncoderStage
from turbo_backend.stages.step_store import StepStore
from turbo_backend.stages.text_encoder import TextEncoderStage
from turbo_backend.stages.vae_decoder import VAEDecoderStage
from turbo_backend.stages.warm_up import default_latent_shape, warm_denoiser, warm_image_encoder, warm_vae_decoder
from turbo_backend.tokenizer import Tokenizer
from turbo_kernels import self_check
from turbo_kernels.fp8_linear import multiplies_fp8

_log = logging.getLogger(__name__)
_Net = TypeVar("_Net", bound=nn.Module, covariant=True)

#: Seed of `TURBO_WEIGHTS=random`.
_RANDOM_SEED = 0
#: A request longer than this runs alone: on a GPU one such sample fills the machine already.
_GPU_BATCH_TOKENS = 8192
_CPU_BATCH_TOKENS = 65536
#: Two ways to round to 16 bits thirty layers deep differ by 3 %; a wrong kernel by all there is.
_LARGEST_DECODE_ERROR = 0.15


def load_text_encoder(settings: Settings) -> TextEncoderStage:
    """The text encoder stage, loaded and warm."""
    _prepare_process(settings)
    model, files = settings.served_model, _find_files(settings)
    device = torch.device("cpu") if settings.text_encoder_device == "cpu" else settings.device
    quantize = settings.quant_text_encoder
    if quantize and not (settings.dtype == torch.bfloat16 and multiplies_fp8(device)):
        fits = "false, but for bfloat16 on a GPU of compute capability 8.9 or later"
        raise Misconfigured(f"TURBO_QUANT_TEXT_ENCODER = true: must be {fits}; this is {settings.dtype} on {device}")
    encoder, fingerprint = _load(
        TextEncoderLayout(model.text_encoder),
        files.text_encoder if files else None,
        settings,
        # A small GPU may not hold the weights before they are quantised.
        device=torch.device("cpu") if quantize and files else device,
    )
    encoder.prepare_for_inference(device, quantize=quantize)
    settle_gpu(device)
    encoder.warm_up(model.dit.text_len)
    settle_gpu(device)
    stage = TextEncoderStage(
        encoder,
        Tokenizer.from_folder(files.tokenizer if files else tiny_checkpoint_folder() / "tokenizer"),
        text_len=model.dit.text_len,
        cache_entries=settings.text_cache_entries,
        fingerprint=f"{fingerprint}, as e4m3" if quantize else fingerprint,
    )
    (warm,) = stage.encode(["warm-up"])
    if isinstance(warm, TurboError):
        raise warm
    return stage


def load_image_encoder(settings: Settings) -> ImageEncoderStage:
    """The image encoder stage, loaded; the VAE is in float32 whatever the settings say.

    A model that takes no image gets a stage that loads nothing and refuses every request.
    """
    _prepare_process(settings)
    model = settings.served_model
    if not model.takes_image:
        return ImageEncoderStage(None, model, cache_entries=0, fingerprint="")
    files = _find_files(settings)
    vae, fingerprint = _load(VAELayout(model.vae), files.vae if files else None, settings, dtype=torch.float32)
    del vae.decoder
    settle_gpu(settings.device)
    warm_image_encoder(vae, settings)
    settle_gpu(settings.device)
    return ImageEncoderStage(
        vae, model, cache_entries=settings.image_cache_entries, fingerprint=fingerprint, room=_room(settings)
    )


def load_denoiser(
    settings: Settings,
    *,
    cancellations: Cancellations | None = None,
    open_store: Callable[[Mapping[str, object]], StepStore | None] | None = None,
) -> DenoiserStage:
    """The denoiser stage, its kernels checked, loaded and warm.

    Args:
        cancellations: where its requests are given up.
        open_store: gives the place where the steps of durable requests are kept, from all that decides their bits
            besides a request; None where none are kept.

    Raises:
        Misconfigured: the chosen kernels give wrong numbers on this machine.
    """
    _prepare_process(settings)
    model, files = settings.served_model, _find_files(settings)
    check = self_check(settings.device, model.dit.head_dim, settings.provider)
    if not check.passed:
        raise Misconfigured(f"attention provider {settings.provider} fails its self-check: {check.details}")

    layout = DenoiserLayout(model.dit, quant_linear=settings.quant_linear)
    paths = files.dit if files else (None,) * model.num_experts
    experts, fingerprint = _load_experts(layout, paths, settings)
    decisive: dict[str, object] = {
        "model": model.name,
        "checkpoint_dir": str(settings.checkpoint_dir),
        "weights": fingerprint,
        "linear_kind": experts.select(0).linear_kind,
        "provider": settings.provider,
        "dtype": str(settings.dtype),
        "device": device_name(settings.device),
        "versions": versions(),
    }
    # On a GPU a sample's bits depend on how many share its products; on a CPU they do not.
    shares_forwards = settings.device.type == "cpu" or not settings.batch_invariant
    stage = DenoiserStage(
        experts,
        model,
        device=settings.device,
        dtype=settings.dtype,
        provider=settings.provider,
        max_batch_size=settings.max_batch_size if shares_forwards else 1,
        max_batch_tokens=_GPU_BATCH_TOKENS if settings.device.type == "cuda" else _CPU_BATCH_TOKENS,
        fingerprint=fingerprint,
        identity={
            "ensemble": settings.ensemble or model.ensemble,
            "linear_kind": experts.select(0).linear_kind,
            "self_check": "passed",
        },
        room=_room(settings),
        records=settings.record_forwards,
        max_queue_size=settings.max_queue_size,
        cancellations=cancellations,
        store=None if open_store is None else open_store(decisive),
    )
    warm_denoiser(stage, experts.networks, settings)
    settle_gpu(settings.device)
    return stage


def _load_experts(layout: DenoiserLayout, paths: Sequence[Path | None], settings: Settings) -> tuple[Experts, str]:
    """The denoiser networks where they will run from, and the fingerprints of their weights."""
    placement = _place_experts(settings, len(paths))
    fingerprints: list[str] = []

    def load(expert: int, device: torch.device = settings.device) -> WanDiT:
        net, fingerprint = _load(layout, paths[expert], settings, device=device, seed=_RANDOM_SEED + expert)
        net.prepare_for_inference()
        settle_gpu(device)
        fingerprints.append(fingerprint)
        return net

    experts: Experts
    if placement == "resident":
        experts = ResidentExperts([load(expert) for expert in range(len(paths))])
    elif placement == "spread":
        beside = settings.device_beside
        if beside is None:
            raise Misconfigured(f"TURBO_EXPERT_PLACEMENT = spread: takes two GPUs, and {settings.device} is alone")
        check = self_check(beside, settings.served_model.dit.head_dim, settings.provider)
        if not check.passed:
            raise Misconfigured(f"{settings.provider} fails its self-check on {beside}: {check.details}")
        experts = SpreadExperts([load(0), load(1, beside)], settings.device)
    else:
        experts = SwappedExperts([partial(load, expert) for expert in range(len(paths))], settings.device)
    return experts, " ".join(fingerprints)


def _place_experts(settings: Settings, num_experts: int) -> Placement:
    if num_experts == 1:
        return "resident"
    if settings.expert_placement != "auto":
        return settings.expert_placement
    if settings.device.type != "cuda":
        return "resident"
    model, beside = settings.served_model, settings.device_beside
    return choose_placement(
        model,
        make_parameters(model, {}, seed=1),
        dtype=settings.dtype,
        quant_linear=settings.quant_linear,
        quant_text_encoder=settings.quant_text_encoder,
        free=free_bytes(settings.device),
        free_beside=0 if beside is None else free_bytes(beside),
    )


def load_vae_decoder(settings: Settings, *, cancellations: Cancellations | None = None) -> VAEDecoderStage:
    """The VAE decoder stage, its kernels checked, loaded and warm; `cancellations` as for the denoiser.

    Raises:
        Misconfigured: the kernels give wrong frames on this machine.
    """
    _prepare_process(settings)
    model, files = settings.served_model, _find_files(settings)
    vae, fingerprint = _load(VAELayout(model.vae), files.vae if files else None, settings)
    if settings.device.type == "cuda":
        _, h, w = default_latent_shape(model)
        error = vae.kernel_error(torch.randn(1, model.vae.z_dim, 2, h, w, generator=torch.Generator().manual_seed(0)))
        if error > _LARGEST_DECODE_ERROR:
            raise Misconfigured(f"the VAE's kernels fail their self-check: {error:.3f} from the plain layers")
    settle_gpu(settings.device)
    stage = VAEDecoderStage(vae, fingerprint=fingerprint, room=_room(settings), cancellations=cancellations)
    warm_vae_decoder(stage, vae, settings)
    settle_gpu(settings.device)
    return stage


def _room(settings: Settings) -> int:
    """Bytes of a GPU that stay free for the other stages: what all of them need at the largest preset."""
    return max(workspace_bytes(model, settings.dtype) for model in settings.served_models)


def _prepare_process(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    plan_with_gpu_memory(settings.gpu_memory)
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


class _Layout(Protocol[_Net]):
    @property
    def keep_fp32(self) -> tuple[str, ...]: ...

    def build(self) -> _Net: ...

    def load(self, checkpoint: Checkpoint, *, device: torch.device | str, dtype: torch.dtype) -> _Net: ...


def _load(
    layout: _Layout[_Net],
    path: Path | None,
    settings: Settings,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = _RANDOM_SEED,
) -> tuple[_Net, str]:
    """The network and the fingerprint of its weights; device and dtype are those of the settings unless given."""
    started = time.perf_counter()
    device, dtype = device or settings.device, dtype or settings.dtype
    if path is None:
        net = layout.build()
        on_device = device if device.type == "cuda" else None
        initialize_random(net, seed, device=device, dtype=dtype, keep_fp32=layout.keep_fp32, generator_device=on_device)
        fingerprint = f"random, seed {seed}"
    else:
        checkpoint = open_checkpoint(path)
        with ThreadPoolExecutor(1) as pool:  # hashing 28 GB takes as long as loading them
            hashing = pool.submit(checkpoint.fingerprint)
            net = layout.load(checkpoint, device=device, dtype=dtype)
            fingerprint = hashing.result()
    _log.info("%s: %s loaded in %.1f s", path or "random", type(net).__name__, time.perf_counter() - started)
    return net.eval().requires_grad_(False), fingerprint
