r"""Do jobs survive, do requests leave nothing behind, how long do the cancelled and the urgent wait?

    python tests/benches/bench_reliability.py
    python tests/benches/bench_reliability.py --url 127.0.0.1:8001 --pid 4711 --gpu \
        --only soak --requests 100 --first 20 --longest 81

The loads are those of `tests/reliability`: faults (processes of the server die at drawn moments), soak (many requests,
some cut off, cancelled or bad; memory at the end over that after the first), crowd (many callers at once), cancel,
cuts (streams that are cut while their video is decoded) and drafts. Without `--url` each runs on a server of its own
with the tiny model on the CPU; a server that runs already sees no faults and no cuts, and its memory is told where
`--pid` (tritonserver's, as `turbodiffusion-server serve` prints it) and `--gpu` say where to look. The last stdout line
is one JSON object; exit status 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults import kill_under_load
from job_server import JobServer
from loads import LONG, SHAPES, MixedLoad, Shape, cancel_jobs, cut_streams, send_drafts
from processes import find_processes, gpu_mb, resident_mb

from turbo_backend.manifest import versions
from turbo_client import Client

Result = dict[str, object]


@contextlib.contextmanager
def reach(arguments: argparse.Namespace) -> Iterator[tuple[Client, int | None]]:
    """A client and tritonserver's process id: of the server that runs already, or of one started for this load."""
    if arguments.url:
        with Client(arguments.url, timeout=600) as client:
            client.wait_ready()
            yield client, arguments.pid
        return
    with tempfile.TemporaryDirectory(prefix="bench-reliability-") as folder, JobServer(Path(folder)) as own:
        yield own.client, own.server.pid


def measure_faults(arguments: argparse.Namespace) -> Result:
    """Kills drawn processes at drawn moments, with jobs always at hand."""
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="bench-reliability-") as folder,
        JobServer(Path(folder), restarts=arguments.kills + 1) as own,
    ):
        faults = kill_under_load(own, arguments.kills, arguments.seed)
    seconds = time.perf_counter() - began
    print(f"faults: {arguments.kills} kills ({faults.in_starts} in starts) {dict(faults.killed)}, {seconds:.0f} s")
    print(f"  {faults.jobs} jobs, {faults.resumes} resumes; lost {faults.lost}, different {faults.different}")
    print(f"  left behind {faults.left_behind}")
    return {
        "kills": arguments.kills,
        "seed": arguments.seed,
        "killed": dict(faults.killed),
        "in_starts": faults.in_starts,
        "jobs": faults.jobs,
        "resumes": faults.resumes,
        "lost": len(faults.lost),
        "different": len(faults.different),
        "left_behind": len(faults.left_behind),
        "seconds": round(seconds, 1),
        "met": not (faults.lost or faults.different or faults.left_behind),
    }


def measure_soak(arguments: argparse.Namespace) -> Result:
    """Requests of every kind; memory of each process after the first ones and at the end."""
    with reach(arguments) as (client, pid):

        def weigh() -> dict[str, float]:
            load.settle()
            time.sleep(2.0)  # what the last requests used is given back
            resident = {f"{name} resident": mb for name, mb in resident_mb(find_processes(pid)).items()}
            return resident | (gpu_mb() if arguments.gpu else {})

        load = MixedLoad(client, shapes_of(arguments), callers=arguments.callers, seed=arguments.seed)
        if not arguments.url:
            load.fill_batches()
        load.run(arguments.first)
        first = weigh()
        load.run(arguments.requests)
        end = weigh()
    growth = {name: round(100 * (end[name] / first[name] - 1), 1) for name in first if name in end}
    print(f"soak: {arguments.requests} requests of {arguments.callers} callers: {dict(load.outcomes)}")
    for name, percent in growth.items():
        print(
            f"  {name:24} MB {first[name]:9.1f} after {arguments.first}, {end[name]:9.1f} at the end, {percent:+.1f} %"
        )
    wholes = {
        "resident": [name for name in first if name.endswith(" resident")],
        "gpu": [name for name in first if name.startswith("gpu ")],
    }
    sums = {
        what: round(100 * (sum(end[name] for name in part) / sum(first[name] for name in part) - 1), 1)
        for what, part in wholes.items()
        if part
    }
    print(f"  altogether, in %: {sums}; faults {load.faults}")
    return {
        "requests": arguments.requests,
        "callers": arguments.callers,
        "outcomes": dict(load.outcomes),
        "first": arguments.first,
        "mb_first": first,
        "mb_end": end,
        "growth_percent": growth,
        "growth_percent_altogether": sums,
        "met": not load.faults and all(percent <= 5.0 for percent in sums.values()),
    }


def measure_crowd(arguments: argparse.Namespace) -> Result:
    """Sixty-four callers that each ask again as soon as they are answered."""
    with reach(arguments) as (client, _):
        load = MixedLoad(client, shapes_of(arguments), callers=64, seed=arguments.seed)
        load.run(0, arguments.crowd_seconds)
    print(f"crowd: 64 callers for {arguments.crowd_seconds:.0f} s: {dict(load.outcomes)}; faults {load.faults}")
    return {
        "callers": 64,
        "seconds": arguments.crowd_seconds,
        "outcomes": dict(load.outcomes),
        "met": not load.faults,
    }


def measure_cancel(arguments: argparse.Namespace) -> Result:
    """From the wish to cancel to the job's end, and the steps told after the answer."""
    with reach(arguments) as (client, _):
        cancels = cancel_jobs(client, arguments.cancels, arguments.seed)
    p50, p99 = statistics.median(cancels.milliseconds), percentile(cancels.milliseconds, 99)
    step = max(cancels.step_milliseconds)
    most = max(cancels.further_steps)
    print(f"cancel: {arguments.cancels} running jobs, p50 {p50:.0f} ms, p99 {p99:.0f} ms; {most} further steps at most")
    print(f"  a step {statistics.median(cancels.step_milliseconds):.0f} ms, the longest {step:.0f}")
    return {
        "jobs": arguments.cancels,
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "step_ms": round(statistics.median(cancels.step_milliseconds), 1),
        "longest_step_ms": round(step, 1),
        "most_further_steps": most,
        "not_cancelled": len(cancels.not_cancelled),
        "met": most <= 1 and not cancels.not_cancelled and p99 <= step + 50.0,
    }


def measure_cuts(arguments: argparse.Namespace) -> Result:
    """How many chunks of a video are decoded after its stream was cut."""
    with tempfile.TemporaryDirectory(prefix="bench-reliability-") as folder, JobServer(Path(folder)) as own:
        cuts = cut_streams(own.client, own.server.metrics_url, arguments.cancels, arguments.seed)
    p99, chunk = percentile(cuts.further_chunks, 99), cuts.chunk_milliseconds
    print(f"cuts: {arguments.cancels} streams while decoded, p99 {p99} further chunks of {chunk:.0f} ms, of 33")
    return {
        "streams": arguments.cancels,
        "p99_further_chunks": p99,
        "chunk_ms": round(chunk, 1),
        "not_cancelled": cuts.not_cancelled,
        "met": p99 <= 1 and not cuts.not_cancelled,
    }


def measure_drafts(arguments: argparse.Namespace) -> Result:
    """How long drafts wait among finals that keep the server busy."""
    with reach(arguments) as (client, _):
        drafts = send_drafts(client, arguments.drafts, finals=4)
    turns, wait = percentile(drafts.turns_waited, 95), percentile(drafts.milliseconds, 95)
    step = drafts.final_step_milliseconds
    print(f"drafts: {arguments.drafts} among 4 finals: p95 waited for {turns:.0f} steps of finals, {wait:.0f} ms")
    print(f"  at most {max(drafts.turns_waited)}; a step of the finals {step or float('nan'):.0f} ms")
    return {
        "drafts": arguments.drafts,
        "p95_steps_waited": turns,
        "most_steps_waited": max(drafts.turns_waited),
        "p95_ms": round(wait, 1),
        "final_step_ms": step,
        "met": turns <= 2,
    }


def shapes_of(arguments: argparse.Namespace) -> tuple[Shape, ...]:
    """The usual ones, and a longer one where it is asked for."""
    if arguments.longest is None:
        return SHAPES
    return (*SHAPES, {**LONG, "num_frames": arguments.longest})


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least so many percent of them do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


MEASURES = {
    "faults": measure_faults,
    "soak": measure_soak,
    "crowd": measure_crowd,
    "cancel": measure_cancel,
    "cuts": measure_cuts,
    "drafts": measure_drafts,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=MEASURES, nargs="+", help="all, unless told; with --url all but faults and cuts"
    )
    parser.add_argument("--url", help="gRPC address of a server that runs already")
    parser.add_argument("--pid", type=int, help="its tritonserver's process id")
    parser.add_argument("--gpu", action="store_true", help="tell GPU memory too")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--first", type=int, default=100, help="requests before memory is looked at first")
    parser.add_argument("--callers", type=int, default=8, help="of the soak")
    parser.add_argument(
        "--longest", type=int, metavar="FRAMES", help="one request in seven of soak and crowd is so long"
    )
    parser.add_argument("--crowd-seconds", type=float, default=120.0)
    parser.add_argument("--cancels", type=int, default=20, help="jobs cancelled, and streams cut")
    parser.add_argument("--drafts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--commit", help="of the measured tree, where it is no checkout")
    arguments = parser.parse_args()
    own = {"faults", "cuts"} if arguments.url else set()
    arguments.only = arguments.only or [name for name in MEASURES if name not in own]
    for name in own.intersection(arguments.only):
        parser.error(f"--only {name}: not on a server that runs already")
    if not 0 < arguments.first < arguments.requests:
        parser.error(f"--first {arguments.first}: must be 1 to {arguments.requests - 1}, fewer than --requests")
    return arguments


def current_commit() -> str:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return "not a checkout" if git.returncode else git.stdout.strip()


def main() -> None:
    arguments = parse()
    results = {name: MEASURES[name](arguments) for name in arguments.only}
    met = all(result["met"] for result in results.values())
    print(
        json.dumps(
            {
                "bench": "reliability",
                **results,
                "met": met,
                "processors": os.cpu_count(),
                "versions": versions(),
                "commit": arguments.commit or current_commit(),
            },
            ensure_ascii=False,
        )
    )
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
