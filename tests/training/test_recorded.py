"""On a GPU: recorded steps train as plain ones do, and compiled functions give the plain ones' numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from turbo_backend.config import DiTConfig
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_training.attention_forward import DENSE, SPARSE, TrainingAttention
from turbo_training.compiling import RecordedSteps
from turbo_training.dit_forward import Condition, TextBatch, velocity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.training,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


def test_recorded_steps_train_as_plain_ones(device: torch.device) -> None:
    def train(*, recorded: bool) -> tuple[torch.Tensor, list[float]]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, device=device).view(3, 4))
        optimizer = torch.optim.AdamW([weight], lr=torch.tensor(0.0, device=device), fused=True, capturable=True)
        steps, x = RecordedSteps(device), torch.linspace(0, 2, 20, device=device).view(5, 4)

        def update(scale: float) -> dict[str, torch.Tensor]:
            loss = (x @ weight.T * scale - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss}

        losses = []
        for i in range(12):
            optimizer.param_groups[0]["lr"].fill_(0.01 * (i + 1))
            scale = (1.0, 2.0)[i % 2]
            found = steps.run(scale, partial(update, scale)) if recorded else update(scale)
            losses.append(float(found["loss"].detach()))
        return weight.detach(), losses

    (plain, plain_losses), (recorded, recorded_losses) = train(recorded=False), train(recorded=True)
    torch.testing.assert_close(recorded, plain)
    assert recorded_losses == pytest.approx(plain_losses, rel=1e-5)
    assert recorded_losses[-1] < recorded_losses[1]


@pytest.mark.filterwarnings("default")  # PyTorch's compiler warns of its own insides
@pytest.mark.parametrize("attention", [DENSE, SPARSE, TrainingAttention(topk=0.3, block_q=64, block_k=128)])
def test_compiled_functions_give_the_plain_numbers(device: torch.device, attention: TrainingAttention) -> None:
    net = WanDiT(DiTConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, text_dim=32, text_len=24))
    initialize_random(net, 3)
    net.to(device).requires_grad_(True)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 16, 3, 18, 16, generator=generator).to(device)
    text = TextBatch(torch.randn(2, 16, 32, generator=generator).to(device), torch.tensor([9, 4], device=device))
    found = []
    for compiled in (False, True):
        net.zero_grad()
        timesteps = torch.tensor([988.0, 608.0], device=device)
        v = velocity(net, latents, timesteps, Condition(text), attention=attention, compiled=compiled)
        v.square().mean().backward()
        found.append((v.detach(), net.get_parameter("blocks.0.self_attn.q.weight").grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
