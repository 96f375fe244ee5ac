"""Loading holds at most one extra copy of the largest tensor (benches/bench_checkpoint_memory.py has 2 GB files)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LARGEST = 6144 * 2048
_SLACK = 16 << 20


def _write(folder: Path, suffix: str, dtype: torch.dtype) -> Path:
    """Five tensors, 190 MB in float32."""
    shapes = [(2048, 2048), (6144, 2048), (2048, 6144), (6144, 2048), (2048, 2048)]
    state = {f"{i}.weight": torch.full(shape, float(i + 1), dtype=dtype) for i, shape in enumerate(shapes)}
    path = folder / f"synthetic.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


def _measure(path: Path, how: str, dtype: str) -> dict[str, int]:
    script = Path(__file__).with_name("measure_loading.py")
    output = subprocess.run(
        [sys.executable, str(script), str(path), how, dtype], check=True, capture_output=True, text=True
    ).stdout
    measured: dict[str, int] = json.loads(output.splitlines()[-1])
    assert measured["after"] > measured["network"], "the network must be in anonymous memory, not mapped"
    return measured


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_at_most_one_extra_tensor(tmp_path: Path, suffix: str, stored: str, wanted: str) -> None:
    path = _write(tmp_path, suffix, _DTYPES[stored])
    measured = _measure(path, "load_into", wanted)
    largest = _LARGEST * max(_DTYPES[stored].itemsize, _DTYPES[wanted].itemsize)
    assert measured["peak"] - measured["after"] <= largest + _SLACK


def test_the_measurement_sees_a_second_copy(tmp_path: Path) -> None:
    measured = _measure(_write(tmp_path, "pth", torch.float32), "naive", "bfloat16")
    assert measured["peak"] - measured["after"] > _LARGEST * 4 + _SLACK
