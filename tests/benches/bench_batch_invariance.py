"""What it costs that requests do not share forwards, which on a GPU makes their bits independent of each other.

Equal shapes run one after another and together in one forward; the time of a step for all of them, medians. Says
whether both gave the same bits. Weights are random. The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
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


def run(stage: DenoiserStage, requests: Sequence[DenoiseRequest]) -> tuple[list[torch.Tensor], float, int]:
    """Latents, milliseconds of a step (the median, without the first), and how many requests shared it."""
    latents: dict[int, torch.Tensor] = {}
    for index, update in stage.denoise(requests):
        if isinstance(update, TurboError):
            raise update
        if update.latents is not None and update.report is not None:
            latents[index] = update.latents
            facts = update.report["stages"]["denoiser"]  # type: ignore[index]
    milliseconds = statistics.median(facts["step_milliseconds"][1:])
    return [latents[index] for index in range(len(requests))], milliseconds, facts["batch_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--quant-linear", action="store_true")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--together", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    settings = Settings.from_environment(
        {
            "TURBO_MODEL": arguments.model,
            "TURBO_WEIGHTS": "random",
            "TURBO_QUANT_LINEAR": str(arguments.quant_linear).lower(),
            "TURBO_BATCH_INVARIANT": "false",
        }
    )
    stage = load_denoiser(settings)
    rows = []
    for num_frames in arguments.frames:
        for together in arguments.together:
            requests = [ask(settings, seed, num_frames, 4) for seed in range(1, together + 1)]
            for _ in range(2):  # the first round compiles
                alone = [run(stage, [request]) for request in requests]
                shared, shared_ms, batch_size = run(stage, requests)
            alone_ms = sum(milliseconds for _, milliseconds, _ in alone)
            same = all(torch.equal(one, other) for ((one,), _, _), other in zip(alone, shared, strict=True))
            rows.append(
                {
                    "frames": num_frames,
                    "requests": together,
                    "largest_forward": batch_size,
                    "alone_ms": round(alone_ms, 2),
                    "shared_ms": round(shared_ms, 2),
                    "cost_percent": round(100 * (alone_ms / shared_ms - 1), 1),
                    "same_bits": same,
                }
            )
            print("   ".join(f"{name} {value}" for name, value in rows[-1].items()))
    stage.close()
    facts = {"device": device_name(settings.device), "model": arguments.model, "quant_linear": arguments.quant_linear}
    print(json.dumps({"bench": "batch_invariance", **facts, "versions": versions(), "rows": rows}))


if __name__ == "__main__":
    main()
