"""Rows of `bench_gpu.py`: GPU memory of a request of 1.3B at 480p with everything that it needs resident.

One process holds the networks as one server does, in bf16, and runs them in turn; what counts is what the device says
is gone, the context included. memory-1.3B holds UMT5-xxl too, memory-1.3B-text-8bit with e4m3 linears, and
memory-1.3B-text-cpu leaves it on the CPU.

Gate: the parts are those of the other rows; here each must give finite numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from dit_rows import LATENT_SHAPES, TEXT_LENGTH, make_inputs, make_net
from gpu_rows import GIB, Row, Target, release_memory
from text_rows import draw_tokens, make_encoder
from vae_rows import random_vae

from turbo_backend.config import MODELS, TextEncoderConfig
from turbo_backend.nets.attention import AttentionSettings

MODEL = MODELS["Wan2.1-1.3B"]
TARGETS = {
    "memory-1.3B-text-cpu": Target(16, unit="GiB"),
    "memory-1.3B-text-8bit": Target(16, unit="GiB"),
    "memory-1.3B": Target(24, unit="GiB"),
}


def check() -> Row:
    latents, used = _run_request("memory-1.3B-text-cpu", num_latents=2)
    return {"finite": bool(latents.isfinite().all()), "passed": bool(latents.isfinite().all()) and used > 0}


def measure(names: Sequence[str], profiled: Sequence[str]) -> Iterator[Row]:
    for name in names:
        _, used = _run_request(name, num_latents=LATENT_SHAPES["480p"][0])
        yield TARGETS[name].row(name, used)


def _run_request(name: str, *, num_latents: int) -> tuple[torch.Tensor, float]:
    """Frames, and the GiB that the device has given away by the end: the allocator returns nothing by itself."""
    release_memory()
    encoder = None
    if not name.endswith("-text-cpu"):
        encoder = make_encoder(TextEncoderConfig(), torch.bfloat16, quantize=name.endswith("-8bit"))
    net = make_net(MODEL.dit, torch.bfloat16)
    net.prepare_for_inference()
    vae = random_vae().bfloat16()
    release_memory()  # what making random weights took
    latents, text, _ = make_inputs(net, (num_latents, *LATENT_SHAPES["480p"][1:]))
    if encoder is not None:
        text = encoder(draw_tokens(encoder.config, TEXT_LENGTH), [TEXT_LENGTH])
    context = net.prepare_context(text, [TEXT_LENGTH])
    attention = AttentionSettings(attention_type="sagesla", provider="triton")
    latents = net(latents, torch.tensor([932.0]), context, attention=attention)
    chunks = [chunk.isfinite().all() for chunk in vae.decode_chunks(latents)]
    free, total = torch.cuda.mem_get_info()
    return torch.stack(chunks), (total - free) / GIB
