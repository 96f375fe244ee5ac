"""What serving takes of a GPU's memory, predicted before anything is loaded; and what to serve on how much of it.

Every model of the server is a process with a CUDA context, weights and a memory cache of its own. Where the GPU has not
room for all of them at once, it gives back after each request what it takes besides its weights, so that of the
workspaces those add up whose stages work at one time: for requests that come one at a time, or overlap in two stages,
the two largest. The figures are estimates from shapes, held against measured peaks (`memory` has the workspaces).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from turbo_backend.checkpoints.layouts import DenoiserLayout, TextEncoderLayout, VAELayout
from turbo_backend.config import DiTConfig, ModelConfig, TextEncoderConfig, VAEConfig, find_model
from turbo_backend.errors import InvalidArgument, ResourceExhausted
from turbo_backend.memory import decoder_bytes, denoiser_bytes, encoder_bytes, text_encoder_bytes
from turbo_backend.parameters import RESOLUTIONS, GenerationParameters, adaptive_size, make_parameters

if TYPE_CHECKING:
    from turbo_backend.checkpoints.recognise import Specs

#: A CUDA context with the libraries' own buffers, of a stage's process and of the server itself.
CONTEXT_BYTES = 760 * 2**20
SERVER_BYTES = 590 * 2**20

Placement = Literal["resident", "spread", "swapped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes that one stage's process takes of the GPU: its weights, and at most that much besides."""

    weights: int
    workspace: int

    @property
    def peak(self) -> int:
        return self.weights + self.workspace + CONTEXT_BYTES


def plan_memory(
    model: ModelConfig,
    parameters: GenerationParameters,
    *,
    dtype: torch.dtype,
    quant_linear: bool,
    placement: Placement = "resident",
    text_encoder_on_cpu: bool = False,
    quant_text_encoder: bool = False,
) -> dict[str, StageMemory]:
    """Predicted memory of every stage on the GPU, by its name, for requests of these parameters.

    Args:
        dtype: of the networks; the image encoder's VAE is in float32 whatever this is.
        placement: whether all experts are on this GPU, or one alone (`spread`), or one at a time.
        text_encoder_on_cpu: leaves that stage out.
        quant_text_encoder: its blocks' linears in e4m3, its token table in the host's memory.
    """
    device = torch.device("cuda")
    num_experts = model.num_experts if placement == "resident" else 1
    stages = {
        "text_encoder": StageMemory(
            weights=_text_encoder_weights(model.text_encoder, dtype, quant_text_encoder),
            workspace=text_encoder_bytes(model.text_encoder, model.dit.text_len, dtype),
        ),
        "denoiser": StageMemory(
            weights=num_experts * _denoiser_weights(model.dit, quant_linear, dtype),
            workspace=denoiser_bytes(model.dit, parameters, dtype, provider="triton", device=device),
        ),
        "vae_decoder": StageMemory(
            weights=_vae_weights(model.vae, dtype, ("",)),
            workspace=decoder_bytes(model.vae, parameters, dtype, device=device),
        ),
    }
    if text_encoder_on_cpu:
        del stages["text_encoder"]
    if model.takes_image:
        stages["image_encoder"] = StageMemory(
            weights=_vae_weights(model.vae, torch.float32, ("encoder.", "conv1.")),
            workspace=encoder_bytes(model.vae, parameters, device=device),
        )
    return stages


def total_bytes(stages: Mapping[str, StageMemory]) -> int:
    """What a server of these stages takes of one GPU when two of them work at once."""
    held = SERVER_BYTES + sum(stage.weights + CONTEXT_BYTES for stage in stages.values())
    return held + sum(sorted(stage.workspace for stage in stages.values())[-2:])


def whole_bytes(stages: Mapping[str, StageMemory]) -> int:
    """What a server of these stages takes of one GPU when all of them work at once."""
    return SERVER_BYTES + sum(stage.peak for stage in stages.values())


def workspace_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """What all stages of a model take of a GPU besides weights, at its largest preset and default length."""
    presets = (make_parameters(model, {"RESOLUTION": resolution}, seed=1) for resolution in model.resolutions)
    plans = (plan_memory(model, parameters, dtype=dtype, quant_linear=False) for parameters in presets)
    return max(sum(stage.workspace for stage in plan.values()) for plan in plans)


def weight_bytes(specs: Specs, dtype: torch.dtype, *, keep_fp32: tuple[str, ...] = ()) -> int:
    """Bytes of the tensors of a network that is loaded in `dtype`; int8 tensors stay, and names in `keep_fp32`."""

    def item_size(name: str, stored: torch.dtype) -> int:
        if not stored.is_floating_point:
            return stored.itemsize
        return 4 if any(part in name for part in keep_fp32) else dtype.itemsize

    return sum(math.prod(shape) * item_size(name, stored) for name, (shape, stored) in specs.items())


# Building even a network without memory takes a while, and every figure needs one.
@cache
def _text_encoder_weights(config: TextEncoderConfig, dtype: torch.dtype, quantized: bool) -> int:
    specs = TextEncoderLayout(config).specs
    if not quantized:
        return weight_bytes(specs, dtype)
    linears = {name: spec for name, spec in specs.items() if len(spec[0]) == 2 and "embedding" not in name}
    rest = {name: specs[name] for name in specs.keys() - linears.keys() - {"token_embedding.weight"}}
    rows = sum(math.prod(shape) + 4 * shape[0] for shape, _ in linears.values())  # values, and a scale for each
    return rows + weight_bytes(rest, dtype)


@cache
def _denoiser_weights(config: DiTConfig, quant_linear: bool, dtype: torch.dtype) -> int:
    layout = DenoiserLayout(config, quant_linear=quant_linear)
    return weight_bytes(layout.specs, dtype, keep_fp32=layout.keep_fp32)


@cache
def _vae_weights(config: VAEConfig, dtype: torch.dtype, parts: tuple[str, ...]) -> int:
    return weight_bytes({name: spec for name, spec in VAELayout(config).specs.items() if name.startswith(parts)}, dtype)


def choose_placement(
    model: ModelConfig,
    parameters: GenerationParameters,
    *,
    dtype: torch.dtype,
    quant_linear: bool,
    quant_text_encoder: bool = False,
    free: int,
    free_beside: int = 0,
) -> Placement:
    """Where a model's experts go: all on a GPU that holds them and the other stages, else each on one of two, else one.

    Args:
        free: bytes of the GPU that all stages are on.
        free_beside: bytes of another GPU, for the second expert alone.
    """

    def plan(placement: Placement) -> dict[str, StageMemory]:
        return plan_memory(
            model,
            parameters,
            dtype=dtype,
            quant_linear=quant_linear,
            quant_text_encoder=quant_text_encoder,
            placement=placement,
        )

    if total_bytes(plan("resident")) <= free:
        return "resident"
    spread = plan("spread")
    return "spread" if total_bytes(spread) <= free and spread["denoiser"].peak <= free_beside else "swapped"


def check_request(
    model: ModelConfig,
    parameters: GenerationParameters,
    needed: Callable[[GenerationParameters], int],
    *,
    free: int,
    what: str,
) -> None:
    """Refuses a request that cannot fit, naming the nearest that does.

    Args:
        needed: bytes that a request takes.
        free: bytes there are.
        what: the work, in words.

    Raises:
        ResourceExhausted: with both figures, and the settings that fit.
    """
    if needed(parameters) <= free:
        return
    size = f"{parameters.width}x{parameters.height}, {parameters.num_frames} frames"
    nearest = " or ".join(
        f"{candidate.num_frames} frames at {candidate.resolution}"
        for candidate in nearest_fitting(model, parameters, lambda candidate: needed(candidate) <= free)
    )
    raise ResourceExhausted(
        f"{what} {size} needs {needed(parameters) / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
        f"what fits: {nearest or 'nothing at this aspect ratio'}"
    )


def nearest_fitting(
    model: ModelConfig, parameters: GenerationParameters, fits: Callable[[GenerationParameters], bool]
) -> Iterator[GenerationParameters]:
    """The most frames that fit at the same size, and the largest resolution that fits with the same frames."""
    for num_frames in range(parameters.num_frames - 4, 0, -4):
        fewer = dataclasses.replace(parameters, num_frames=num_frames)
        if fits(fewer):
            yield fewer
            break
    smaller = []
    for resolution in model.resolutions:
        width, height = RESOLUTIONS[resolution][parameters.aspect_ratio]
        if parameters.adaptive_resolution:
            try:
                width, height = adaptive_size(width * height, parameters.width, parameters.height)
            except InvalidArgument:
                continue
        if width * height < parameters.width * parameters.height:
            smaller.append(dataclasses.replace(parameters, resolution=resolution, width=width, height=height))
    fitting = [candidate for candidate in smaller if fits(candidate)]
    if fitting:
        yield max(fitting, key=lambda candidate: (candidate.width * candidate.height, candidate.resolution))


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What to serve on a GPU of some size, and the requests that fit it."""

    model: str
    quant_linear: bool
    text_encoder_on_cpu: bool
    resolution: str
    num_steps: int

    @property
    def memory(self) -> int:
        """Bytes that all stages take together, in bfloat16."""
        model = find_model(self.model)
        stages = plan_memory(
            model,
            make_parameters(model, {"RESOLUTION": self.resolution}, seed=1),
            dtype=torch.bfloat16,
            quant_linear=self.quant_linear,
            text_encoder_on_cpu=self.text_encoder_on_cpu,
        )
        return total_bytes(stages)


def _configuration(model: str, resolution: str, num_steps: int, *, quant: bool, text_on_cpu: bool) -> Configuration:
    return Configuration(
        model=model, quant_linear=quant, text_encoder_on_cpu=text_on_cpu, resolution=resolution, num_steps=num_steps
    )


#: Best first.
CONFIGURATIONS = (
    _configuration("Wan2.1-14B", "720p", 4, quant=False, text_on_cpu=False),
    _configuration("Wan2.1-14B", "720p", 4, quant=True, text_on_cpu=False),
    _configuration("Wan2.1-14B", "720p", 4, quant=True, text_on_cpu=True),
    _configuration("Wan2.1-14B", "480p", 4, quant=True, text_on_cpu=True),
    _configuration("Wan2.1-1.3B", "480p", 4, quant=True, text_on_cpu=False),
    _configuration("Wan2.1-1.3B", "480p", 2, quant=True, text_on_cpu=True),
)


def choose_configuration(free: int) -> Configuration:
    """The best configuration that fits into `free` bytes of a GPU.

    Raises:
        ResourceExhausted: not even the smallest does.
    """
    for configuration in CONFIGURATIONS:
        if configuration.memory <= free:
            return configuration
    least = CONFIGURATIONS[-1]
    raise ResourceExhausted(
        f"{free / 2**30:.1f} GiB of GPU memory are free; {least.model} at {least.resolution} takes "
        f"{least.memory / 2**30:.1f} GiB"
    )
