"""The table of targets on one GPU: each part's gate first, then its times. Prints a table, then one line of JSON.

    python tests/benches/bench_gpu.py [--rows 'dit-1.3B*' ...] [--profile 'dit-1.3B-480p-8bit' ...] [--save NAME]

Random weights at real shapes, batch 1, medians of CUDA events. A part whose gate fails gives no rows, and the exit
status is 1. Rows are chosen by shell patterns; `--list` shows them all.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import attention_rows
import beside_rows
import dit_rows
import memory_rows
import text_rows
import torch
import vae_rows
from gpu_rows import Row, release_memory

from turbo_backend.manifest import versions

PARTS = {
    "attention": attention_rows,
    "dit": dit_rows,
    "vae": vae_rows,
    "text": text_rows,
    "memory": memory_rows,
    "diffusers": beside_rows,
}
RESULTS = Path(__file__).parents[2] / "docs/benchmarks"


def matching(patterns: list[str]) -> list[str]:
    names = [name for part in PARTS.values() for name in part.TARGETS]
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def show(row: Row) -> None:
    met = {True: "met", False: "missed", None: ""}[row["met"]]
    figures = "".join(
        f" {'-' if row[key] is None else row[key]:>9}" for key in ("value", "target", "beyond", "upstream")
    )
    peak = f"{row['peak_gib']:8.2f} GiB" if "peak_gib" in row else ""
    print(f"{row['name']:22}{figures} {row['unit']:4}{met:7}{peak}", flush=True)
    for kernel in row.get("profile", []):
        print(f"    {kernel['ms']:10.3f} ms {kernel['launches']:6d}  {kernel['kernel']}")


def current_commit() -> str:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return "not a checkout" if git.returncode else git.stdout.strip()


def save(report: dict[str, object], name: str) -> None:
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    number = 1 + sum(1 for _ in RESULTS.glob(f"{date}-*.json"))
    (RESULTS / f"{date}-{number}-{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--profile", nargs="+", default=[], metavar="PATTERN", help="rows whose kernels are listed")
    parser.add_argument("--save", metavar="NAME", help=f"keep the result as {RESULTS.name}/DATE-N-NAME.json")
    parser.add_argument("--commit", default=None, help="of the measured tree, where it is no checkout")
    parser.add_argument("--list", action="store_true", help="only list the rows")
    arguments = parser.parse_args()
    names, profiled = matching(arguments.rows), matching(arguments.profile)
    if not names:
        parser.error(f"no row matches {' '.join(arguments.rows)}: see --list")
    if arguments.list:
        print("\n".join(names))
        return 0
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{'':22}{'measured':>10}{'target':>10}{'beyond':>10}{'upstream':>10}")
    gates: dict[str, Row] = {}
    rows: list[Row] = []
    for part, module in PARTS.items():
        chosen = [name for name in module.TARGETS if name in names]
        if not chosen:
            continue
        gates[part] = module.check()
        print(f"gate of {part}: {json.dumps(gates[part])}", flush=True)
        if gates[part]["passed"]:
            for row in module.measure(chosen, profiled):
                rows.append(row)
                show(row)
        release_memory()
    report = {
        "bench": "gpu", "device": torch.cuda.get_device_name(), "commit": arguments.commit or current_commit(),
        "versions": versions(), "gates": gates, "rows": rows,
    }  # fmt: skip
    if arguments.save:
        save(report, arguments.save)
    print(json.dumps(report))
    return 0 if all(gate["passed"] for gate in gates.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
