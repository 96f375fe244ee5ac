"""Decode of the Wan VAE on one GPU: accuracy and streaming first, then times. Prints a table, then one line of JSON.

    python tests/benches/bench_vae_gpu.py [--sizes 480p 720p] [--frames 81] [--chunks 1 4] [--plain] [--profile]

Random weights of the published shapes. `error` is the RMS difference to the fp32 decode (TF32 off) over that of plain
PyTorch in bf16 (the same layers through cuDNN and unfused norms). Exits with 1, without times, if a gate fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from turbo_backend.config import VAEConfig
from turbo_backend.nets import vae_layers
from turbo_backend.nets.vae import WanVAE
from turbo_backend.video import to_uint8

SIZES = {"480p": (60, 104), "720p": (90, 160)}
TARGETS = {"480p": 620.0, "720p": 1450.0}
LARGEST_ERROR_RATIO = 1.5


def random_vae() -> WanVAE:
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = WanVAE(VAEConfig())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    return net


def random_latents(num_latents: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, 16, num_latents, *size, device="cuda", generator=generator)


def plain_decode(net: WanVAE, latents: Tensor) -> Tensor:
    """The layers as they are, through PyTorch alone."""

    def norm_silu(x_THWC: Tensor, gamma: Tensor, *, out: Tensor | None = None) -> Tensor:
        return F.silu(vae_layers.rms_norm(x_THWC, gamma, out=out), inplace=True)

    with (
        mock.patch.object(vae_layers, "norm_silu", norm_silu),
        mock.patch.object(net, "_decoder_for", return_value=net.decoder),
    ):
        return net.decode(latents)


def rms_error(frames: Tensor, exact: Tensor) -> float:
    return float((frames.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def check(exact_net: WanVAE, net: WanVAE, size: tuple[int, int], num_latents: int) -> dict[str, float | bool]:
    latents = random_latents(num_latents, size)
    exact = plain_decode(exact_net, latents)
    plain = rms_error(plain_decode(net, latents), exact)
    frames = net.decode(latents)
    error = rms_error(frames, exact)
    del exact
    other = net.decode_chunks(random_latents(num_latents, size, seed=2))
    chunks = []
    for chunk in net.decode_chunks(latents):
        next(other)
        chunks.append(chunk)
    streamed = torch.equal(torch.cat(chunks, dim=2), frames)
    passed = error <= LARGEST_ERROR_RATIO * plain and streamed
    return {"error": error, "plain_error": plain, "ratio": error / plain, "streamed": streamed, "passed": passed}


def time_ms(run: Callable[[], object], repeats: int) -> float:
    times = []
    for i in range(repeats + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def to_host(net: WanVAE, latents: Tensor, chunk_latents: int) -> None:
    """As a stage does: each chunk to uint8 in pinned memory."""
    for chunk in net.decode_chunks(latents, chunk_latents=chunk_latents):
        frames = to_uint8(chunk)
        host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(frames, non_blocking=True)


def profile(net: WanVAE, latents: Tensor, chunk_latents: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        net.decode(latents, chunk_latents=chunk_latents)
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:24]
    for row in rows:
        print(f"{row.self_device_time_total / 1000:8.2f} ms {row.count:6d}  {row.key[:110]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="time plain PyTorch too")
    parser.add_argument("--profile", action="store_true", help="print the longest kernels at the first size")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    exact_net = random_vae()
    net = deepcopy(exact_net).bfloat16()
    gates = {"ragged": check(exact_net, net, (9, 13), 3), "480p": check(exact_net, net, SIZES["480p"], 3)}
    print(json.dumps(gates), file=sys.stderr)
    if not all(gate["passed"] for gate in gates.values()):
        return 1
    del exact_net
    num_latents = (arguments.frames - 1) // 4 + 1
    rows: list[dict[str, object]] = []
    for size in arguments.sizes:
        latents = random_latents(num_latents, SIZES[size])
        runs = {f"decode, chunk_latents {n}": partial(net.decode, latents, chunk_latents=n) for n in arguments.chunks}
        first = arguments.chunks[0]
        runs[f"uint8 on the host, chunk_latents {first}"] = partial(to_host, net, latents, first)
        if arguments.plain:
            runs["plain PyTorch decode"] = partial(plain_decode, net, latents)
        for name, run in runs.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            value = time_ms(run, arguments.repeats)
            peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append(
                {
                    "name": f"VAE {size} {name}", "value": round(value, 1), "unit": "ms", "target": TARGETS[size],
                    "met": value <= TARGETS[size], "peak_gib": round(peak, 2),
                }
            )  # fmt: skip
            print(
                f"{rows[-1]['name']:48s} {value:8.1f} ms  target {TARGETS[size]:.0f}  peak {peak:.2f} GiB", flush=True
            )
        if arguments.profile and size == arguments.sizes[0]:
            profile(net, latents, arguments.chunks[0])
    device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({**device, "gates": gates, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
