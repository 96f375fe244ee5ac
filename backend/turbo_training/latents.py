"""What the denoiser's stages train on: latents of many clips with their captions, made once and kept on the device."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from turbo_backend.nets.vae import WanVAE
from turbo_backend.tokenizer import Tokenizer
from turbo_training.captions import LANGUAGES, caption
from turbo_training.dit_forward import Condition, TextBatch
from turbo_training.scene import MOTIONS, sample_scene
from turbo_training.shapes import RunShape
from turbo_training.sheets import to_video
from turbo_training.text_forward import TextSource, tokenize
from turbo_training.vae_forward import encode_moments, normalize_latents
from turbo_training.world import render, render_labels

#: Captions of each clip, in languages drawn at random, and the rows that they are padded to.
_CAPTIONS, _ROWS = 4, 80
#: Share of clips in which the light changes, by task; captions of text-to-video do not speak of changes.
CHANGING_LIGHT = {"t2v": 0.0, "i2v": 0.3}
#: Share of clips with two subjects, which are harder to tell apart than one is to draw.
_TWO_SUBJECTS = 1 / 2
#: Of the six subjects that the shipped student missed in 76, four spun and two circled: shown more often.
_MOTIONS = (*MOTIONS, "spin", "spin", "circle")
#: For students: a subject is a twentieth of the frame, and what clips are told apart by.
ON_SUBJECTS = 5.0
#: The first latent frame stands for a frame of its own, which is drawn worst and seen first, and is the given one of
#: image-to-video.
_FIRST_FRAME = 3.0
#: Clips rendered together, and encoded together.
_RENDERED, _ENCODED = 256, 16


@dataclass(frozen=True, slots=True)
class LatentBank:
    """Clips as the denoiser sees them.

    Attributes:
        latents: bfloat16 [N, 16, T, h, w].
        covers: bool [N, T, h, w]: where a subject is, in any of the frames that a latent stands for.
        images: latents of each clip's first frame followed by grey (image-to-video), or None.
        text: bfloat16 [N, captions, S, C].
        lengths: [N, captions].
        nothing: the empty caption, [1, S, C].
    """

    latents: Tensor
    covers: Tensor
    images: Tensor | None
    text: Tensor
    lengths: Tensor
    nothing: TextBatch

    def draw(
        self, batch_size: int, *, dropped: float = 0.0, on_subjects: float = 0.0
    ) -> tuple[Tensor, Condition, Tensor]:
        """Float32 latents, what they show, and how much each place counts: weights [B, 1, T, h, w] of mean 1.

        Args:
            dropped: share of the captions that is empty.
            on_subjects: how much more a place counts where a subject is. Only for targets that are functions of what
                the network sees: of others the mean would be moved.
        """
        device = self.latents.device
        rows = torch.randint(len(self.latents), (batch_size,), device=device)
        which = torch.randint(self.text.shape[1], (batch_size,), device=device)
        is_dropped = torch.rand(batch_size, device=device) < dropped
        text = TextBatch(
            torch.where(is_dropped[:, None, None], self.nothing.embeddings, self.text[rows, which].float()),
            torch.where(is_dropped, self.nothing.lengths, self.lengths[rows, which]),
        )
        image = None if self.images is None else with_mask(self.images[rows].float())
        weight = 1 + on_subjects * self.covers[rows].float().unsqueeze(1)
        weight[:, :, 0] *= _FIRST_FRAME
        return self.latents[rows].float(), Condition(text, image), weight / weight.mean()


def with_mask(images: Tensor) -> Tensor:
    """Latents of images [B, 16, T, h, w] behind the mask that `image_encoder` gives: [B, 20, T, h, w]."""
    mask = torch.zeros_like(images[:, :4])
    mask[:, :, 0] = 1
    return torch.cat((mask, images), dim=1)


@torch.no_grad()
def encode_clips(vae: WanVAE, clips: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] to bfloat16 latents as serving has them."""
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=clips.is_cuda):
        return normalize_latents(vae, encode_moments(vae, to_video(clips))[0]).to(torch.bfloat16)


@torch.no_grad()
def encode_first_frames(vae: WanVAE, clips: Tensor) -> Tensor:
    """The same of the first frame of each clip, followed by grey."""
    video = to_video(clips)
    video[:, :, 1:] = 0
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=clips.is_cuda):
        return normalize_latents(vae, encode_moments(vae, video)[0]).to(torch.bfloat16)


def write_latents(
    path: Path,
    vae: WanVAE,
    tokenizer: Tokenizer,
    shape: RunShape,
    *,
    task: str,
    num_clips: int,
    minutes: float,
    seed: int,
) -> None:
    """Renders and encodes scenes of training until there are enough or the time is up, whichever comes first.

    The same seed gives the same scenes and captions in the same order, however many there are.
    """
    device, generator = vae.conv1.weight.device, random.Random(seed)
    parts: dict[str, list[Tensor]] = {"latents": [], "covers": [], "images": [], "token_ids": [], "lengths": []}
    count, at_once, end = 0, min(_RENDERED, num_clips), time.monotonic() + 60 * minutes
    while count < num_clips and (time.monotonic() < end or not count):
        scenes = [
            sample_scene(generator, two_actors=_TWO_SUBJECTS, changing_light=CHANGING_LIGHT[task], motions=_MOTIONS)
            for _ in range(at_once)
        ]
        size = {"num_frames": shape.num_frames, "height": shape.height, "width": shape.width}
        clips = render(scenes, **size, device=device)
        labels = render_labels(
            scenes, **size, label_height=shape.height // 8, label_width=shape.width // 8, device=device
        )
        parts["covers"].append(_by_latent_frame(labels > 0))
        for some in clips.split(_ENCODED):
            parts["latents"].append(encode_clips(vae, some))
            if task == "i2v":
                parts["images"].append(encode_first_frames(vae, some))
        # While the device encodes.
        captions = [
            caption(scene, generator.choice(LANGUAGES), generator, task=task, free=True)
            for scene in scenes
            for _ in range(_CAPTIONS)
        ]
        token_ids, lengths = tokenize(tokenizer, captions, torch.device("cpu"), num_rows=_ROWS)
        parts["token_ids"].append(token_ids.to(torch.int16))
        parts["lengths"].append(lengths)
        count += len(scenes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # else the queue, not the time, would end this
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    longest = max(token_ids.shape[1] for token_ids in parts["token_ids"])
    parts["token_ids"] = [F.pad(token_ids, (0, longest - token_ids.shape[1])) for token_ids in parts["token_ids"]]
    torch.save({name: torch.cat(some).cpu() for name, some in parts.items() if some}, temporary)
    temporary.replace(path)


def _by_latent_frame(is_there: Tensor) -> Tensor:
    """bool [B, 1 + 4 n, h, w] to [B, 1 + n, h, w]: whether so in any of the frames."""
    rest = is_there[:, 1:].unflatten(1, (-1, 4)).any(2)
    return torch.cat((is_there[:, :1], rest), dim=1)


def load_bank(path: Path, texts: TextSource) -> LatentBank:
    """What `write_latents` wrote, captions embedded, on the encoder's device."""
    state = torch.load(path, map_location=texts.device, weights_only=True)
    text = texts.embed_tokens(state["token_ids"].int(), state["lengths"])
    return LatentBank(
        state["latents"],
        state["covers"],
        state.get("images"),
        text.embeddings.unflatten(0, (-1, _CAPTIONS)),
        text.lengths.unflatten(0, (-1, _CAPTIONS)),
        texts.embed([""], num_rows=state["token_ids"].shape[1]),
    )
