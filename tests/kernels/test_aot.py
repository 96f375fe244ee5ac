"""Every kernel compiles for every supported architecture on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import turbo_kernels

#: Shared memory one program may take, bytes: CUDA programming guide, "Technical specifications by compute capability".
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_CORE = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
#: Scripts that compile the kernels of attention and row ops, of the fused transformer block, of the video VAE, and of
#: the text encoder.
SCRIPTS = ("aot_compile.py", "aot_compile_fused.py", "aot_compile_conv3d.py", "aot_compile_text.py")
MATRIX_KERNELS = {
    "sparse_attention_kernel",
    "sage_attention_kernel",
    "summarize_chunk_kernel",
    "int8_linear_kernel",
    "text_attention_kernel",
    "relative_attention_kernel",
    "causal_conv3d_kernel",
    "upsample_conv_kernel",
}
#: e4m3 exists from compute capability 8.9 on.
FP8_KERNELS = {"quantize_fp8_rows_kernel"}


def compile_with(script: str, capability: int, cache: Path) -> dict[str, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, f"{script} sm{capability}:\n{child.stderr[-4000:]}"
    return json.loads(child.stdout.splitlines()[-1])["kernels"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[dict[str, Any]]]]:
    cache = tmp_path_factory.mktemp("triton-cache")
    with ThreadPoolExecutor(2) as pool:
        running = {
            (capability, script): pool.submit(compile_with, script, capability, cache)
            for capability in SHARED_MEMORY
            for script in SCRIPTS
        }
        kernels: dict[int, dict[str, list[dict[str, Any]]]] = {capability: {} for capability in SHARED_MEMORY}
        for (capability, _), future in running.items():
            kernels[capability] |= future.result()
    return kernels


def defined_kernels() -> set[str]:
    """Names of the kernels in the package's files; helpers that kernels call do not end in `_kernel`."""
    names = set()
    for path in Path(turbo_kernels.__file__).parent.glob("*.py"):
        lines = path.read_text().splitlines()
        names |= {line[4 : line.index("(")] for line in lines if line.startswith("def ") and "_kernel(" in line}
    return names


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles(compiled: dict[int, dict[str, list[dict[str, Any]]]], capability: int) -> None:
    kernels = compiled[capability]
    assert set(kernels) == defined_kernels() - (FP8_KERNELS if capability < 89 else set())
    for name, versions in kernels.items():
        for version in versions:
            assert version["cubin"] > 0
            assert version["shared"] <= SHARED_MEMORY[capability], (name, version)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_matrix_kernels_reach_the_tensor_cores(
    compiled: dict[int, dict[str, list[dict[str, Any]]]], capability: int
) -> None:
    kernels = compiled[capability]
    assert kernels.keys() >= MATRIX_KERNELS
    for name in MATRIX_KERNELS:
        assert {version["tensor_core"] for version in kernels[name]} == {TENSOR_CORE[capability]}, name
