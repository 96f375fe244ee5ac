"""The kernels of the video VAE compile for every supported architecture on a machine without a GPU."""

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


def compile_for(capability: int, cache: Path) -> dict[str, list[dict[str, Any]]]:
    script = Path(__file__).with_name("aot_compile_conv3d.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, f"sm{capability}:\n{child.stderr[-4000:]}"
    kernels: dict[str, list[dict[str, Any]]] = json.loads(child.stdout.splitlines()[-1])["kernels"]
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[dict[str, Any]]]]:
    cache = tmp_path_factory.mktemp("triton-cache")
    with ThreadPoolExecutor(2) as pool:
        running = {capability: pool.submit(compile_for, capability, cache) for capability in SHARED_MEMORY}
        return {capability: future.result() for capability, future in running.items()}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles(compiled: dict[int, dict[str, list[dict[str, Any]]]], capability: int) -> None:
    kernels = compiled[capability]
    assert set(kernels) == {"causal_conv3d_kernel", "upsample_conv_kernel", "norm_silu_kernel"}
    for name, versions in kernels.items():
        for version in versions:
            assert version["cubin"] > 0
            assert version["shared"] <= SHARED_MEMORY[capability], (name, version)
    for name in ("causal_conv3d_kernel", "upsample_conv_kernel"):
        assert {version["tensor_core"] for version in kernels[name]} == {TENSOR_CORE[capability]}
