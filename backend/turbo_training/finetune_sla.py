"""Sparse fine-tuning: block-sparse attention with the linear branch, `proj_l` learned from zero.

The dense teacher becomes the sparse student: it sees the same noisy latents as in flow matching and learns half from
the data, half from the dense teacher's velocity, which has less variance. Share and geometry of the blocks are drawn at
each step from those that servers run, so that one set of weights serves them all. Source: SLA paper (which fine-tunes
on the data alone).

The image-to-video network begins as that student: its patch embedding takes mask and image too, with weights that grow
from zero, and it learns from the data alone, sparse from its first step. Source: Wan2.2 for the conditioning.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F

from turbo_backend.config import DiTConfig
from turbo_backend.nets.dit import WanDiT
from turbo_training.attention_forward import SPARSE, TrainingAttention
from turbo_training.flow import draw_times, expand, velocity_of
from turbo_training.latents import LatentBank
from turbo_training.shapes import StageShape
from turbo_training.train_teacher import DROPPED, is_block_matrix
from turbo_training.trainer import EMA, Stage

TOPKS = (0.05, 0.10, 0.15)
#: (block_q, block_k): everywhere, and `sagesla` on Hopper.
GEOMETRIES = ((128, 64), (64, 128))


def draw_attention(generator: random.Random) -> TrainingAttention:
    """Sparse attention as some server might run it; the share recommended for quality in half of the draws."""
    topk = SPARSE.topk if generator.random() < 0.5 else generator.choice(TOPKS[:-1])
    block_q, block_k = generator.choice(GEOMETRIES)
    return TrainingAttention(topk=topk, block_q=block_q, block_k=block_k)


class SparseStage(Stage):
    """loss = |v - (eps - x_0)|^2, of which half is |v - v_teacher|^2 where there is a teacher; `ema` is what is kept.

    Args:
        name: `sla` or `i2v`.
        net: trained in place.
        teacher: dense network of the same inputs, or None.
    """

    def __init__(
        self,
        name: str,
        size: StageShape,
        bank: LatentBank,
        net: WanDiT,
        teacher: WanDiT | None,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(seed=seed, device=device)
        self.name, self.size, self.bank, self.teacher = name, size, bank, teacher
        self.net = net.requires_grad_(True)
        self.average = WanDiT(net.config).to(device)
        self.modules = {"net": self.net, "ema": self.average}
        self.optimizers = self.make_optimizers(self.net, is_block_matrix, betas=(0.9, 0.98), weight_decay=0.01)
        self._ema = EMA(self.net, self.average, decay=0.998)

    def step(self, index: int, progress: float) -> dict[str, torch.Tensor]:
        self.set_learning_rates(self.size.learning_rate, index, progress, warmup=100)
        attention = draw_attention(self.generator)
        losses = self.recorded.run(attention, lambda: self._update(attention))
        self._ema.update(index)
        return losses

    def _update(self, attention: TrainingAttention) -> dict[str, torch.Tensor]:
        x0, condition = self.bank.draw(self.size.batch_size, dropped=DROPPED)
        noise, t = torch.randn_like(x0), draw_times(len(x0), self.device)
        x = torch.lerp(x0, noise, expand(t))
        with self.precision():
            v = velocity_of(self.net, attention, compiled=self.is_on_gpu)(x, t, condition)
            losses = {"data": F.mse_loss(v, noise - x0)}
            if self.teacher is not None:
                with torch.no_grad():
                    v_teacher = velocity_of(self.teacher, compiled=self.is_on_gpu)(x, t, condition)
                losses["dense"] = F.mse_loss(v, v_teacher)
        self.net.zero_grad()
        torch.stack(list(losses.values())).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.step_optimizers()
        return losses


@torch.no_grad()
def take_image(net: WanDiT, config: DiTConfig) -> WanDiT:
    """The same function of noise and text, with inputs for mask and image that weigh nothing yet."""
    wider = WanDiT(config).to(net.device)
    state = net.state_dict()
    weight = torch.zeros_like(wider.patch_embedding.weight)
    # Features come by channel, and the noise is first.
    weight[:, : state["patch_embedding.weight"].shape[1]] = state["patch_embedding.weight"]
    wider.load_state_dict({**state, "patch_embedding.weight": weight})
    return wider
