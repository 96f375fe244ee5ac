"""Rows of `bench_gpu.py`: one forward of the Wan transformer, which is one step of the sampler.

Random weights of the published shapes, batch 1, 81 frames, a 60-token prompt, attention `sagesla` at top-k 0.1. Beside
it `recorded_ms`, the same replayed as a CUDA graph, and whether that gives the same bits. Gates:

    bf16      error of a few layers against fp32 at most twice that of plain PyTorch in bf16
    8-bit     relative RMSE at most LARGEST_8BIT_ERROR, beside that of the int8 kernels
    batch     a sample's result is the same bits alone and in a batch of two
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from gpu_rows import CUDA, Row, Target, peak_memory, profile, relative_rmse, release_memory, time_ms

from turbo_backend.config import MODELS, DiTConfig
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import KEEP_FP32, WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.recorded import RecordedForwards
from turbo_backend.quantization import quantize_linears

LATENT_SHAPES = {"480p": (21, 60, 104), "720p": (21, 90, 160)}
TEXT_LENGTH = 60
Inputs = tuple[torch.Tensor, torch.Tensor, list[int]]
#: e4m3 operands: 3.7 % a product of normal values; residual additions around it thin it out, layers add it up.
LARGEST_8BIT_ERROR = 0.06

#: dit-MODEL-SIZE-LINEARS; rows of one network follow each other, so that each is made once.
TARGETS = {
    "dit-1.3B-480p-bf16": Target(185, 165, 368),
    "dit-1.3B-480p-8bit": Target(130, 110, 741),
    "dit-14B-480p-8bit": Target(900, 780, 2065),
    "dit-14B-720p-8bit": Target(2600, 2200, 5165, gib=40.0),
    "dit-14B-480p-bf16": Target(1350, 1250, 2065),
    "dit-14B-720p-bf16": Target(3700, 3400, 5165),
}


def make_net(config: DiTConfig, dtype: torch.dtype, *, quantized: bool = False) -> WanDiT:
    """Random weights; a quantised network starts from random int8, as a published file does."""
    with torch.device("meta"):
        net = WanDiT(config)
    if quantized:
        quantize_linears(net)
    initialize_random(net, 0, device=CUDA, dtype=dtype, keep_fp32=KEEP_FP32, generator_device=CUDA)
    return net


def make_inputs(net: WanDiT, size: tuple[int, int, int], batch: int = 1) -> Inputs:
    """Latents, text embeddings, text lengths."""
    generator = torch.Generator(CUDA).manual_seed(1)
    latents = torch.randn(batch, net.config.in_channels, *size, device=CUDA, generator=generator)
    text = torch.randn(batch, net.config.text_len, net.config.text_dim, device=CUDA, generator=generator)
    return latents, text, [TEXT_LENGTH - 7 * i for i in range(batch)]


def evaluate(
    net: WanDiT,
    inputs: Inputs,
    *,
    attention_type: str = "sagesla",
    provider: str = "triton",
    members: slice = slice(None),
) -> torch.Tensor:
    latents, text, lengths = (part[members] for part in inputs)
    context = net.prepare_context(text, lengths, provider=provider)
    timesteps = torch.tensor([932.0, 608.0])[members]
    attention = AttentionSettings(attention_type=attention_type, provider=provider)
    return net(latents, timesteps, context, attention=attention)


def check() -> Row:
    """The gates above on a few layers of real width; dense attention, so that no block choice is part of the error."""
    config = replace(MODELS["Wan2.1-1.3B"].dit, num_layers=4)
    exact_net = make_net(config, torch.float32)
    inputs = make_inputs(exact_net, LATENT_SHAPES["480p"], batch=2)

    def run(net: WanDiT, provider: str = "triton") -> torch.Tensor:
        return evaluate(net, inputs, attention_type="original", provider=provider, members=slice(1))

    exact = run(exact_net, "reference")
    net = make_net(config, torch.bfloat16)
    plain = relative_rmse(run(net, "reference"), exact)
    net.prepare_for_inference()
    bf16 = relative_rmse(run(net), exact)
    same = [_batch_invariant(net, inputs)]
    quantize_linears(net)
    net.fuse_projections()
    int8 = relative_rmse(run(net), exact)
    net.prepare_for_inference()
    in_8bit = relative_rmse(run(net), exact)
    same.append(_batch_invariant(net, inputs))
    return {
        "plain_bf16": plain, "bf16": bf16, "int8": int8, "8bit": in_8bit, "8bit_kind": net.linear_kind,
        "batch_invariant": all(same), "passed": bf16 <= 2 * plain and in_8bit <= LARGEST_8BIT_ERROR and all(same),
    }  # fmt: skip


def _batch_invariant(net: WanDiT, inputs: Inputs) -> bool:
    """Two samples, of unlike texts and timesteps, at the real size."""
    together = evaluate(net, inputs)
    return all(torch.equal(together[i : i + 1], evaluate(net, inputs, members=slice(i, i + 1))) for i in range(2))


def measure(names: Sequence[str], profiled: Sequence[str]) -> Iterator[Row]:
    by_net = groupby(names, key=lambda name: (name.split("-")[1], name.split("-")[3]))
    for (model, linears), members in by_net:
        release_memory()
        net = make_net(MODELS[f"Wan2.1-{model}"].dit, torch.bfloat16, quantized=linears == "8bit")
        net.prepare_for_inference()
        for name in members:
            yield _measure_net(name, net, with_profile=name in profiled)
        del net


def _measure_net(name: str, net: WanDiT, *, with_profile: bool) -> Row:
    attention = AttentionSettings(attention_type="sagesla", provider="triton")
    timesteps = torch.tensor([932.0], dtype=torch.float64)
    with peak_memory() as peak:
        latents, text, lengths = make_inputs(net, LATENT_SHAPES[name.split("-")[2]])
        context = net.prepare_context(text, lengths)

        def launch() -> torch.Tensor:
            return net(latents, timesteps, context, attention=attention)

        def replay() -> torch.Tensor:
            return recorded(latents, timesteps, context, attention=attention)

        repeats = 5 if net.config.num_layers < 40 else 3
        value = time_ms(launch, repeats=repeats)
        row = TARGETS[name].row(name, value, peak_gib=peak(), linears=net.linear_kind)
        recorded = RecordedForwards(net)
        row["recorded_ms"] = round(time_ms(replay, repeats=repeats), 3)
        row["recorded_same_bits"] = torch.equal(replay(), launch())
        recorded.clear()
    return row | {"profile": profile(launch)} if with_profile else row
