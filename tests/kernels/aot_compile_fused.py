"""Compile the kernels of the fused transformer block for one architecture without a GPU, as `aot_compile.py` does."""

from __future__ import annotations

import json
import sys
from typing import Any

import aot_compile
import torch

from turbo_kernels.fp8_linear import quantize_fp8_rows
from turbo_kernels.qk_norm_rope_gather import qk_norm_rope_gather
from turbo_kernels.residual_norm import residual_norm
from turbo_kernels.rms_norm_rope import rms_norm_rope
from turbo_kernels.text_attention import TextRows, text_attention

DIMS = {1536: 12, 5120: 40}  # heads by width of the published models
FFN_DIMS = (8960, 13824)


def record_launches(capability: int) -> list[tuple[Any, dict, dict]]:
    """(kernel, arguments by name, options) of every launch of a bf16 block, and where e4m3 exists of an 8-bit one."""
    launches = aot_compile.start_recording()
    sys.modules["turbo_kernels.qk_norm_rope_gather"].is_hopper = lambda device: capability == 90
    dtypes = (None, torch.float8_e4m3fn) if capability >= 89 else (None,)
    for dim, num_heads in DIMS.items():
        x = torch.zeros(1, 8, dim, dtype=torch.bfloat16)
        vector, weight = torch.zeros(1, dim), torch.zeros(dim)
        qkv = torch.zeros(1, 8, 3 * dim, dtype=torch.bfloat16)
        q, k, _ = qkv.chunk(3, dim=-1)
        rope = torch.zeros(8, 64, 2)
        text = torch.zeros(5, num_heads, 128, dtype=torch.bfloat16)
        for rotations in (rope, None):
            rms_norm_rope(q, weight, rotations, num_heads=num_heads, eps=1e-6, provider="triton")
        for int8 in (False, True):
            qk_norm_rope_gather(q, k, weight, weight, rope, num_heads=num_heads, eps=1e-6, int8=int8)
        for dtype in dtypes:
            modulation = {"scale_BD": vector, "shift_BD": vector, "eps": 1e-6, "out_dtype": dtype, "provider": "triton"}
            residual_norm(x, x, vector, **modulation)
            residual_norm(x, x, weight=weight, bias=weight, eps=1e-6, out_dtype=dtype, provider="triton")
            amax = None if dtype is None else torch.ones(())
            rows = TextRows.of(5, last_count=9, device=text.device)
            text_attention(q[0], weight, text, text, eps=1e-6, text=rows, value_amax=amax, provider="triton")
        residual_norm(x, x, vector, **{**modulation, "out_dtype": torch.float32})
        if capability >= 89:
            residual_norm(x, x, **modulation, out_scale_B=torch.ones(1))
        if capability >= 89:
            quantize_fp8_rows(x, provider="triton")
    if capability >= 89:
        for dim in FFN_DIMS:
            quantize_fp8_rows(torch.zeros(1, 8, dim, dtype=torch.bfloat16), gelu=True, provider="triton")
    return launches


if __name__ == "__main__":
    aot_compile.record_launches = record_launches
    for argument in sys.argv[1:]:
        report = {"capability": int(argument), "kernels": aot_compile.compile_all(int(argument))}
        print(json.dumps(report), flush=True)
