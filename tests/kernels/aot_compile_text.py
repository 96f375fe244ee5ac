"""Compile the kernels of the text encoder for one architecture without a GPU, as `aot_compile.py` does."""

from __future__ import annotations

import json
import sys
from typing import Any

import aot_compile
import torch

from turbo_kernels.gelu_gate import gelu_gate
from turbo_kernels.relative_attention import relative_attention
from turbo_kernels.residual_rms_norm import residual_rms_norm

DIM, DIM_FFN, NUM_HEADS = 4096, 10240, 64


def record_launches(capability: int) -> list[tuple[Any, dict, dict]]:
    """(kernel, arguments by name, options) of every launch of a bf16 block, and where e4m3 exists of an 8-bit one."""
    launches = aot_compile.start_recording()
    x, weight = torch.zeros(32, DIM, dtype=torch.bfloat16), torch.zeros(DIM, dtype=torch.bfloat16)
    qkv, bias = torch.zeros(32, 3 * DIM, dtype=torch.bfloat16), torch.zeros(NUM_HEADS, 63, dtype=torch.bfloat16)
    relative_attention(qkv, bias, torch.ones(1, dtype=torch.int32), provider="triton")
    for quantize in (False, True)[: 1 + (capability >= 89)]:
        for y in (None, x):
            residual_rms_norm(x, y, weight, eps=1e-6, quantize=quantize, provider="triton")
        gelu_gate(torch.zeros(32, 2 * DIM_FFN, dtype=torch.bfloat16), quantize=quantize, provider="triton")
    return launches


if __name__ == "__main__":
    aot_compile.record_launches = record_launches
    for argument in sys.argv[1:]:
        report = {"capability": int(argument), "kernels": aot_compile.compile_all(int(argument))}
        print(json.dumps(report), flush=True)
