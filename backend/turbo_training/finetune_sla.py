"""Dense teacher to sparse student: block-sparse attention with the linear branch, `proj_l` learned from zero.

The student sees the same noisy latents as in flow matching and learns half from the data, half from the dense teacher's
velocity, which has less variance. Share and geometry of the blocks are drawn at each step from those that servers run,
so that one set of weights serves them all. Source: SLA paper (which fine-tunes on the data alone).
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F

from turbo_backend.nets.dit import WanDiT
from turbo_training.dit_forward import TrainingAttention
from turbo_training.flow import Batches, draw_times, expand, velocity_of
from turbo_training.shapes import RunShape
from turbo_training.trainer import EMA, Stage, set_learning_rate

TOPKS = (0.05, 0.10, 0.15)
#: (block_q, block_k): everywhere, and `sagesla` on Hopper.
GEOMETRIES = ((128, 64), (64, 128))
_DROPPED = 0.1


def draw_attention(generator: random.Random, *, explicit: bool = False) -> TrainingAttention:
    """Sparse attention as some server might run it; the share recommended for quality in half of the draws."""
    topk = TOPKS[-1] if generator.random() < 0.5 else generator.choice(TOPKS[:-1])
    block_q, block_k = generator.choice(GEOMETRIES)
    return TrainingAttention(topk=topk, block_q=block_q, block_k=block_k, explicit=explicit)


class SLAStage(Stage):
    """loss = |v - (eps - x_0)|^2 / 2 + |v - v_teacher|^2 / 2; `ema` is what is kept."""

    name = "sla"

    def __init__(self, shape: RunShape, batches: Batches, teacher: WanDiT, *, seed: int, device: torch.device) -> None:
        super().__init__(seed=seed, device=device)
        self.shape, self.batches, self.teacher = shape, batches, teacher
        self.net = WanDiT(shape.model.dit).to(device).requires_grad_(True)
        self.net.load_state_dict(teacher.state_dict())
        self.average = WanDiT(shape.model.dit).to(device)
        self.modules = {"net": self.net, "ema": self.average}
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0, betas=(0.9, 0.98), weight_decay=0.01)
        self.optimizers = {"net": self.optimizer}
        self._ema = EMA(self.net, self.average, decay=0.998)

    def step(self, index: int, progress: float) -> dict[str, float]:
        set_learning_rate(self.optimizer, self.shape.sla.learning_rate, index, progress, warmup=100)
        x0, text = self.batches.draw(self.shape.sla.batch_size, self.generator, dropped=_DROPPED)
        noise, t = torch.randn_like(x0), draw_times(len(x0), self.device)
        x = torch.lerp(x0, noise, expand(t))
        with self.precision():
            with torch.no_grad():
                v_teacher = velocity_of(self.teacher)(x, t, text)
            v = velocity_of(self.net, draw_attention(self.generator))(x, t, text)
        data, dense = F.mse_loss(v, noise - x0), F.mse_loss(v, v_teacher)
        self.optimizer.zero_grad()
        (0.5 * data + 0.5 * dense).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self._ema.update(index)
        return {"data": float(data.detach()), "dense": float(dense.detach())}
