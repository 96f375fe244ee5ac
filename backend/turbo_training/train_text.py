"""The text encoder: its rows must tell, through one layer of attention, what a caption says.

A probe asks the rows: one query for the scene (surroundings, light at both ends, camera, the motion where there is one
subject) and one each for the first and the second subject (absent, or its kind, its color and its motion): the first is
on the left, so that is what the denoiser must find. Its cross-attention reads the same rows in the same way. Only what
a caption says is asked: the camera where it is not mentioned is learned as a guess, which does no harm.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo_backend.config import TextEncoderConfig
from turbo_backend.nets.umt5 import UMT5Encoder, relative_buckets
from turbo_backend.tokenizer import Tokenizer
from turbo_training.captions import LANGUAGES, caption
from turbo_training.dit_forward import TextBatch
from turbo_training.scene import CAMERAS, COLORS, LIGHTS, MOTIONS, SUBJECTS, SURROUNDINGS, Scene, sample_scene
from turbo_training.shapes import RunShape
from turbo_training.text_forward import encode_text, tokenize
from turbo_training.trainer import EMA, Stage

_SCENE_SIZES = (len(SURROUNDINGS), len(LIGHTS), len(LIGHTS), len(CAMERAS), len(MOTIONS))
#: 0 says that there is no second subject.
_SUBJECT_SIZES = (1 + len(SUBJECTS), 1 + len(COLORS), 1 + len(MOTIONS))
_PLACES = 2
#: Share of captions with two subjects: what belongs to which is the hardest that a caption says.
_TWO_SUBJECTS = 1 / 2
#: Share of image-to-video captions, which leave out what the image shows.
_I2V = 0.25
_IGNORED = -100
#: How fast each head's initial biases fall with the distance in tokens, and the side it looks to (1: what follows).
_HEADS = ((0.3, 0), (0.6, 0), (0.3, -1), (0.6, 1))
_OTHER_SIDE, _LEAST_BIAS = 4.0, -12.0
#: Batches that captions are drawn for before the first step, since words take a CPU longer than the step takes a GPU.
_BATCHES = 64


class Probe(nn.Module):
    """Learned queries attend to the rows of a text; linear heads read the answers."""

    def __init__(self, text_dim: int, dim: int = 128, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.randn(1 + _PLACES, dim))
        self.keys, self.values = nn.Linear(text_dim, dim), nn.Linear(text_dim, dim)
        self.out = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.LayerNorm(2 * dim))
        self.scene_head = nn.Linear(2 * dim, sum(_SCENE_SIZES))
        self.subject_head = nn.Linear(2 * dim, sum(_SUBJECT_SIZES))

    def forward(self, text: TextBatch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits of the scene's attributes [B, n], and of each subject's kind, color and motion [B, 2, n]."""
        is_text = torch.arange(text.embeddings.shape[1], device=text.lengths.device) < text.lengths[:, None]
        bias = torch.where(is_text, 0.0, -torch.inf)[:, None, None]
        batch_size = len(text.lengths)
        k, v = (
            part(text.embeddings).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.keys, self.values)
        )
        q = self.queries.to(k.dtype).unflatten(-1, (self.num_heads, -1)).transpose(0, 1).expand(batch_size, -1, -1, -1)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(-1, -1, q.shape[2], -1))
        answers = self.out(read.transpose(1, 2).flatten(2))
        scene = self.scene_head(answers[:, 0]).float().split(_SCENE_SIZES, dim=-1)
        subjects = self.subject_head(answers[:, 1:]).float().split(_SUBJECT_SIZES, dim=-1)
        return scene, subjects


def answers_of(scenes: list[Scene], is_i2v: list[bool], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right answers: scene [B, 5] and subjects [B, 2, 3]; -100 where a caption does not say.

    Args:
        is_i2v: captions that may say "the subject" alone.
    """
    scene_rows, subject_rows = [], []
    for scene, hidden in zip(scenes, is_i2v, strict=True):
        end = LIGHTS.index(scene.light_end)
        unknown = hidden and scene.light_end == scene.light
        scene_rows.append(
            [
                _IGNORED if hidden else SURROUNDINGS.index(scene.surroundings),
                _IGNORED if hidden else LIGHTS.index(scene.light),
                _IGNORED if unknown else end,
                CAMERAS.index(scene.camera),
                MOTIONS.index(scene.actors[0].motion) if len(scene.actors) == 1 else _IGNORED,
            ]
        )
        if hidden:
            subject_rows.append([[_IGNORED] * len(_SUBJECT_SIZES)] * _PLACES)
            continue
        said = [
            [1 + SUBJECTS.index(actor.subject), 1 + COLORS.index(actor.color), 1 + MOTIONS.index(actor.motion)]
            for actor in scene.actors
        ]
        subject_rows.append(said + [[0] * len(_SUBJECT_SIZES)] * (_PLACES - len(said)))
    return torch.tensor(scene_rows, device=device), torch.tensor(subject_rows, device=device)


class TextStage(Stage):
    """Trains `encoder` together with a probe that is thrown away."""

    name = "text"

    def __init__(self, shape: RunShape, tokenizer: Tokenizer, *, seed: int, device: torch.device) -> None:
        super().__init__(seed=seed, device=device)
        self.shape = shape
        self.encoder = UMT5Encoder(shape.model.text_encoder).to(device)
        initialize_encoder(self.encoder)
        self.average = UMT5Encoder(shape.model.text_encoder).to(device)
        self.probe = Probe(shape.model.text_encoder.dim).to(device)
        self.modules = {"encoder": self.encoder, "ema": self.average, "probe": self.probe}
        self._trained = [*self.encoder.parameters(), *self.probe.parameters()]
        self.optimizer = self.make_optimizer(self._trained, betas=(0.9, 0.98), weight_decay=0.01)
        self.optimizers = {"text": self.optimizer}
        self._ema = EMA(self.encoder, self.average, decay=0.995)
        scenes, hidden, captions = draw_captions(_BATCHES * shape.text.batch_size, self.generator)
        self._token_ids, self._lengths = tokenize(tokenizer, captions, device)
        self._scene_answers, self._subject_answers = answers_of(scenes, hidden, device)

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        self.set_learning_rates(self.shape.text.learning_rate, index, progress, warmup=100)
        rows = torch.randint(len(self._lengths), (self.shape.text.batch_size,), device=self.device)
        with self.precision():
            text = encode_text(self.encoder, self._token_ids[rows], self._lengths[rows])
            scene_logits, subject_logits = self.probe(text)
        scene_answers, subject_answers = self._scene_answers[rows], self._subject_answers[rows]
        losses = [_cross_entropy(logits, scene_answers[:, i]) for i, logits in enumerate(scene_logits)]
        losses += [
            _cross_entropy(logits.flatten(0, 1), subject_answers[..., i].flatten())
            for i, logits in enumerate(subject_logits)
        ]
        loss = torch.stack(losses).sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self.optimizer.step()
        self._ema.update(index)
        found = torch.stack([logits.argmax(-1) for logits in subject_logits], dim=-1)
        is_asked = subject_answers != _IGNORED
        wrong = ((found != subject_answers) & is_asked).flatten(1).any(1).sum() / is_asked[:, 0, 0].sum().clamp_min(1)
        return {"loss": loss, "wrong": wrong}


def _cross_entropy(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean over the answers that there are; 0 without any."""
    total = F.cross_entropy(logits, answers, ignore_index=_IGNORED, reduction="sum")
    return total / (answers != _IGNORED).sum().clamp_min(1)


def draw_captions(batch_size: int, generator: random.Random) -> tuple[list[Scene], list[bool], list[str]]:
    """Scenes of training with a caption each, in all languages, and which of the captions are image-to-video ones."""
    scenes, hidden, captions = [], [], []
    for _ in range(batch_size):
        is_i2v = generator.random() < _I2V
        scene = sample_scene(generator, two_actors=_TWO_SUBJECTS, changing_light=0.5 if is_i2v else 0.0)
        scenes.append(scene)
        hidden.append(is_i2v)
        task = "i2v" if is_i2v else "t2v"
        captions.append(caption(scene, generator.choice(LANGUAGES), generator, task=task, free=True))
    return scenes, hidden, captions


@torch.no_grad()
def initialize_encoder(encoder: UMT5Encoder) -> None:
    """T5's initial weights: attention is not scaled, so queries start smaller by sqrt(head width).

    But heads begin with a look at what is near, as ALiBi's do (Press et al., "Train short, test long"), some of them to
    one side: a color and a motion belong to the noun beside them. Without it an encoder of this size learns which
    attributes a caption names, and of two subjects not what belongs to which.
    """
    config = encoder.config
    head_dim = config.dim_attn // config.num_heads
    nn.init.normal_(encoder.token_embedding.weight, std=1.0)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("attn.q.weight",)):
            nn.init.normal_(parameter, std=(config.dim * head_dim) ** -0.5)
        elif name.endswith(("weight",)) and parameter.dim() == 2 and "embedding" not in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif "pos_embedding" in name:
            nn.init.normal_(parameter, std=0.1)
            parameter.add_(_local_biases(config).to(parameter.device))


def _local_biases(config: TextEncoderConfig) -> Tensor:
    """Biases [buckets, heads] that fall with the distance, by the bucket's mean."""
    reach = config.max_distance
    buckets = relative_buckets(reach, num_buckets=config.num_buckets, max_distance=reach)
    offsets = torch.arange(1 - reach, reach, dtype=torch.float32)
    members = F.one_hot(buckets, config.num_buckets).float()
    mean = (offsets @ members) / members.sum(0).clamp_min(1)  # of each bucket, negative before the query
    columns = []
    for head in range(config.num_heads):
        slope, side = _HEADS[head % len(_HEADS)]
        columns.append(-slope * mean.abs() - _OTHER_SIDE * (mean * side < 0))
    return torch.stack(columns, dim=1).clamp_min(_LEAST_BIAS)
