"""rCM: the guided teacher distilled to one to four steps, through the sparse student's own attention.

Noise is measured by the TrigFlow angle: x = cos(a) x_0 + sin(a) eps, and the networks of the rectified flow are read as
F = dx/da by

    F(x, a) = ((c - s) x + v) / (c + s),   v = net(x / (c + s), t = s / (c + s)),   c = cos a, s = sin a
    x_0     = c x - s F

Two losses make the student (a third network, the fake score, follows the student's own samples):

    consistency   g = -c sqrt(1 - r^2 s^2) (F - F_teacher) - r (c s x + c s dF/da), with dF/da along the teacher's path;
                  g <- g / (|g| + 0.1);   20 w |F - sg(F) - g|^2         r rises from 0 to 1 (tangent warm-up)
    score         a sample y of 1 to 4 steps; d = (x_0,fake(y_a) - x_0,teacher(y_a)) / mean |y - x_0,teacher|;
                  |y - sg(y - d)|^2
    fake score    |y - x_0,fake(y_a)|^2 / s^2

Source: rCM paper (Zheng et al.) and its published training code for the constants; sCM paper (Lu and Song) for the
tangent and its warm-up; DMD2 paper for the score.

Simplified against the paper's setting: data are the procedural world's own clips instead of teacher samples; the
derivative is taken by forward-mode differentiation of plain attention in float32 instead of a fused kernel; the
warm-up also scales the term with dF/da, as in the sCM paper (the published code leaves it out there); the student's
attention is sparse from the start. Added: weights w of places (`LatentBank.draw`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from turbo_backend.nets.dit import WanDiT
from turbo_backend.sampler import MAX_STEPS, RCMSchedule
from turbo_training.attention_forward import SPARSE, TrainingAttention, draw_attention
from turbo_training.dit_forward import Condition
from turbo_training.finetune_sla import DENSE_SHARE
from turbo_training.flow import VelocityFn, expand, guided, velocity_of
from turbo_training.latents import ON_SUBJECTS, LatentBank
from turbo_training.shapes import StageShape
from turbo_training.trainer import EMA, Stage

#: Published is 100 to 1. The tangent's length is one however many elements there are, and the score's grows as their
#: square root: with 25 times fewer the same balance is a fifth.
_CONSISTENCY, _SCORE = 20.0, 1.0
#: The derivative costs as much as all the rest: a part of each batch gets that loss.
_CONSISTENCY_PART = 2
#: One update of the student to two of the fake score.
_STUDENT_EVERY = 3
#: Share of the stage in which the tangent is warmed up and there is no score loss yet.
_WARMUP = 0.12
#: log sigma of the consistency loss is normal with these; the score's times are uniform, then shifted. The published
#: shift of 5 is for 25 times as many tokens: with the square root of their number (Esser et al., "Stable Diffusion 3")
#: little of it is left, and shapes are drawn at low noise.
_LOG_SIGMA_MEAN, _LOG_SIGMA_STD = 0.7, 1.6
_SCORE_SHIFT = 2.0


def trig_output(function: VelocityFn, x: Tensor, angle_B: Tensor, condition: Condition) -> Tensor:
    """F(x, a) of a rectified-flow network; differentiable, also in forward mode."""
    c, s = expand(angle_B.cos()), expand(angle_B.sin())
    v = function(x / (c + s), (angle_B.sin() / (angle_B.cos() + angle_B.sin())), condition)
    return ((c - s) * x + v) / (c + s)


def denoise(output: Tensor, x: Tensor, angle_B: Tensor) -> Tensor:
    """x_0 = cos(a) x - sin(a) F."""
    return expand(angle_B.cos()) * x - expand(angle_B.sin()) * output


class RCMStage(Stage):
    """Distils; `ema` is what is kept. The fake score starts as the teacher.

    Args:
        name: `rcm` or `i2v_rcm`.
        student: trained in place.
        sigma_max: noise level at which requests begin.
    """

    def __init__(
        self,
        name: str,
        size: StageShape,
        bank: LatentBank,
        teacher: WanDiT,
        student: WanDiT,
        *,
        sigma_max: float,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(seed=seed, device=device)
        self.name, self.size, self.bank, self._sigma_max = name, size, bank, sigma_max
        self.net, self.fake = student, WanDiT(teacher.config).to(device)
        self.fake.load_state_dict(teacher.state_dict())
        self.average = WanDiT(student.config).to(device)
        self.net.requires_grad_(True)
        self.fake.requires_grad_(True)
        self.modules = {"net": self.net, "ema": self.average, "fake": self.fake}
        self.optimizer = self.make_optimizer(self.net.parameters(), betas=(0.0, 0.999), weight_decay=0.01)
        # Teacher and fake score attend densely: proj_l takes no part.
        self._fake_trained = [parameter for key, parameter in self.fake.named_parameters() if "proj_l" not in key]
        self.fake_optimizer = self.make_optimizer(self._fake_trained, betas=(0.0, 0.999), weight_decay=0.01)
        self.optimizers = {"net": self.optimizer, "fake": self.fake_optimizer}
        self._ema = EMA(self.net, self.average, decay=0.995)
        self._warmup = torch.zeros((), device=device)
        self._teacher, self._fake = (velocity_of(some, compiled=self.is_on_gpu) for some in (teacher, self.fake))

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        self.set_learning_rates(self.size.learning_rate, index, progress, warmup=20)
        self._warmup.fill_(min(1.0, progress / _WARMUP))
        # One to four steps by turns; none while the tangent is warmed up.
        num_steps = 0 if progress < _WARMUP else 1 + index // _STUDENT_EVERY % MAX_STEPS
        if num_steps and index % _STUDENT_EVERY:
            return self.recorded.run(("fake", num_steps), lambda: self._update_fake(num_steps))
        attention = draw_attention(self.generator, dense=DENSE_SHARE)
        losses = self.recorded.run((attention, num_steps), lambda: self._update_student(attention, num_steps))
        self._ema.update(index // _STUDENT_EVERY)
        return losses

    def _update_student(self, attention: TrainingAttention, num_steps: int) -> dict[str, Tensor]:
        x0, condition, weight = self.bank.draw(self.size.batch_size, on_subjects=ON_SUBJECTS)
        count = max(1, len(x0) // _CONSISTENCY_PART)
        losses = {"consistency": self._consistency(x0[:count], condition.first(count), weight[:count], attention)}
        if num_steps:
            losses["score"] = self._score(x0, condition, attention, num_steps=num_steps)
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        return losses

    def _student(self, attention: TrainingAttention) -> VelocityFn:
        return velocity_of(self.net, attention, compiled=self.is_on_gpu)

    def _consistency(self, x0: Tensor, condition: Condition, weight: Tensor, attention: TrainingAttention) -> Tensor:
        angle = torch.atan(torch.exp(_LOG_SIGMA_MEAN + _LOG_SIGMA_STD * torch.randn(len(x0), device=self.device)))
        c, s = expand(angle.cos()), expand(angle.sin())
        x = c * x0 + s * torch.randn_like(x0)
        with torch.no_grad():
            teacher = self._teacher_output(x, angle, condition)
            # cos sin dF/da along the teacher's path, in one pass of forward-mode differentiation.
            student = velocity_of(self.net, replace(attention, explicit=True))
            tangents = (c * s * teacher, angle.cos() * angle.sin())
            derivative = torch.func.jvp(lambda y, a: trig_output(student, y, a, condition), (x, angle), tangents)[1]
        with self.precision():
            output = trig_output(self._student(attention), x, angle, condition).float()
        held, warmup = output.detach(), self._warmup
        g = -c * (1 - (warmup * s).square()).sqrt() * (held - teacher) - warmup * (c * s * x + derivative)
        g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) + 0.1)
        return _CONSISTENCY * (weight * (output - held - g).square()).flatten(1).sum(1).mean()

    def _score(self, x0: Tensor, condition: Condition, attention: TrainingAttention, *, num_steps: int) -> Tensor:
        sample = self._simulate(x0, condition, attention, num_steps, with_gradient=True)
        angle = self._draw_score_angles(len(x0))
        noisy = expand(angle.cos()) * sample.detach() + expand(angle.sin()) * torch.randn_like(x0)
        with torch.no_grad():
            real = denoise(self._teacher_output(noisy, angle, condition), noisy, angle)
            with self.precision():
                fake = denoise(trig_output(self._fake, noisy, angle, condition), noisy, angle)
            weight = (sample - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-5)
            target = sample - (fake - real) / weight
        return _SCORE * (sample - target).square().flatten(1).sum(1).mean()

    def _update_fake(self, num_steps: int) -> dict[str, Tensor]:
        x0, condition, _ = self.bank.draw(self.size.batch_size)
        sample = self._simulate(x0, condition, SPARSE, num_steps, with_gradient=False)
        angle = self._draw_score_angles(len(x0))
        noisy = expand(angle.cos()) * sample + expand(angle.sin()) * torch.randn_like(x0)
        with self.precision():
            estimate = denoise(trig_output(self._fake, noisy, angle, condition), noisy, angle)
        loss = ((sample - estimate).square() / expand(angle.sin()).square()).mean()
        self.fake_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._fake_trained, 1.0)
        self.fake_optimizer.step()
        return {"fake": loss}

    def _simulate(
        self, like: Tensor, condition: Condition, attention: TrainingAttention, num_steps: int, *, with_gradient: bool
    ) -> Tensor:
        """Clean latents as serving makes them in `num_steps`; gradients through the last step alone."""
        student = self._student(attention)
        times = RCMSchedule(num_steps, self._sigma_max).times
        angles = [math.atan2(t, 1 - t) for t in times]
        x = math.sin(angles[0]) * torch.randn_like(like)
        for i_step, (angle, next_angle) in enumerate(pairwise(angles)):
            is_last = i_step == num_steps - 1
            angle_B = torch.full((len(like),), angle, device=self.device)
            with torch.set_grad_enabled(with_gradient and is_last), self.precision():
                x = denoise(trig_output(student, x, angle_B, condition), x, angle_B).float()
            if not is_last:
                x = math.cos(next_angle) * x + math.sin(next_angle) * torch.randn_like(x)
        return x

    def _teacher_output(self, x: Tensor, angle: Tensor, condition: Condition) -> Tensor:
        """The guided teacher's F."""

        def output(y: Tensor, a: Tensor, some: Condition) -> Tensor:
            return trig_output(self._teacher, y, a, some)

        with self.precision():
            return guided(output, x, angle, condition, self.bank.nothing).float()

    def _draw_score_angles(self, batch_size: int) -> Tensor:
        u = torch.rand(batch_size, device=self.device)
        t = (_SCORE_SHIFT * u / (1 + (_SCORE_SHIFT - 1) * u)).clamp(1e-3, 0.999)
        return torch.atan2(t, 1 - t)
