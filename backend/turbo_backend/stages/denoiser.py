"""Text embeddings and a seed in, latents out: the rCM loop over groups of requests that can run as one batch."""

from __future__ import annotations

import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from turbo_backend.config import ModelConfig
from turbo_backend.errors import InvalidArgument, TurboError
from turbo_backend.manifest import device_name, merge_reports, versions
from turbo_backend.memory import as_turbo_error, decoder_bytes, denoiser_bytes, free_bytes, gpu_peak, release_workspace
from turbo_backend.nets.attention import AttentionSettings, TextContext
from turbo_backend.noise import draw_noise
from turbo_backend.parameters import MAX_SEED, GenerationParameters, make_parameters
from turbo_backend.planner import check_request
from turbo_backend.sampler import RCMSchedule, sample_steps
from turbo_backend.stages.experts import Experts
from turbo_kernels import attention_geometry

_log = logging.getLogger(__name__)

#: Longest side of a preview in latents; larger estimates are averaged down before they are decoded.
_PREVIEW_SIDE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseRequest:
    """One request as it arrived.

    Attributes:
        text_embeddings: float32 `[text_len, text_dim]`; rows past `text_length` are ignored.
        values: wire values by name (`SEED`, `NUM_STEPS`, ...), not yet checked.
        report: what earlier stages reported (`prompt`, `image`, `stages`).
        image_latents: float32 `[4 + 16, T, h, w]`, mask and latents of the image, for a model that takes one.
        preview: yield a preview with each step.
    """

    text_embeddings: torch.Tensor
    text_length: int
    values: Mapping[str, object]
    report: Mapping[str, object]
    image_latents: torch.Tensor | None = None
    preview: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisedStep:
    """Step `step` of `step_count` is done.

    Attributes:
        preview_latents: float32 `[16, 1, h', w']`, the denoised estimate's middle frame, or None.
        latents: float32 `[16, T, h, w]` after the last step, else None.
        report: with the last step.
    """

    step: int
    step_count: int
    preview_latents: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    report: dict[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admitted:
    """A request that passed every check."""

    index: int
    request: DenoiseRequest
    parameters: GenerationParameters

    experts: tuple[int, ...]

    @property
    def group(self) -> tuple[object, ...]:
        """What must match for two requests to run as one batch; seeds may differ, and sigma_max and boundary as long
        as the same expert runs each step."""
        p = self.parameters
        return (p.latent_shape, p.num_steps, p.attention_type, p.sla_topk, p.ode, self.experts)


#: One update of the request with that index; or None: the group's next step needs another expert than its last.
_Update: TypeAlias = "tuple[int, DenoisedStep | TurboError] | None"


class DenoiserStage:
    """Runs the rCM sampler for batches of unlike requests.

    With two experts, the high-noise one runs until a step begins below the request's boundary, and the low-noise one
    from there on. Where changing them costs something, all groups of a batch run their high-noise steps first.

    Args:
        experts: the denoiser networks.
        device: where they run.
        dtype: of their activations.
        model: the served model.
        provider: attention provider (`reference`, `triton`, `spargeattn`).
        max_batch_size: most requests that run as one batch.
        max_batch_tokens: most tokens that one batch may hold together; a longer request runs alone.
        fingerprint: of the weights, for the report.
        identity: other facts about this server that go into every report.
    """

    def __init__(
        self,
        experts: Experts,
        model: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        provider: str,
        max_batch_size: int,
        max_batch_tokens: int,
        fingerprint: str,
        identity: Mapping[str, object],
    ) -> None:
        self._experts = experts
        self._model = model
        self._provider = provider
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._fingerprint = fingerprint
        self._identity = dict(identity)
        self._device = device
        self._dtype = dtype
        self._last_of_pass = True

    def denoise(
        self, requests: Sequence[DenoiseRequest | TurboError]
    ) -> Iterator[tuple[int, DenoisedStep | TurboError]]:
        """Runs a batch; yields (index, update), for each request ending in latents or an error.

        An entry that is already an error is yielded as it is; one that fails never harms its neighbours.
        """
        groups: dict[tuple[object, ...], list[_Admitted]] = defaultdict(list)
        for index, request in enumerate(requests):
            try:
                admitted = self._admit(index, request)
            except Exception as error:
                yield index, as_turbo_error(error, "denoiser")
            else:
                groups[admitted.group].append(admitted)
        runs: list[Iterator[_Update]] = []
        for members in groups.values():
            fitting = self._max_batch_tokens // members[0].parameters.num_tokens
            at_once = min(max(1, fitting), self._max_batch_size)
            runs += [self._run_group(members[first : first + at_once]) for first in range(0, len(members), at_once)]
        while runs:  # one pass for each expert, or a single one where changing them is free
            waiting = []
            for run in runs:
                self._last_of_pass = run is runs[-1]
                for update in run:
                    if update is not None:
                        yield update
                    elif not self._experts.switch_is_free:
                        waiting.append(run)
                        break
            runs = waiting
        release_workspace()

    def _admit(self, index: int, request: DenoiseRequest | TurboError) -> _Admitted:
        if isinstance(request, TurboError):
            raise request
        parameters = make_parameters(
            self._model,
            request.values,
            seed=1 + secrets.randbelow(MAX_SEED),
            image_size=_image_size(request.report),
        )
        self._check_image(request.image_latents, parameters)
        embeddings, dit = request.text_embeddings, self._model.dit
        if embeddings.ndim != 2 or embeddings.shape[1] != dit.text_dim or embeddings.shape[0] > dit.text_len:
            fits = f"[tokens <= {dit.text_len}, {dit.text_dim}]"
            raise InvalidArgument("TEXT_EMBEDDINGS", list(embeddings.shape), f"of shape {fits}")
        if not 1 <= request.text_length <= embeddings.shape[0]:
            raise InvalidArgument("TEXT_LENGTH", request.text_length, f"1 to {embeddings.shape[0]}")
        if not torch.isfinite(embeddings[: request.text_length]).all():
            raise InvalidArgument("TEXT_EMBEDDINGS", "NaN or infinity", "finite")
        self._check_memory(parameters)
        schedule = RCMSchedule(parameters.num_steps, parameters.sigma_max)
        boundary = parameters.boundary if self._model.num_experts > 1 else 0.0
        experts = tuple(schedule.expert(step, boundary) for step in range(parameters.num_steps))
        return _Admitted(index=index, request=request, parameters=parameters, experts=experts)

    def _check_memory(self, parameters: GenerationParameters) -> None:
        model, device, dtype = self._model, self._device, self._dtype
        free = free_bytes(device)

        def denoising(candidate: GenerationParameters) -> int:
            return denoiser_bytes(model.dit, candidate, dtype, provider=self._provider, device=device)

        def decoding(candidate: GenerationParameters) -> int:
            return decoder_bytes(model.vae, candidate, dtype, device=device)

        check_request(model, parameters, denoising, free=free, what="denoising")
        check_request(model, parameters, decoding, free=free, what="decoding")

    def _check_image(self, image_latents: torch.Tensor | None, parameters: GenerationParameters) -> None:
        model = self._model
        if image_latents is None:
            if model.takes_image:
                raise InvalidArgument("IMAGE", None, f"given: {model.name} starts from an image ({model.ensemble})")
            return
        if not model.takes_image:
            raise InvalidArgument("IMAGE", "an image", f"left out: {model.name} makes videos from text alone")
        expected = (model.dit.in_channels - model.dit.out_channels, *parameters.latent_shape)
        if tuple(image_latents.shape) != expected:
            raise InvalidArgument("IMAGE_LATENTS", list(image_latents.shape), f"of shape {list(expected)}")
        if not torch.isfinite(image_latents).all():
            raise InvalidArgument("IMAGE_LATENTS", "NaN or infinity", "finite")

    def _run_group(self, members: Sequence[_Admitted]) -> Iterator[_Update]:
        try:
            yield from self._sample(members)
        except Exception as error:
            if len(members) == 1:
                yield members[0].index, as_turbo_error(error, "denoiser")
            else:  # what fails together may do alone
                _log.warning("%d requests failed as one batch, each now runs alone: %s", len(members), error)
                for member in members:
                    yield from self._run_group([member])

    @torch.inference_mode()
    def _sample(self, members: Sequence[_Admitted]) -> Iterator[_Update]:
        first, experts = members[0].parameters, members[0].experts
        attention = AttentionSettings(
            attention_type=first.attention_type, sla_topk=first.sla_topk, provider=self._provider
        )
        shape = (self._model.dit.out_channels, *first.latent_shape)

        def draw(step: int) -> torch.Tensor:
            noise = [draw_noise(member.parameters.seed, step, shape) for member in members]
            return torch.stack(noise).to(self._device)

        context: tuple[int, TextContext] | None = None

        def velocity(latents: torch.Tensor, timesteps: torch.Tensor, step: int) -> torch.Tensor:
            nonlocal context
            expert = experts[step]
            net = self._experts.select(expert)
            if context is None or context[0] != expert:
                context = None  # frees the other expert's first
                context = expert, net.prepare_context(text_embeddings, text_lengths)
            # After the last step the next request is expected, which begins with the first expert.
            upcoming = (*experts, 0)[step + 1]
            if upcoming != expert and self._last_of_pass:
                self._experts.switch_during_next_run(upcoming)
            inputs = [latents.to(self._dtype)] if image_latents is None else [latents.to(self._dtype), image_latents]
            estimate: torch.Tensor = net(torch.cat(inputs, dim=1), timesteps, context[1], attention=attention)
            return estimate

        if experts[0]:
            yield None
        started = stepped = time.perf_counter()
        text_embeddings = pad_sequence([member.request.text_embeddings for member in members], batch_first=True)
        text_embeddings = text_embeddings.to(self._device, self._dtype)
        text_lengths = [member.request.text_length for member in members]
        images = [member.request.image_latents for member in members if member.request.image_latents is not None]
        image_latents = torch.stack(images).to(self._device, self._dtype) if images else None
        schedules = [RCMSchedule(first.num_steps, member.parameters.sigma_max) for member in members]
        step_milliseconds: list[float] = []
        for step in sample_steps(velocity, draw, schedules, ode=first.ode):
            latents = step.latents.float().cpu() if step.is_last else None
            if self._device.type == "cuda" and not step.is_last:
                torch.cuda.synchronize(self._device)
            now = time.perf_counter()
            step_milliseconds.append(round((now - stepped) * 1000, 2))
            stepped = now
            for row, member in enumerate(members):
                if latents is not None and not torch.isfinite(latents[row]).all():
                    yield member.index, TurboError("denoiser gave latents that are not finite")
                    continue
                yield (
                    member.index,
                    DenoisedStep(
                        step=step.index + 1,
                        step_count=first.num_steps,
                        preview_latents=_shrink(step.denoised[row]) if member.request.preview else None,
                        latents=None if latents is None else latents[row],
                        report=self._report(member, len(members), (now - started) * 1000, step_milliseconds)
                        if step.is_last
                        else None,
                    ),
                )
            if not step.is_last and experts[step.index + 1] != experts[step.index]:
                yield None
                stepped = time.perf_counter()

    def _report(
        self, member: _Admitted, batch_size: int, milliseconds: float, step_milliseconds: Sequence[float]
    ) -> dict[str, object]:
        p = member.parameters
        left_out = {"seed", "width", "height"}
        if not self._model.takes_image:
            left_out |= {"boundary", "adaptive_resolution", "fit"}
        parameters = {key: value for key, value in p.to_dict().items() if key not in left_out}
        attention: dict[str, object] = {"type": p.attention_type, "provider": self._provider}
        if p.attention_type != "original":
            attention["block_q"], attention["block_k"] = attention_geometry(p.attention_type, self._device)
        stage: dict[str, object] = {
            "milliseconds": round(milliseconds, 2),
            "step_milliseconds": list(step_milliseconds),
            "batch_size": batch_size,
            **gpu_peak(),
        }
        notes: list[str] = []
        if self._model.num_experts > 1:
            stage |= {"experts": list(member.experts), "expert_placement": self._experts.placement}
            if 1 not in member.experts:
                notes.append(_never_reached(p))
        return merge_reports(
            member.request.report,
            self._identity,
            {
                "model": self._model.name,
                "seed": p.seed,
                "parameters": parameters,
                "attention": attention,
                "num_tokens": p.num_tokens,
                "device": device_name(self._device),
                "dtype": str(self._dtype).removeprefix("torch."),
                "versions": versions(),
                "weights": {"denoiser": self._fingerprint},
                "stages": {"denoiser": stage},
                "notes": notes,
            },
        )


def _never_reached(parameters: GenerationParameters) -> str:
    """Why the low-noise expert did not run, in words."""
    last = RCMSchedule(parameters.num_steps, parameters.sigma_max).times[-2]
    steps = f"{parameters.num_steps} step{'s' if parameters.num_steps > 1 else ''}"
    return f"the low-noise expert never ran: the last of {steps} is at t = {last:.3f}, boundary {parameters.boundary}"


def _image_size(report: Mapping[str, object]) -> tuple[int, int] | None:
    """(width, height) of the image that an earlier stage reported."""
    image = report.get("image")
    return (int(image["width"]), int(image["height"])) if isinstance(image, Mapping) else None


def _shrink(estimate: torch.Tensor) -> torch.Tensor:
    """The middle frame of `[C, T, h, w]`, averaged down to at most `_PREVIEW_SIDE` a side, float32 on the CPU."""
    frame = estimate[:, estimate.shape[1] // 2].float()
    factor = -(-max(frame.shape[1:]) // _PREVIEW_SIDE)
    if factor > 1:
        frame = F.avg_pool2d(frame[None], factor)[0]
    return frame[:, None].cpu()
