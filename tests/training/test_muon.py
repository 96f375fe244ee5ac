"""Steps of Muon: orthogonal, sized as AdamW's, the same after a restart, and good ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from turbo_training.muon import Muon, orthogonalize

pytestmark = pytest.mark.training


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (64, 24), (32, 32)])
def test_singular_values_come_near_one_and_directions_stay(rows: int, columns: int) -> None:
    matrices = torch.randn(3, rows, columns, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalize(matrices) @ v.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert ((values > 0.6) & (values < 1.3)).all()
    assert (found - torch.diag_embed(values)).abs().max() < 1e-9


def make(shape: tuple[int, ...], rate: float, seed: int = 0) -> tuple[nn.Parameter, Muon]:
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    return parameter, Muon([parameter], lr=torch.tensor(rate))


def test_steps_are_sized_as_those_of_adamw() -> None:
    weight, muon = make((48, 16, 3, 3), 0.01)
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape)
    muon.step()
    step = (weight.detach() - before).square().mean().sqrt()
    # An orthogonal matrix of M x N has the root mean square 1 / sqrt(max(M, N)).
    assert 0.7 < float(step) / (0.2 * 0.01) < 1.2


def test_weights_shrink_by_what_decays() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    muon = Muon([weight], lr=torch.tensor(0.1), weight_decay=0.5)
    weight.grad = torch.zeros(4, 4)
    muon.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 0.95))


def test_weights_without_a_gradient_stay() -> None:
    used, unused = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    muon = Muon([used, unused], lr=torch.tensor(0.1), weight_decay=0.5)
    used.grad = torch.zeros(4, 4)
    muon.step()
    assert float(used.detach().max()) < 1
    assert torch.equal(unused.detach(), torch.ones(4, 4))


def test_a_restart_changes_nothing() -> None:
    gradients = torch.randn(6, 8, 12)

    def run(split: int) -> Tensor:
        weight, muon = make((8, 12), 0.1)
        for i, gradient in enumerate(gradients):
            if i == split:
                state, held = muon.state_dict(), weight.detach().clone()
                weight, muon = make((8, 12), 0.1, seed=1)
                weight.data.copy_(held)
                muon.load_state_dict(state)
            weight.grad = gradient.clone()
            muon.step()
        return weight.detach()

    assert torch.equal(run(3), run(99))


def test_what_plain_descent_leaves_is_found() -> None:
    """Least squares whose inputs' directions differ a hundredfold in size, 400 steps of each at a good rate."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(512, 16, generator=generator) * torch.logspace(0, -2, 16)
    right = torch.randn(8, 16, generator=generator)
    weight, muon = make((8, 16), 0.0, seed=3)
    plain = weight.detach().clone()
    largest_curvature = 2 * torch.linalg.matrix_norm(x, 2) ** 2 / len(x)
    for i in range(400):
        muon.param_groups[0]["lr"].fill_(0.3 * math.cos(math.pi * i / 800))
        weight.grad = 2 * (weight.detach() - right) @ (x.mT @ x) / len(x)
        muon.step()
        plain -= 2 * (plain - right) @ (x.mT @ x) / len(x) / largest_curvature
    assert (weight.detach() - right).norm() < 0.02 * right.norm()
    assert (plain - right).norm() > 0.5 * right.norm()
