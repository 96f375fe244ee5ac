"""Times every op on one GPU at the served shapes, after the self-check: python tests/benches/bench_kernels.py

Medians over CUDA events, random data, bf16, batch 1. A table on stderr; the last line on stdout is JSON:
{"device", "torch", "triton", "self_check", "milliseconds": {shape: {op: ms}}}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import triton
from torch.profiler import ProfilerActivity, profile

import turbo_kernels as kernels
from turbo_kernels.residual_norm import residual_norm

#: name: (heads, tokens, FFN dim); head dimension 128.
SHAPES = {"1.3B 480p": (12, 32_760, 8_960), "14B 720p": (40, 75_600, 13_824)}
TOPK, EPS = 0.1, 1e-6


def ops(H: int, L: int, ffn_dim: int) -> dict[str, Callable[[], object]]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    D = 128
    q, k, v = (draw(1, L, H, D) for _ in range(3))
    weight, bias = draw(D, D) / D**0.5, draw(D)
    x, y, gate = draw(1, L, H * D), draw(1, L, H * D), draw(1, H * D)
    rope = torch.randn(L, D // 2, 2, device="cuda")
    weight8 = kernels.quantize_int8_blockwise(draw(ffn_dim, H * D))
    maps = {}
    for attention_type in ("sla", "sagesla"):
        block_q, block_k = kernels.attention_geometry(attention_type, "cuda")
        maps[attention_type] = kernels.block_map(q, k, block_q=block_q, block_k=block_k, topk=TOPK)
    return {
        "sla_attention sagesla": lambda: kernels.sla_attention(
            q, k, v, weight, bias, attention_type="sagesla", topk=TOPK
        ),
        "sla_attention sla": lambda: kernels.sla_attention(q, k, v, weight, bias, attention_type="sla", topk=TOPK),
        "dense_attention": lambda: kernels.dense_attention(q, k, v),
        "block_map 64x128": lambda: kernels.block_map(q, k, block_q=64, block_k=128, topk=TOPK),
        "sage_attention": lambda: kernels.sage_attention(q, k, v, maps["sagesla"]),
        "sparse_attention": lambda: kernels.sparse_attention(q, k, v, maps["sla"]),
        "linear_attention": lambda: kernels.linear_attention(q, k, v),
        "residual_norm": lambda: residual_norm(x, y, gate, scale_BD=gate, shift_BD=gate, eps=EPS),
        "rms_norm_rope": lambda: kernels.rms_norm_rope(x, gate[0], rope, num_heads=H, eps=EPS),
        "int8_linear": lambda: kernels.int8_linear(x, *weight8, None),
    }


def print_kernels(op: Callable[[], object]) -> None:
    """Milliseconds of each kernel behind one call."""
    op()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        for _ in range(5):
            op()
        torch.cuda.synchronize()
    for event in sorted(recorded.key_averages(), key=lambda event: -event.device_time_total):
        if event.device_time_total:
            print(f"        {event.key[:60]:60} {event.device_time_total / 5000:8.4f}", file=sys.stderr)


def main() -> int:
    checks = {head_dim: kernels.self_check("cuda", head_dim, "triton") for head_dim in (64, 128)}
    if not all(check.passed for check in checks.values()):
        print(f"self-check failed, nothing timed: {checks}", file=sys.stderr)
        return 1
    milliseconds: dict[str, dict[str, float]] = {}
    for shape, sizes in SHAPES.items():
        milliseconds[shape] = {}
        for name, op in ops(*sizes).items():
            op()
            median = float(triton.testing.do_bench(op, warmup=20, rep=100, return_mode="median"))
            milliseconds[shape][name] = round(median, 4)
            print(f"{shape:10} {name:24} {median:9.4f} ms", file=sys.stderr)
            if name.startswith("sla_attention"):
                print_kernels(op)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "self_check": {head_dim: check.details for head_dim, check in checks.items()},
        "milliseconds": milliseconds,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
