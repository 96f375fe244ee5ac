"""The kernels of the fused transformer block compile for every supported architecture on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

#: Shared memory one program may take, bytes: CUDA programming guide, "Technical specifications by compute capability".
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_CORE = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
KERNELS = {"residual_norm_kernel", "qk_norm_rope_kernel", "text_attention_kernel"}


def compile_for(capability: int, cache: Path) -> dict[str, list[dict[str, Any]]]:
    script = Path(__file__).with_name("aot_compile_fused.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, f"sm{capability}:\n{child.stderr[-4000:]}"
    return json.loads(child.stdout.splitlines()[-1])["kernels"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[dict[str, Any]]]]:
    cache = tmp_path_factory.mktemp("triton-cache")
    with ThreadPoolExecutor(2) as pool:
        running = {capability: pool.submit(compile_for, capability, cache) for capability in SHARED_MEMORY}
        return {capability: future.result() for capability, future in running.items()}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles(compiled: dict[int, dict[str, list[dict[str, Any]]]], capability: int) -> None:
    kernels = compiled[capability]
    assert set(kernels) == KERNELS | ({"quantize_fp8_rows_kernel"} if capability >= 89 else set())
    for name, versions in kernels.items():
        for version in versions:
            assert version["cubin"] > 0
            assert version["shared"] <= SHARED_MEMORY[capability], (name, version)
    assert {version["tensor_core"] for version in kernels["text_attention_kernel"]} == {TENSOR_CORE[capability]}
