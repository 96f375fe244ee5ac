"""Networks of a few kilobytes and files of every format made from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from turbo_backend.config import DiTConfig
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random

SMALL_DIT = DiTConfig(dim=128, ffn_dim=192, num_heads=2, num_layers=2, text_dim=32, text_len=16)


class SmallNet(nn.Module):
    """Parameters, a buffer and nesting, without a known layout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.register_buffer("table", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)  # type: ignore[no-any-return]


@pytest.fixture
def small_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(tensor.shape, generator=generator).to(torch.bfloat16)
        for key, tensor in SmallNet().state_dict().items()
    }


@pytest.fixture
def small_net() -> SmallNet:
    """On the meta device."""
    with torch.device("meta"):
        return SmallNet()


@pytest.fixture
def dit_config() -> DiTConfig:
    return SMALL_DIT


@pytest.fixture(scope="session")
def dit_state() -> dict[str, torch.Tensor]:
    """A denoiser's state dict in the published layout: bfloat16, its q and k norms float32."""
    with torch.device("meta"):
        network = WanDiT(SMALL_DIT)
    initialize_random(network, 1, device=torch.device("cpu"), dtype=torch.bfloat16)
    state = {key: tensor.detach() for key, tensor in network.state_dict().items()}
    return {key: tensor.float() if "norm" in key else tensor for key, tensor in state.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(state, name): saves by the suffix of the name."""

    def run(state: dict[str, torch.Tensor], name: str, metadata: dict[str, str] | None = None) -> Path:
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file(state, path, metadata=metadata)
        else:
            torch.save(state, path)
        return path

    return run
