"""Rows of `bench_gpu.py`: decode of 81 frames by the Wan VAE, random weights of the published shapes, bf16.

Gates, at a ragged size and at 480p: the RMS difference to the fp32 decode (TF32 off) is at most 1.5 times that of plain
PyTorch in bf16 (the same layers through cuDNN and unfused norms), and a stream of chunks beside another stream gives
the bits of the whole decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_rows import CUDA, Row, Target, peak_memory, profile, relative_rmse, time_ms
from torch import Tensor

from turbo_backend.config import VAEConfig
from turbo_backend.nets import vae_layers
from turbo_backend.nets.vae import WanVAE

LATENT_SIZES = {"480p": (60, 104), "720p": (90, 160)}
NUM_LATENTS = 21
LARGEST_ERROR_RATIO = 1.5

#: vae-SIZE, one latent frame a call as it is served; vae-SIZE-4 takes four.
TARGETS = {
    "vae-480p": Target(620, 420, 1822),
    "vae-480p-4": Target(620, 420, 1822),
    "vae-720p": Target(1450, 1000, 4148),
    "vae-720p-4": Target(1450, 1000, 4148),
}


def random_vae() -> WanVAE:
    """In fp32."""
    torch.manual_seed(0)
    with CUDA:
        net = WanVAE(VAEConfig())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    return net


def random_latents(num_latents: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(1, 16, num_latents, *size, device=CUDA, generator=generator)


def plain_decode(net: WanVAE, latents: Tensor) -> Tensor:
    """The layers as they are, through PyTorch alone."""

    def norm_silu(x_THWC: Tensor, gamma: Tensor, *, out: Tensor | None = None) -> Tensor:
        return F.silu(vae_layers.rms_norm(x_THWC, gamma, out=out), inplace=True)

    with (
        mock.patch.object(vae_layers, "norm_silu", norm_silu),
        mock.patch.object(net, "_decoder_for", return_value=net.decoder),
    ):
        return net.decode(latents)


def check() -> Row:
    exact_net = random_vae()
    net = deepcopy(exact_net).bfloat16()
    gates = {"ragged": _check_size(exact_net, net, (9, 13)), "480p": _check_size(exact_net, net, LATENT_SIZES["480p"])}
    return {**gates, "passed": all(gate["passed"] for gate in gates.values())}


def _check_size(exact_net: WanVAE, net: WanVAE, size: tuple[int, int], num_latents: int = 3) -> Row:
    latents = random_latents(num_latents, size)
    exact = plain_decode(exact_net, latents)
    plain = relative_rmse(plain_decode(net, latents), exact)
    frames = net.decode(latents)
    error = relative_rmse(frames, exact)
    del exact
    other = net.decode_chunks(random_latents(num_latents, size, seed=2))
    chunks = []
    for chunk in net.decode_chunks(latents):
        next(other)
        chunks.append(chunk)
    streamed = torch.equal(torch.cat(chunks, dim=2), frames)
    passed = error <= LARGEST_ERROR_RATIO * plain and streamed
    return {"error": error, "plain_error": plain, "ratio": error / plain, "streamed": streamed, "passed": passed}


def measure(names: Sequence[str], profiled: Sequence[str]) -> Iterator[Row]:
    net = random_vae().bfloat16()
    for name in names:
        _, size, *chunk = name.split("-")
        with peak_memory() as peak:
            latents = random_latents(NUM_LATENTS, LATENT_SIZES[size])
            run = partial(net.decode, latents, chunk_latents=int(chunk[0]) if chunk else 1)
            row = TARGETS[name].row(name, time_ms(run, repeats=3), peak_gib=peak())
        yield row | {"profile": profile(run)} if name in profiled else row
