"""The tensors of denoising: the state of each request on the device, and one step of several requests at once.

What a step gives a request depends on its own state and step alone, so it does not matter with whom it shares the
forward, nor when. Within a step the device is never waited for: noise is drawn in threads while it works, and what the
host is to see is copied to page-locked memory behind the work.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from turbo_backend.memory import gpu_memory, release_workspace
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.recorded import RecordedForwards
from turbo_backend.nets.text_context import TextContext
from turbo_backend.noise import draw_channel
from turbo_backend.parameters import GenerationParameters
from turbo_backend.sampler import RCMSchedule, Step
from turbo_backend.settings import available_processors
from turbo_backend.stages.experts import Experts
from turbo_backend.stages.stopwatch import Stopwatch

#: Longest side of a preview in latents; larger estimates are averaged down before they are decoded.
_PREVIEW_SIDE = 32
#: Requests whose prompt stays prepared for an expert; that of others is prepared again at their next step.
_MAX_CONTEXTS = 16
#: Threads that draw noise, at most one for each channel. One alone takes 40 ms for a step at 480p, and for its first
#: noise a request waits.
_NUM_NOISE_THREADS = min(16, available_processors())


@dataclass(frozen=True, slots=True)
class DrawnNoise:
    """Noise that is being drawn, channel by channel; float32 `[16, T, h, w]`, page-locked where a GPU reads it."""

    noise: torch.Tensor
    channels: tuple[Future[None], ...]

    def get(self) -> torch.Tensor:
        """The noise, waited for."""
        for channel in self.channels:
            channel.result()
        return self.noise


@dataclass(slots=True, kw_only=True, eq=False)
class Sample:
    """One request as the sampler sees it.

    Attributes:
        parameters: what was asked for.
        text_embeddings: `[text_length, text_dim]`.
        image_latents: `[4 + 16, T, h, w]`, for a model that takes an image.
        step: finished steps, which is the index of the next one.
        state: float64 `[16, T, h, w]` after `step` steps; None before the first.
        preview: whether each step gives a preview.
        keep: whether each step gives its state.
    """

    parameters: GenerationParameters
    text_embeddings: torch.Tensor
    image_latents: torch.Tensor | None
    step: int = 0
    state: torch.Tensor | None = None
    preview: bool = False
    keep: bool = False
    schedule: RCMSchedule = field(init=False)
    noise: dict[int, DrawnNoise] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.schedule = RCMSchedule(self.parameters.num_steps, self.parameters.sigma_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStep:
    """What the host sees of a finished step; on the CPU in page-locked memory where there is a GPU.

    Attributes:
        preview_latents: float32 `[16, 1, h', w']`, the denoised estimate's middle frame, if asked for.
        state: float64 `[16, T, h, w]`, if asked for.
        latents: float32 `[16, T, h, w]` after the last step.
    """

    preview_latents: torch.Tensor | None = None
    state: torch.Tensor | None = None
    latents: torch.Tensor | None = None


class Sampling:
    """Runs steps of samples on one device. One thread runs steps; `draw_ahead` may be called from any.

    Args:
        experts: the denoiser networks.
        num_channels: of the latents.
        device: where they run.
        dtype: of their activations.
        provider: attention provider.
        room: bytes of GPU memory that shall be free for others between requests.
        records: whether forwards of one sample are recorded where they can be.
    """

    def __init__(
        self,
        experts: Experts,
        num_channels: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        provider: str,
        room: int = 0,
        records: bool = False,
    ) -> None:
        self._experts = experts
        self._num_channels = num_channels
        self._device = device
        self._dtype = dtype
        self._provider = provider
        self._room = room
        may_record = records and device.type == "cuda" and provider == "triton"
        self._recorded = {
            net: RecordedForwards(net, room=room)
            for net in experts.networks
            if may_record and net.device == device and net.after_block is None
        }
        self._contexts: OrderedDict[Sample, tuple[int, TextContext]] = OrderedDict()
        self._noise_threads = ThreadPoolExecutor(_NUM_NOISE_THREADS, thread_name_prefix="noise")

    def draw_ahead(self, sample: Sample, step: int) -> None:
        """Has the noise drawn that `step` of the sample will need."""
        needed = [0] if step == 0 else []
        if step < sample.parameters.num_steps and sample.schedule.mixes_noise(step, ode=sample.parameters.ode):
            needed.append(step + 1)
        for index in needed:
            if index not in sample.noise:
                sample.noise[index] = self._draw(sample, index)

    @torch.inference_mode()
    def run(
        self, samples: Sequence[Sample], expert: int, *, upcoming: Sequence[Sample], next_expert: int
    ) -> tuple[list[HostStep], float]:
        """One step of each of `samples`, which share shape, attention and expert; returns when it is done.

        Returns them, and the milliseconds that the network took of the device. A step that fails leaves the samples as
        they were.

        Args:
            upcoming: who will probably take the next step, with `next_expert`: what those need is got ready meanwhile.
        """
        for sample in samples:
            self.draw_ahead(sample, sample.step)
        for sample in upcoming:
            self.draw_ahead(sample, sample.step + (sample in samples))
        net = self._experts.select(expert)
        context = TextContext.cat([self._prepare_context(sample, net, expert) for sample in samples])
        states = [self._prepare_state(sample) for sample in samples]
        inputs = torch.stack(states).to(self._dtype)
        images = [self._prepare_image(sample) for sample in samples if sample.image_latents is not None]
        if images:
            inputs = torch.cat([inputs, torch.stack(images)], dim=1)
        timesteps = [sample.schedule.network_timesteps[sample.step] for sample in samples]
        first = samples[0].parameters
        attention = AttentionSettings(
            attention_type=first.attention_type, sla_topk=first.sla_topk, provider=self._provider
        )
        if next_expert != expert:
            self._experts.switch_during_next_run(next_expert)
        forward = Stopwatch(self._device)
        evaluate = self._recorded.get(net, net) if len(samples) == 1 else net
        velocities = evaluate(inputs, torch.tensor(timesteps, dtype=torch.float64), context, attention=attention)
        forward.stop()
        steps = [
            self._take_step(sample, state, velocity)
            for sample, state, velocity in zip(samples, states, velocities, strict=True)
        ]
        seen = [self._show(sample, step) for sample, step in zip(samples, steps, strict=True)]
        if self._device.type == "cuda":
            # The next step is chosen when this one is done, among those that are there by then.
            torch.cuda.current_stream(self._device).synchronize()
        for sample, step in zip(samples, steps, strict=True):
            sample.state = step.latents
            sample.step = step.index + 1
            for index in [index for index in sample.noise if index <= sample.step]:
                del sample.noise[index]
        return seen, forward.milliseconds()

    def forget(self, sample: Sample) -> None:
        """Frees what is prepared for a sample that takes no more steps."""
        self._contexts.pop(sample, None)

    def release_workspace(self) -> None:
        """Gives back what steps have used besides weights, where others have not the room they need."""
        if self._device.type == "cuda" and gpu_memory(self._device)[0] < self._room:
            for recorded in self._recorded.values():
                recorded.clear()
        release_workspace(self._device, room=self._room)

    def close(self) -> None:
        """Ends the threads that draw noise."""
        self._noise_threads.shutdown(cancel_futures=True)

    def _draw(self, sample: Sample, index: int) -> DrawnNoise:
        shape = (self._num_channels, *sample.parameters.latent_shape)
        noise = torch.empty(shape, pin_memory=self._device.type == "cuda")
        seed, draw = sample.parameters.seed, self._noise_threads.submit
        return DrawnNoise(noise, tuple(draw(draw_channel, noise, seed, index, i) for i in range(self._num_channels)))

    def _noise_on_device(self, sample: Sample, index: int) -> torch.Tensor:
        return sample.noise[index].get().to(self._device, non_blocking=True)

    def _prepare_context(self, sample: Sample, net: WanDiT, expert: int) -> TextContext:
        """The prompt as all layers of the expert read it, made once where memory allows."""
        known = self._contexts.pop(sample, None)
        if known is not None and known[0] == expert:
            context = known[1]
        else:
            known = None  # frees the other expert's first
            embeddings = sample.text_embeddings[None].to(self._device, self._dtype)
            context = net.prepare_context(embeddings, [sample.text_embeddings.shape[0]])
        self._contexts[sample] = expert, context
        if len(self._contexts) > _MAX_CONTEXTS:
            self._contexts.popitem(last=False)
        return context

    def _prepare_state(self, sample: Sample) -> torch.Tensor:
        if sample.state is None:
            return sample.schedule.start(self._noise_on_device(sample, 0))
        return sample.state.to(self._device)

    def _prepare_image(self, sample: Sample) -> torch.Tensor:
        assert sample.image_latents is not None
        sample.image_latents = sample.image_latents.to(self._device, self._dtype)
        return sample.image_latents

    def _take_step(self, sample: Sample, state: torch.Tensor, velocity: torch.Tensor) -> Step:
        ode = sample.parameters.ode
        mixed = sample.schedule.mixes_noise(sample.step, ode=ode)
        noise = self._noise_on_device(sample, sample.step + 1) if mixed else None
        return sample.schedule.take_step(sample.step, state, velocity, noise, ode=ode)

    def _show(self, sample: Sample, step: Step) -> HostStep:
        return HostStep(
            preview_latents=_to_host(shrink(step.denoised)) if sample.preview else None,
            state=_to_host(step.latents) if sample.keep else None,
            latents=_to_host(step.latents.float()) if step.is_last else None,
        )


def preview_factor(height: int, width: int) -> int:
    """How many latents a side become one of a preview."""
    return -(-max(height, width) // _PREVIEW_SIDE)


def use_device(device: torch.device) -> None:
    """Makes a GPU that of the calling thread, which PyTorch does not inherit from the one that started it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def shrink(estimate: torch.Tensor) -> torch.Tensor:
    """The middle frame of `[C, T, h, w]`, averaged down to at most `_PREVIEW_SIDE` a side, float32 `[C, 1, h', w']`."""
    frame = estimate[:, estimate.shape[1] // 2].float()
    factor = preview_factor(*frame.shape[1:])
    if factor > 1:
        frame = F.avg_pool2d(frame[None], factor)[0]
    return frame[:, None]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is complete once the device has come so far; on the CPU the tensor itself."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
