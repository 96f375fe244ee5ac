"""The teachers: flow matching, on captions of which some are dropped for guidance.

They attend densely, in training mostly so. In some steps attention is sparse, so that what a place has to look at comes
to lie in few blocks before the sparse stage takes the others away (Yuan et al., "Native Sparse Attention", on training
with it from the start).

That of image-to-video begins as the other: its patch embedding takes mask and image too, with weights that grow from
zero. Source: Wan2.2 for the conditioning.
"""

from __future__ import annotations

import torch
from torch import nn

from turbo_backend.config import DiTConfig
from turbo_backend.nets.dit import WanDiT
from turbo_training.attention_forward import TrainingAttention, draw_attention
from turbo_training.flow import draw_times, expand, velocity_of
from turbo_training.latents import LatentBank
from turbo_training.shapes import StageShape
from turbo_training.trainer import EMA, Stage

#: Share of captions left out, so that the network knows what clips look like without any.
DROPPED = 0.1
#: Share of steps with dense attention.
_DENSE_SHARE = 3 / 4


class TeacherStage(Stage):
    """loss = w |v(x_t, t, text) - (eps - x_0)|^2, t logit-normal and shifted; `ema` is what is kept.

    Args:
        name: `teacher` or `i2v`.
        net: trained in place.
    """

    def __init__(
        self, name: str, size: StageShape, bank: LatentBank, net: WanDiT, *, seed: int, device: torch.device
    ) -> None:
        super().__init__(seed=seed, device=device)
        self.name, self.size, self.bank, self.net = name, size, bank, net.requires_grad_(True)
        self.average = WanDiT(net.config).to(device)
        self.modules = {"net": self.net, "ema": self.average}
        self.optimizers = self.make_optimizers(self.net, is_block_matrix, betas=(0.9, 0.98), weight_decay=0.01)
        self._ema = EMA(self.net, self.average, decay=0.9995)

    def step(self, index: int, progress: float) -> dict[str, torch.Tensor]:
        self.set_learning_rates(self.size.learning_rate, index, progress, warmup=300)
        attention = draw_attention(self.generator, dense=_DENSE_SHARE)
        losses = self.recorded.run(attention, lambda: self._update(attention))
        self._ema.update(index)
        return losses

    def _update(self, attention: TrainingAttention) -> dict[str, torch.Tensor]:
        x0, condition, weight = self.bank.draw(self.size.batch_size, dropped=DROPPED)
        noise, t = torch.randn_like(x0), draw_times(len(x0), self.device)
        with self.precision():
            v = velocity_of(self.net, attention, compiled=self.is_on_gpu)(
                torch.lerp(x0, noise, expand(t)), t, condition
            )
        loss = (weight * (v - noise + x0).square()).mean()
        self.net.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.step_optimizers()
        return {"loss": loss, "gradient": norm}


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Matrices of the blocks."""
    return name.startswith("blocks.") and name.endswith(".weight") and parameter.dim() == 2


@torch.no_grad()
def make_denoiser(config: DiTConfig, seed: int) -> WanDiT:
    """A new one: linears by fan-in, gates, modulation and head at zero (adaLN-zero; Peebles and Xie, "DiT")."""
    torch.manual_seed(seed)
    net = WanDiT(config)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "proj_l" in name:
                nn.init.zeros_(module.weight)
    for name in ("time_embedding.0.weight", "time_embedding.2.weight"):
        nn.init.normal_(net.get_parameter(name), std=0.02)
    nn.init.zeros_(net.get_parameter("time_projection.1.weight"))
    nn.init.zeros_(net.get_parameter("head.head.weight"))
    for name, parameter in net.named_parameters():
        if name.endswith("modulation"):
            nn.init.normal_(parameter, std=net.config.dim**-0.5)
            if parameter.shape[1] == 6:
                parameter[:, (2, 5)] = 0
    return net


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
