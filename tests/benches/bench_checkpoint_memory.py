"""How much memory loading a 14B-shaped checkpoint holds beyond the network itself.

A synthetic file of the 14B denoiser's layout (fewer blocks, at least 2 GB) is written tensor by tensor as `.pth` and
as `.safetensors`. For each, a fresh process loads it to the CPU with conversion of every weight, while a thread
samples its anonymous memory (RssAnon of /proc/self/status: pages of the mapped file are the kernel's cache and do not
count). Reported: peak during the load minus what remains after it, against the largest tensor.

The last line is JSON: `value` is the worst excess over all cases in bytes, `target` the largest tensor plus slack.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from turbo_backend.checkpoints.layouts import DenoiserLayout
from turbo_backend.checkpoints.reader import open_checkpoint
from turbo_backend.checkpoints.writer import write_safetensors
from turbo_backend.config import MODELS, DiTConfig

#: Allocator slack and the interpreter's own growth during the load.
SLACK_BYTES = 32 << 20

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shortened(num_layers: int) -> DiTConfig:
    """The 14B denoiser with fewer blocks."""
    return replace(MODELS["Wan2.1-14B"].dit, num_layers=num_layers)


def write_synthetic(path: Path, config: DiTConfig, dtype: torch.dtype) -> int:
    """Writes a file of that layout; every value differs from page to page, so nothing is stored sparsely."""
    specs = {key: (shape, dtype) for key, (shape, _) in DenoiserLayout(config, quant_linear=False).specs.items()}

    def make(key: str) -> torch.Tensor:
        shape, _ = specs[key]
        return torch.empty(shape, dtype=dtype).normal_(generator=torch.Generator().manual_seed(len(key)))

    if path.suffix == ".safetensors":
        write_safetensors(path, specs, make, metadata={})
    else:
        torch.save({key: make(key) for key in specs}, path)
    return path.stat().st_size


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class PeakSampler:
    """Highest anonymous memory while the block runs, read every half millisecond by a thread."""

    def __enter__(self) -> PeakSampler:
        self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.0005):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def measure_load(path: Path, num_layers: int, dtype: torch.dtype, *, quant_linear: bool) -> dict[str, int | float]:
    """Loads in this process, which should be a fresh one."""
    layout = DenoiserLayout(shortened(num_layers), quant_linear=quant_linear)
    network = layout.build()
    del network
    gc.collect()
    before = anonymous_bytes()
    started = time.perf_counter()
    with PeakSampler() as sampler:
        loaded = layout.load(open_checkpoint(path), device="cpu", dtype=dtype)
    seconds = time.perf_counter() - started
    gc.collect()
    after = anonymous_bytes()
    tensors = list(loaded.state_dict().values())
    return {
        "before": before,
        "peak": sampler.peak,
        "after": after,
        "excess": sampler.peak - after,
        "network_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "largest_tensor_bytes": max(tensor.numel() * tensor.element_size() for tensor in tensors),
        "seconds": round(seconds, 2),
    }


def run_cases(folder: Path, num_layers: int) -> list[dict[str, object]]:
    """Both formats, both directions of conversion, and quantizing while loading; each in a process of its own."""
    cases = [
        ("pth", "float32", "bfloat16", False),
        ("safetensors", "float32", "bfloat16", False),
        ("pth", "bfloat16", "float32", False),
        ("safetensors", "bfloat16", "float32", False),
        ("safetensors", "bfloat16", "bfloat16", True),
    ]
    results: list[dict[str, object]] = []
    written: dict[tuple[str, str], int] = {}
    for suffix, stored, dtype, quant_linear in cases:
        # bfloat16 files hold twice the blocks, so that every file is as large.
        layers = num_layers if stored == "float32" else 2 * num_layers
        path = folder / f"synthetic-{stored}.{suffix}"
        if (suffix, stored) not in written:
            written[suffix, stored] = write_synthetic(path, shortened(layers), DTYPES[stored])
        command = [sys.executable, __file__, "--measure", str(path), "--layers", str(layers), "--dtype", dtype]
        output = subprocess.run(
            [*command, *(["--quant-linear"] if quant_linear else [])], check=True, capture_output=True, text=True
        ).stdout
        measured: dict[str, object] = json.loads(output.splitlines()[-1])
        case = f"{suffix}, {stored} -> {dtype}" + (", quantized while loading" if quant_linear else "")
        result = {"case": case, "file_bytes": written[suffix, stored], **measured}
        results.append(result)
        gigabytes = {
            key: f"{int(str(result[key])) / 1e9:.3f}" for key in ("file_bytes", "network_bytes", "peak", "after")
        }
        print(
            f"{case:52} file {gigabytes['file_bytes']} GB, network {gigabytes['network_bytes']} GB, "
            f"peak {gigabytes['peak']}, after {gigabytes['after']}: excess {int(str(result['excess'])) / 1e6:.1f} MB "
            f"(largest tensor {int(str(result['largest_tensor_bytes'])) / 1e6:.1f} MB), {result['seconds']} s",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="blocks of the float32 file: 1.4 GB each")
    parser.add_argument("--folder", type=Path, help="where to write the synthetic files (10 GB)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--quant-linear", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured = measure_load(
            options.measure, options.layers, DTYPES[options.dtype], quant_linear=options.quant_linear
        )
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = run_cases(Path(folder), options.layers)
    allowances = [int(str(result["largest_tensor_bytes"])) + SLACK_BYTES for result in results]
    excesses = [int(str(result["excess"])) for result in results]
    met = all(excess <= allowed for excess, allowed in zip(excesses, allowances, strict=True))
    print(
        json.dumps(
            {
                "bench": "checkpoint_memory",
                "value": max(excesses),
                "target": min(allowances),
                "unit": "bytes of anonymous memory at the peak of loading beyond the loaded network",
                "met": met,
                "slack_bytes": SLACK_BYTES,
                "smallest_file_bytes": min(int(str(result["file_bytes"])) for result in results),
                "cases": results,
                "torch": torch.__version__,
                "python": platform.python_version(),
            }
        )
    )


if __name__ == "__main__":
    main()
