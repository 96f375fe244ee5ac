"""A two-expert image model small enough to build for each test, a picture, and requests that are held open."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from turbo_backend.cancellation import Cancellations
from turbo_backend.config import MODELS, DiTConfig, ModelConfig, VAEConfig
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.stages.held_open import HeldOpen


@pytest.fixture(scope="session")
def image_model() -> ModelConfig:
    dit = DiTConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=2, in_channels=36, text_dim=24, text_len=16)
    return dataclasses.replace(MODELS["tiny-I2V"], dit=dit, vae=VAEConfig(base_dim=8), default_num_frames=5)


@pytest.fixture(scope="session")
def make_experts(image_model: ModelConfig) -> Callable[[], list[WanDiT]]:
    """`make_experts()` gives the high-noise and the low-noise network, new but always with the same weights."""

    def make() -> list[WanDiT]:
        nets = [WanDiT(image_model.dit) for _ in range(image_model.num_experts)]
        for seed, net in enumerate(nets):
            initialize_random(net, seed, device=torch.device("cpu"), dtype=torch.float32)
        return nets

    return make


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """`picture(width, height, seed=0)` gives a PNG of noise."""

    def make(width: int, height: int, seed: int = 0) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture
def marks(tmp_path: Path) -> Cancellations:
    return Cancellations(tmp_path / "marks")


@pytest.fixture
def held_open(marks: Cancellations) -> Iterator[HeldOpen]:
    held_open = HeldOpen(marks)
    yield held_open
    held_open.close()
