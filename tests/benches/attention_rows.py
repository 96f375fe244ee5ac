"""Rows of `bench_gpu.py`: self-attention of a 1.3B block at 480p alone, block map, quantising, linear branch and all.

Gate: the self-check of the kernels at both head dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
from bench_kernels import SHAPES, ops
from gpu_rows import Row, Target, peak_memory, profile, release_memory

from turbo_kernels import self_check

TARGETS = {"attention-sagesla": Target(1.4, 1.0, 2.2), "attention-sla": Target(2.2)}


def check() -> Row:
    checks = {head_dim: self_check("cuda", head_dim, "triton") for head_dim in (64, 128)}
    errors = {f"head_dim {head_dim}": check.details for head_dim, check in checks.items()}
    return {**errors, "passed": all(check.passed for check in checks.values())}


def measure(names: Sequence[str], profiled: Sequence[str]) -> Iterator[Row]:
    all_ops = ops(*SHAPES["1.3B 480p"])
    for name in names:
        op = all_ops[f"sla_attention {name.split('-')[1]}"]
        with peak_memory() as peak:
            value = triton.testing.do_bench(op, warmup=50, rep=300, return_mode="median")
            row = TARGETS[name].row(name, float(value), peak_gib=peak())
        yield row | {"profile": profile(op)} if name in profiled else row
    release_memory()
