"""What a stage runs before it is ready, so that no first request pays for what later ones find done.

On a GPU that is compiling kernels (or reading them from their cache on disk) and what cuBLAS and cuDNN look up for each
new shape: so every served preset is visited that the GPU holds. On a CPU nothing of it depends on the size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from turbo_backend.config import ModelConfig
from turbo_backend.errors import TurboError
from turbo_backend.memory import decoder_bytes, denoiser_bytes, encoder_bytes, free_bytes, gpu_memory
from turbo_backend.nets.attention import AttentionSettings, offered_types
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.vae import WanVAE
from turbo_backend.parameters import ASPECT_RATIOS, Delivery, GenerationParameters, make_parameters
from turbo_backend.planner import Placement, plan_memory, whole_bytes
from turbo_backend.settings import Settings
from turbo_backend.stages.denoiser import DenoiserStage
from turbo_backend.stages.denoiser_request import DenoisedStep, DenoiseRequest
from turbo_backend.stages.sampling import preview_factor
from turbo_backend.stages.vae_decoder import DecodeRequest, VAEDecoderStage
from turbo_backend.video import to_yuv420

_log = logging.getLogger(__name__)

#: The second block begins with what the first one leaves to it; those behind run the same kernels again.
_FEW_BLOCKS = 2
#: Frames of a video of two latent frames: the first runs through other code than all that follow.
_FEW_FRAMES = 5
#: The other stages load at the same time, and some need more for it than they hold later.
_LOADING_SECONDS = 180.0


def list_presets(model: ModelConfig, aspect_ratios: Sequence[str] = ASPECT_RATIOS) -> list[GenerationParameters]:
    """The default request at each size that the model serves; sizes that two presets share are listed once."""
    sizes: dict[tuple[int, int], GenerationParameters] = {}
    for resolution in model.resolutions:
        for aspect_ratio in aspect_ratios:
            values = {"RESOLUTION": resolution, "ASPECT_RATIO": aspect_ratio}
            parameters = make_parameters(model, values, seed=1)
            sizes.setdefault((parameters.width, parameters.height), parameters)
    return list(sizes.values())


def fitting(
    presets: Iterable[GenerationParameters],
    settings: Settings,
    *,
    capacity: int,
    needed: Callable[[GenerationParameters], int],
    free: Callable[[], int],
) -> Iterator[GenerationParameters]:
    """Those of `presets` that fit; the others are left out and logged.

    The other stages may be loading meanwhile, so it is not enough that memory is free: the GPU must hold all stages at
    once, each at work on the preset.

    Args:
        capacity: bytes of the whole GPU.
        needed: bytes of this stage's workspace.
        free: bytes that are free now.
    """
    for parameters in presets:
        if whole_server(settings, parameters) <= capacity and needed(parameters) <= free():
            yield parameters
        else:
            size = f"{parameters.width}x{parameters.height}"
            _log.warning("%s is not warmed up: it may not fit this GPU beside the other stages", size)


def _fitting_gpu(
    presets: Iterable[GenerationParameters], settings: Settings, needed: Callable[[GenerationParameters], int]
) -> Iterator[GenerationParameters]:
    """The same on the settings' GPU; none without one."""
    device = settings.device
    if device.type != "cuda":
        return iter(())
    _, capacity = gpu_memory(device)
    return fitting(presets, settings, capacity=capacity, needed=needed, free=lambda: free_bytes(device))


def whole_server(settings: Settings, parameters: GenerationParameters) -> int:
    """Bytes of all stages at work at once; where the experts' placement is still open, the least."""
    chosen = settings.expert_placement
    placements: tuple[Placement, ...] = ("resident", "swapped") if chosen == "auto" else (chosen,)
    return min(
        whole_bytes(
            plan_memory(
                settings.served_model,
                parameters,
                dtype=settings.dtype,
                quant_linear=settings.quant_linear,
                placement=placement,
                text_encoder_on_cpu=settings.text_encoder_device == "cpu",
                quant_text_encoder=settings.quant_text_encoder,
            )
        )
        for placement in placements
    )


def warm_denoiser(stage: DenoiserStage, networks: Sequence[WanDiT], settings: Settings) -> None:
    """Each preset through a few blocks of each network, then requests at the default size."""
    model, device, dtype = settings.served_model, settings.device, settings.dtype

    def needed(parameters: GenerationParameters) -> int:
        return denoiser_bytes(model.dit, parameters, dtype, provider=settings.provider, device=device)

    # An upright video has as many tokens as a wide one, and runs the same kernels.
    presets = list(_fitting_gpu(list_presets(model, ("16:9",)), settings, needed))
    for net in networks:
        denoise_presets(net, presets, device=device, dtype=dtype, provider=settings.provider)
    if device.type == "cuda":
        default = make_parameters(model, {}, seed=1)
        most = max(needed(default), decoder_bytes(model.vae, default, dtype, device=device))
        wait_for_room(most, lambda: free_bytes(device))
    _run_default_requests(stage, model, offered_types(settings.provider))


def wait_for_room(
    needed: int, free: Callable[[], int], *, seconds: float = _LOADING_SECONDS, pause: float = 0.5
) -> None:
    """Returns when so many bytes are free, or after `seconds`: then what comes says itself what it lacks."""
    ends = time.monotonic() + seconds
    if free() < needed:
        _log.info("warm-up waits until the other stages have loaded and %.1f GiB are free", needed / 2**30)
    while free() < needed and time.monotonic() < ends:
        time.sleep(pause)


@torch.inference_mode()
def denoise_presets(
    net: WanDiT,
    presets: Iterable[GenerationParameters],
    *,
    device: torch.device,
    dtype: torch.dtype,
    provider: str,
) -> None:
    """Each preset with each type of attention through the first blocks, whose kernels are those of all the others."""
    config = net.config
    context = net.prepare_context(torch.zeros(1, 1, config.text_dim), [1])
    timesteps = torch.tensor([1000.0], dtype=torch.float64)
    for parameters in presets:
        latents = torch.zeros(1, config.in_channels, *parameters.latent_shape, device=device, dtype=dtype)
        for attention_type in offered_types(provider):
            attention = AttentionSettings(
                attention_type=attention_type, sla_topk=parameters.sla_topk, provider=provider
            )
            net(latents, timesteps, context, attention=attention, num_blocks=_FEW_BLOCKS)


def _run_default_requests(stage: DenoiserStage, model: ModelConfig, types: Sequence[str]) -> None:
    """A request of each attention type at the default size, that of the default type in full length.

    The second step is measured, for predictions. Prompts of up to 31, of up to 63 and of more tokens take kernels of
    their own.
    """
    _, h, w = default_latent_shape(model)
    conditioned = model.dit.in_channels - model.dit.out_channels
    full = model.default_num_frames
    for attention_type, num_frames, text_length in (("original", 9, 8), ("sla", 9, 48), ("sagesla", full, 96)):
        if attention_type not in types:
            attention_type = "sagesla"
        num_latents = 1 + (num_frames - 1) // 4
        image_latents = torch.zeros(conditioned, num_latents, h, w) if model.takes_image else None
        request = DenoiseRequest(
            text_embeddings=torch.zeros(model.dit.text_len, model.dit.text_dim),
            text_length=text_length,
            values={"NUM_STEPS": 2, "NUM_FRAMES": num_frames, "ATTENTION_TYPE": attention_type, "SEED": 1},
            report={"stages": {}},
            image_latents=image_latents,
            preview=True,
        )
        for _, update in stage.denoise([request]):
            if isinstance(update, TurboError):
                raise update
            assert isinstance(update, DenoisedStep)


def warm_vae_decoder(stage: VAEDecoderStage, vae: WanVAE, settings: Settings) -> None:
    """Two latent frames and a preview of each preset, wide, square and upright; then a request at the default size."""
    model = settings.served_model

    def needed(parameters: GenerationParameters) -> int:
        return decoder_bytes(model.vae, parameters, settings.dtype, device=settings.device)

    decode_presets(vae, _fitting_gpu(list_presets(model), settings, needed))
    _, h, w = default_latent_shape(model)
    request = DecodeRequest(
        latents=torch.zeros(model.vae.z_dim, 2, h, w),
        report={"stages": {}, "parameters": {}},
        delivery=Delivery(container="raw"),
    )
    for _, update in stage.decode({0: request}):
        if isinstance(update, TurboError):
            raise update


@torch.inference_mode()
def decode_presets(vae: WanVAE, presets: Iterable[GenerationParameters]) -> None:
    """The first two latent frames of each, to the planes that an MP4 takes, and a preview."""
    for parameters in presets:
        _, h, w = parameters.latent_shape
        factor = preview_factor(h, w)
        vae.decode_frame(torch.zeros(1, vae.config.z_dim, 1, h // factor, w // factor))
        for frames_BCFHW in vae.decode_chunks(torch.zeros(1, vae.config.z_dim, 2, h, w)):
            to_yuv420(frames_BCFHW)


def warm_image_encoder(vae: WanVAE, settings: Settings) -> None:
    """Images of the default size, and of each preset, wide and upright."""
    model = settings.served_model

    def needed(parameters: GenerationParameters) -> int:
        return encoder_bytes(model.vae, parameters, device=settings.device)

    default = make_parameters(model, {}, seed=1)
    encode_presets(vae, [default, *_fitting_gpu(list_presets(model, ("16:9", "9:16")), settings, needed)])


def encode_presets(vae: WanVAE, presets: Iterable[GenerationParameters]) -> None:
    """An image at each size, with as few frames behind it as run every layer."""
    device = vae.conv1.weight.device
    for parameters in presets:
        image = torch.zeros(3, parameters.height, parameters.width, device=device)
        vae.encode_image(image, num_frames=_FEW_FRAMES)


def default_latent_shape(model: ModelConfig) -> tuple[int, int, int]:
    """(T, h, w) of a request that says nothing."""
    return make_parameters(model, {}, seed=1).latent_shape
