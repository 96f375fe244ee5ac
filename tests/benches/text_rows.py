"""Rows of `bench_gpu.py`: UMT5-xxl on one prompt, in bf16 and with e4m3 linears, random weights.

Gate: over two layers of real width, the error of bf16 against fp32 is at most twice that of transformers in bf16, and
that of e4m3 at most LARGEST_8BIT_ERROR.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from gpu_rows import CUDA, Row, Target, peak_memory, profile, relative_rmse, release_memory, time_ms
from reference_nets import umt5_of_transformers

from turbo_backend.config import TextEncoderConfig
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.umt5 import UMT5Encoder

#: text-TOKENS, or text-TOKENS-8bit.
TARGETS = {
    "text-512": Target(16, None, 29), "text-60": Target(8),
    "text-512-8bit": Target(16, None, 29), "text-60-8bit": Target(8),
}  # fmt: skip
#: e4m3 operands: 3.7 % a product of normal values, of which the residual stream keeps a part in each layer.
LARGEST_8BIT_ERROR = 0.08


def make_encoder(config: TextEncoderConfig, dtype: torch.dtype, *, quantize: bool = False) -> UMT5Encoder:
    with torch.device("meta"):
        net = UMT5Encoder(config)
    initialize_random(net, 0, device=CUDA, dtype=dtype, generator_device=CUDA)
    net.prepare_for_inference(CUDA, quantize=quantize)
    return net


def draw_tokens(config: TextEncoderConfig, count: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (1, count), generator=torch.Generator().manual_seed(count))


def check() -> Row:
    config = replace(TextEncoderConfig(), num_layers=2)
    rounded = make_encoder(config, torch.bfloat16)
    exact_net = make_encoder(config, torch.float32)
    exact_net.load_state_dict(rounded.state_dict())
    theirs = umt5_of_transformers(rounded)
    quantized = make_encoder(config, torch.bfloat16, quantize=True)
    errors: Row = {}
    passed = []
    for count in (60, 512):
        tokens = draw_tokens(config, count)
        exact = exact_net(tokens, [count])
        with torch.no_grad():
            plain = relative_rmse(theirs(tokens.to(CUDA)).last_hidden_state, exact)
        error = relative_rmse(rounded(tokens, [count]), exact)
        error8 = relative_rmse(quantized(tokens, [count]), exact)
        errors |= {f"error_{count}": error, f"transformers_{count}": plain, f"error_8bit_{count}": error8}
        passed.append(error <= 2 * plain and error8 <= LARGEST_8BIT_ERROR)
    return {**errors, "passed": all(passed)}


def measure(names: Sequence[str], profiled: Sequence[str]) -> Iterator[Row]:
    net: UMT5Encoder | None = None
    quantized = False
    for name in names:
        quantize = name.endswith("-8bit")
        if net is None or quantize != quantized:
            net = None
            release_memory()
            net, quantized = make_encoder(TextEncoderConfig(), torch.bfloat16, quantize=quantize), quantize
        yield _measure_net(name, net, with_profile=name in profiled)


def _measure_net(name: str, net: UMT5Encoder, *, with_profile: bool) -> Row:
    count = int(name.split("-")[1])
    tokens = draw_tokens(net.config, count)

    def run() -> torch.Tensor:
        return net(tokens, [count])

    with peak_memory() as peak:
        row = TARGETS[name].row(name, time_ms(run, repeats=9), peak_gib=peak())
    return row | {"profile": profile(run)} if with_profile else row
