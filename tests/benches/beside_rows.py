"""Rows of `bench_gpu.py`: the parts that diffusers has, in the same run: a dense forward of 1.3B and a decode, 480p.

They have no target of their own. Where diffusers is not installed, the value is None and the row says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence

import torch
from dit_rows import LATENT_SHAPES
from gpu_rows import CUDA, Row, peak_memory, profile, time_ms
from reference_nets import dit_of_diffusers, vae_of_diffusers

from turbo_backend.config import MODELS

TARGETS = {"diffusers-dit-1.3B": None, "diffusers-vae-480p": None}
_INSTALLED = importlib.util.find_spec("diffusers") is not None


def check() -> Row:
    """Nothing of ours runs here; the tests hold our networks to the numbers of these."""
    return {"installed": _INSTALLED, "passed": True}


def measure(names: Sequence[str], profiled: Sequence[str]) -> Iterator[Row]:
    for name in names:
        row: Row = {"name": name, "value": None, "unit": "ms", "target": None, "beyond": None, "upstream": None}
        row["met"] = None
        if not _INSTALLED:
            yield row | {"note": "diffusers is not installed"}
            continue
        with peak_memory() as peak, torch.no_grad():
            run = _forward() if name == "diffusers-dit-1.3B" else _decode()
            row["value"] = round(time_ms(run, repeats=2), 1)
            row["peak_gib"] = round(peak(), 2)
            yield row | {"profile": profile(run)} if name in profiled else row


def _forward() -> Callable[[], object]:
    config = MODELS["Wan2.1-1.3B"].dit
    net = dit_of_diffusers(config)
    latents = torch.randn(1, config.in_channels, *LATENT_SHAPES["480p"], device=CUDA, dtype=torch.bfloat16)
    text = torch.randn(1, config.text_len, config.text_dim, device=CUDA, dtype=torch.bfloat16)
    timestep = torch.tensor([932], device=CUDA)
    return lambda: net(latents, timestep, text, return_dict=False)


def _decode() -> Callable[[], object]:
    net = vae_of_diffusers()
    latents = torch.randn(1, 16, *LATENT_SHAPES["480p"], device=CUDA, dtype=torch.bfloat16)
    return lambda: net.decode(latents, return_dict=False)
