"""Muon: momentum whose step is made orthogonal. For weight matrices and convolutions inside a network.

Source: Jordan et al., "Muon" (the iteration and its coefficients); Liu et al., "Muon is scalable" (the size of a step).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

#: Of the quintic that pushes singular values towards 1, applied five times.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
#: Root mean square of a step with a learning rate of 1: that of AdamW, whose rates fit then.
_STEP_SIZE = 0.2


class Muon(torch.optim.Optimizer):
    """Optimizes weights [out, in, ...], taken as matrices of `out` rows; can be recorded as a CUDA graph.

    As any optimizer it leaves a weight that has no gradient as it is.

    Args:
        parameters: of two dimensions or more.
        lr: tensor on their device, to be filled at each step.
        momentum: of Nesterov's kind.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: Tensor, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for same in by_shape.values():
                gradients: list[Tensor] = [parameter.grad for parameter in same]  # type: ignore[misc]
                momenta = [self.state[parameter]["momentum"] for parameter in same]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                steps = torch._foreach_lerp(gradients, momenta, group["momentum"])
                matrices = torch.stack([step.flatten(1) for step in steps])
                size = _STEP_SIZE * max(matrices.shape[1:]) ** 0.5
                scaled = (orthogonalize(matrices) * (size * group["lr"])).to(same[0].dtype)
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(same, [step.view_as(same[0]) for step in scaled])


def orthogonalize(matrices_BMN: Tensor) -> Tensor:
    """U V^T of each matrix's U S V^T, nearly: singular values come out between about 0.7 and 1.2."""
    x = matrices_BMN.to(torch.bfloat16) if matrices_BMN.is_cuda else matrices_BMN
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
