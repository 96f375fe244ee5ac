"""What is checked of a request before it may wait for the denoiser."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import torch

from turbo_backend.config import ModelConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.memory import decoder_bytes, denoiser_bytes
from turbo_backend.parameters import MAX_SEED, GenerationParameters, check_image_given, make_parameters
from turbo_backend.planner import check_request
from turbo_backend.sampler import RCMSchedule
from turbo_backend.stages.denoiser_request import DenoiseRequest


class Admission:
    """Checks requests of one model; any thread may use it.

    Args:
        model: the served model.
        device: where the networks run.
        dtype: of their activations.
        provider: attention provider.
    """

    def __init__(self, model: ModelConfig, *, device: torch.device, dtype: torch.dtype, provider: str) -> None:
        self._model = model
        self._device = device
        self._dtype = dtype
        self._provider = provider

    def check(self, request: DenoiseRequest, *, free: int) -> GenerationParameters:
        """The parameters of a request that passes.

        Args:
            free: bytes of memory that are free between two steps.

        Raises:
            InvalidArgument: naming field, value and what fits.
            ResourceExhausted: it needs more memory than there is, naming the nearest request that fits.
        """
        parameters = make_parameters(
            self._model,
            request.values,
            seed=1 + secrets.randbelow(MAX_SEED),
            image_size=_image_size(request.report),
        )
        self._check_text(request)
        self._check_image(request.image_latents, parameters)
        self._check_durable(request)
        self._check_memory(parameters, free)
        if request.reached is not None:
            self.check_reached(request.reached, parameters)
        return parameters

    def check_reached(self, reached: tuple[int, torch.Tensor], parameters: GenerationParameters) -> None:
        """Checks what an earlier run is said to have reached.

        Raises:
            InvalidArgument: it cannot be of a request with these parameters.
        """
        step, state = reached
        if not 1 <= step <= parameters.num_steps:
            raise InvalidArgument("finished steps", step, f"1 to {parameters.num_steps}")
        expected = (self._model.dit.out_channels, *parameters.latent_shape)
        if tuple(state.shape) != expected or state.dtype != torch.float64:
            found = f"{state.dtype} {list(state.shape)}"
            raise InvalidArgument("state after a step", found, f"torch.float64 {list(expected)}")
        if not torch.isfinite(state).all():
            raise InvalidArgument("state after a step", "NaN or infinity", "finite")

    def experts(self, parameters: GenerationParameters) -> tuple[int, ...]:
        """Which expert runs each step."""
        schedule = RCMSchedule(parameters.num_steps, parameters.sigma_max)
        boundary = parameters.boundary if self._model.num_experts > 1 else 0.0
        return tuple(schedule.expert(step, boundary) for step in range(parameters.num_steps))

    def _check_text(self, request: DenoiseRequest) -> None:
        embeddings, dit = request.text_embeddings, self._model.dit
        if embeddings.ndim != 2 or embeddings.shape[1] != dit.text_dim or embeddings.shape[0] > dit.text_len:
            fits = f"[tokens <= {dit.text_len}, {dit.text_dim}]"
            raise InvalidArgument("TEXT_EMBEDDINGS", list(embeddings.shape), f"of shape {fits}")
        if not 1 <= request.text_length <= embeddings.shape[0]:
            raise InvalidArgument("TEXT_LENGTH", request.text_length, f"1 to {embeddings.shape[0]}")
        if not torch.isfinite(embeddings[: request.text_length]).all():
            raise InvalidArgument("TEXT_EMBEDDINGS", "NaN or infinity", "finite")

    def _check_image(self, image_latents: torch.Tensor | None, parameters: GenerationParameters) -> None:
        model = self._model
        check_image_given(model, given=image_latents is not None)
        if image_latents is None:
            return
        expected = (model.dit.in_channels - model.dit.out_channels, *parameters.latent_shape)
        if tuple(image_latents.shape) != expected:
            raise InvalidArgument("IMAGE_LATENTS", list(image_latents.shape), f"of shape {list(expected)}")
        if not torch.isfinite(image_latents).all():
            raise InvalidArgument("IMAGE_LATENTS", "NaN or infinity", "finite")

    def _check_durable(self, request: DenoiseRequest) -> None:
        """Another run of a durable request must be found by its id, and must draw the same noise."""
        if request.scheduling.durable:
            if not request.request_id:
                raise InvalidArgument("request id", "", "given with durable")
            if not request.values.get("SEED"):
                raise InvalidArgument("SEED", request.values.get("SEED", 0), "over 0 with durable")

    def _check_memory(self, parameters: GenerationParameters, free: int) -> None:
        model, device, dtype = self._model, self._device, self._dtype

        def denoising(candidate: GenerationParameters) -> int:
            return denoiser_bytes(model.dit, candidate, dtype, provider=self._provider, device=device)

        def decoding(candidate: GenerationParameters) -> int:
            return decoder_bytes(model.vae, candidate, dtype, device=device)

        check_request(model, parameters, denoising, free=free, what="denoising")
        check_request(model, parameters, decoding, free=free, what="decoding")


def _image_size(report: Mapping[str, object]) -> tuple[int, int] | None:
    """(width, height) of the image that an earlier stage reported."""
    image = report.get("image")
    return (int(image["width"]), int(image["height"])) if isinstance(image, Mapping) else None
