"""The diffusion of training: batches with their text, times, velocities, guidance, and the teacher's sampler.

    x_t = (1 - t) x_0 + t eps,   v = eps - x_0,   x_0 = x_t - t v

Source: rectified flow as Wan2.1 uses it; guidance after Ho and Salimans, "Classifier-free diffusion guidance".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.tokenizer import Tokenizer
from turbo_training.captions import LANGUAGES, caption
from turbo_training.dit_forward import DENSE, TextBatch, TrainingAttention, velocity
from turbo_training.latents import LatentBank
from turbo_training.scene import Scene
from turbo_training.text_forward import encode_text, tokenize

#: How far the guided velocity goes beyond the unguided one; the student learns the guided one.
GUIDANCE = 3.5
#: Larger values spend more of training, and of the teacher's steps, at high noise.
TIME_SHIFT = 3.0
_TIMES_TO_NETWORK = 1000.0

#: (x_t, t [B], text) -> v
VelocityFn = Callable[[Tensor, Tensor, TextBatch], Tensor]


class TextSource:
    """Captions and the frozen encoder that embeds them."""

    def __init__(self, encoder: UMT5Encoder, tokenizer: Tokenizer, device: torch.device) -> None:
        self.encoder, self.tokenizer, self.device = encoder, tokenizer, device

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> TextBatch:
        """Embeds captions; the empty caption stands for no condition."""
        token_ids, lengths = tokenize(self.tokenizer, captions, self.device)
        text = encode_text(self.encoder, token_ids, lengths)
        return TextBatch(text.embeddings.float(), text.lengths)

    def describe(self, scenes: Sequence[Scene], generator: random.Random, *, dropped: float = 0.0) -> TextBatch:
        """Embeds a fresh caption a scene, in any language; a share `dropped` of them is empty."""
        return self.embed(
            [
                "" if generator.random() < dropped else caption(scene, generator.choice(LANGUAGES), generator)
                for scene in scenes
            ]
        )

    def nothing(self, batch_size: int) -> TextBatch:
        """The empty caption for each of a batch."""
        text = self.embed([""])
        return TextBatch(text.embeddings.expand(batch_size, -1, -1), text.lengths.expand(batch_size))


class Batches:
    """Draws latents with their text."""

    def __init__(self, bank: LatentBank, texts: TextSource) -> None:
        self._bank, self.texts = bank, texts

    def draw(self, batch_size: int, generator: random.Random, *, dropped: float = 0.0) -> tuple[Tensor, TextBatch]:
        scenes, latents = self._bank.draw(batch_size, generator)
        return latents, self.texts.describe(scenes, generator, dropped=dropped)


def draw_times(batch_size: int, device: torch.device, *, shift: float = TIME_SHIFT) -> Tensor:
    """Logit-normal times, shifted: s t / (1 + (s - 1) t); [B] in (0, 1)."""
    t = torch.sigmoid(torch.randn(batch_size, device=device))
    return shift * t / (1 + (shift - 1) * t)


def expand(t_B: Tensor) -> Tensor:
    """[B] to [B, 1, 1, 1, 1]."""
    return t_B.view(-1, 1, 1, 1, 1)


def velocity_of(net: WanDiT, attention: TrainingAttention = DENSE) -> VelocityFn:
    """The network as a function of time in [0, 1]."""
    return lambda x, t, text: velocity(net, x, _TIMES_TO_NETWORK * t, text, attention=attention)


def guided(function: VelocityFn, x: Tensor, t: Tensor, text: TextBatch, nothing: TextBatch) -> Tensor:
    """v(nothing) + g (v(text) - v(nothing))."""
    with_text, without = function(x, t, text), function(x, t, nothing)
    return without + GUIDANCE * (with_text - without)


@torch.no_grad()
def sample_teacher(
    function: VelocityFn, noise: Tensor, text: TextBatch, nothing: TextBatch, *, num_steps: int = 50
) -> Tensor:
    """Euler's method from t = 1 to 0 with guidance, times shifted as in training; returns latents."""
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    times = TIME_SHIFT * times / (1 + (TIME_SHIFT - 1) * times)
    x = noise.double()
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        # The network never saw t = 1 itself.
        t_B = torch.full((len(noise),), min(t, 0.999), device=noise.device)
        v = guided(function, x.float(), t_B, text, nothing)
        x = x + (t_next - t) * v.double()
    return x.float()
