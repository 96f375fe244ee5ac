"""Sparse fine-tuning: block-sparse attention with the linear branch and its `proj_l`.

The dense teacher becomes the sparse student: it sees the same noisy latents as in flow matching and learns the dense
teacher's velocity, which is what the data's are in the mean, without their variance, and to have after each block what
the teacher has there. Places on subjects count more than the surroundings: the target is a function of what the student
sees, so the best answer stays the same. Share and geometry of the blocks are drawn at each step from those that servers
run, and now and then attention is dense, so that one set of weights serves them all. Source: SLA paper (which
fine-tunes on the data); Zhang et al., "LoLCATs", for learning from a dense network layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from turbo_backend.nets.dit import WanDiT
from turbo_training.attention_forward import SPARSE, SPARSE_ON_HOPPER, TrainingAttention, draw_attention
from turbo_training.flow import draw_times, expand, velocity_of
from turbo_training.latents import ON_SUBJECTS, LatentBank
from turbo_training.shapes import StageShape
from turbo_training.train_teacher import DROPPED, is_block_matrix
from turbo_training.trainer import EMA, Stage

#: Share of steps with dense attention.
DENSE_SHARE = 1 / 8
#: The other steps' by how often: what is recommended for quality most, fewer blocks now and then.
_SPARSE_SHARES = {SPARSE: 6, SPARSE_ON_HOPPER: 3, replace(SPARSE, topk=0.10): 2, replace(SPARSE, topk=0.05): 1}
#: Weight of the blocks' differences, each relative to the variance of what the teacher has there.
_BLOCKS = 0.2


class SparseStage(Stage):
    """loss = w |v - v_teacher|^2 + sum_l |h_l - h_l,teacher|^2 / (5 var h_l,teacher).

    h_l is the residual stream after block l, w are the weights of `LatentBank.draw`. `ema` is what is kept.

    Args:
        name: `sla` or `i2v_sla`.
        net: trained in place.
        teacher: dense network of the same shape.
    """

    def __init__(
        self,
        name: str,
        size: StageShape,
        bank: LatentBank,
        net: WanDiT,
        teacher: WanDiT,
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
        attention = draw_attention(self.generator, dense=DENSE_SHARE, sparse=_SPARSE_SHARES)
        losses = self.recorded.run(attention, lambda: self._update(attention))
        self._ema.update(index)
        return losses

    def _update(self, attention: TrainingAttention) -> dict[str, torch.Tensor]:
        x0, condition, weight = self.bank.draw(self.size.batch_size, dropped=DROPPED, on_subjects=ON_SUBJECTS)
        noise, t = torch.randn_like(x0), draw_times(len(x0), self.device)
        x = torch.lerp(x0, noise, expand(t))
        mine: list[torch.Tensor] = []
        theirs: list[torch.Tensor] = []
        with self.precision():
            v = velocity_of(self.net, attention, compiled=self.is_on_gpu, streams=mine)(x, t, condition)
            with torch.no_grad():
                v_teacher = velocity_of(self.teacher, compiled=self.is_on_gpu, streams=theirs)(x, t, condition)
        losses = {
            "dense": (weight * (v - v_teacher).square()).mean(),
            "blocks": _sum_of_errors(mine, theirs),
        }
        self.net.zero_grad()
        (losses["dense"] + _BLOCKS * losses["blocks"]).backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.step_optimizers()
        return losses


def _sum_of_errors(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over the pairs of |found - wanted|^2 / var wanted."""
    return torch.stack([F.mse_loss(a, b) / b.var() for a, b in zip(found, wanted, strict=True)]).sum()
