"""Do requests give the same latents, bit for bit, alone and at once, and what does that cost on a GPU?

There each step of each request is a forward of its own, which the gate checks: requests of equal shape one after
another, then all of them at once. The cost is over one forward shared by all (`TURBO_BATCH_INVARIANT=false`); the row
says whether that gave the same bits too. Weights are random, times those of one step of all requests, medians. The last
stdout line is one JSON object; exit status 1 where the gate fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

import torch

from turbo_backend.errors import TurboError
from turbo_backend.manifest import device_name, versions
from turbo_backend.settings import Settings
from turbo_backend.stages.denoiser import DenoiserStage
from turbo_backend.stages.denoiser_request import DenoiseRequest
from turbo_backend.stages.loading import load_denoiser


def ask(settings: Settings, seed: int, num_frames: int, num_steps: int) -> DenoiseRequest:
    dit = settings.served_model.dit
    generator = torch.Generator().manual_seed(seed)
    return DenoiseRequest(
        text_embeddings=torch.randn(40 + seed, dit.text_dim, generator=generator),
        text_length=40 + seed,
        values={"SEED": seed, "NUM_FRAMES": num_frames, "NUM_STEPS": num_steps},
        report={"stages": {}},
    )


def run(stage: DenoiserStage, requests: Sequence[DenoiseRequest]) -> tuple[list[torch.Tensor], list[float], int]:
    """Latents, milliseconds of each step of the last request but the first, and how many requests shared them."""
    latents: dict[int, torch.Tensor] = {}
    for index, update in stage.denoise(requests):
        if isinstance(update, TurboError):
            raise update
        if update.latents is not None and update.report is not None:
            latents[index] = update.latents
            facts = update.report["stages"]["denoiser"]  # type: ignore[index]
    return [latents[index] for index in range(len(requests))], facts["step_milliseconds"][1:], facts["batch_size"]


def measure_alone(
    stage: DenoiserStage, requests: Sequence[DenoiseRequest], rounds: int
) -> tuple[list[torch.Tensor], float]:
    """The latents of each request alone, and the milliseconds of a step of all of them."""
    latents, milliseconds = [], 0.0
    for request in requests:
        run(stage, [request])  # compiles
        steps: list[float] = []
        for _ in range(rounds):
            (made,), more, _ = run(stage, [request])
            steps += more
        latents.append(made)
        milliseconds += statistics.median(steps)
    return latents, milliseconds


def measure_shared(
    stage: DenoiserStage, requests: Sequence[DenoiseRequest], rounds: int
) -> tuple[list[torch.Tensor], float, int]:
    """The latents of requests that share forwards, the milliseconds of a step of all, and how many shared one.

    What does not fit one forward takes several, one after another.
    """
    run(stage, requests)
    steps: list[float] = []
    for _ in range(rounds):
        latents, more, largest_forward = run(stage, requests)
        steps += more
    num_forwards = -(-len(requests) // largest_forward)
    return latents, num_forwards * statistics.median(steps), largest_forward


def current_commit() -> str:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return "not a checkout" if git.returncode else git.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--quant-linear", action="store_true")
    parser.add_argument("--record-forwards", action="store_true")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--together", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commit", help="of the measured tree, where it is no checkout")
    arguments = parser.parse_args()

    def load(*, batch_invariant: bool) -> tuple[DenoiserStage, Settings]:
        settings = Settings.from_environment(
            {
                "TURBO_MODEL": arguments.model,
                "TURBO_WEIGHTS": "random",
                "TURBO_QUANT_LINEAR": str(arguments.quant_linear).lower(),
                "TURBO_BATCH_INVARIANT": str(batch_invariant).lower(),
                "TURBO_RECORD_FORWARDS": str(arguments.record_forwards).lower(),
            }
        )
        return load_denoiser(settings), settings

    invariant, settings = load(batch_invariant=True)
    sharing, _ = load(batch_invariant=False)
    rows = []
    for num_frames in arguments.frames:
        for together in arguments.together:
            requests = [ask(settings, seed, num_frames, 4) for seed in range(1, together + 1)]
            alone, alone_ms = measure_alone(invariant, requests, arguments.rounds)
            at_once, _, _ = run(invariant, requests)
            shared, shared_ms, largest_forward = measure_shared(sharing, requests, arguments.rounds)
            rows.append(
                {
                    "frames": num_frames,
                    "requests": together,
                    "same_bits_at_once": all(map(torch.equal, alone, at_once)),
                    "largest_forward": largest_forward,
                    "alone_ms": round(alone_ms, 2),
                    "shared_ms": round(shared_ms, 2),
                    "cost_percent": round(100 * (alone_ms / shared_ms - 1), 1),
                    "same_bits_shared": all(map(torch.equal, alone, shared)),
                }
            )
            print("   ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    invariant.close()
    sharing.close()
    met = all(row["same_bits_at_once"] for row in rows)
    print(
        json.dumps(
            {
                "bench": "batch_invariance",
                "device": device_name(settings.device),
                "model": arguments.model,
                "quant_linear": arguments.quant_linear,
                "record_forwards": arguments.record_forwards,
                "rows": rows,
                "met": met,
                "versions": versions(),
                "commit": arguments.commit or current_commit(),
            }
        )
    )
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
