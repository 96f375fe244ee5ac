"""Compile the kernels of the video VAE for one architecture without a GPU, as `aot_compile.py` does."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import aot_compile
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from turbo_kernels import conv3d, norm_silu, upsample_conv

#: H, W, C_in, C_out, frames; residual, norm, output: the heaviest of each tiling at 480p, and one of the tiny model.
CONVOLUTIONS = (
    (120, 208, 384, 384, 2, True, True, True),
    (480, 832, 96, 96, 4, True, True, True),
    (480, 832, 96, 3, 4, False, False, True),
    (144, 256, 16, 16, 4, True, True, True),
)
UPSAMPLINGS = ((60, 104, 384, 192), (72, 128, 32, 16))


def record_launches(capability: int) -> list[tuple[Any, dict, dict]]:
    """(kernel, arguments by name, options) of every launch."""
    launches = aot_compile.start_recording()

    def frames(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16)

    large = capability in (80, 90, 100)
    conv3d.has_large_shared_memory = upsample_conv.has_large_shared_memory = lambda x: large
    for H, W, C, N, T, residual, norm, keep in CONVOLUTIONS:
        conv3d.causal_conv3d(
            frames(T + 2, H, W, C),
            conv3d.conv_weights(frames(N, C, 3, 3, 3), torch.empty(N)),
            first=0,
            num_frames=T,
            residual_THWC=frames(T, H, W, N) if residual else None,
            gamma_C=torch.empty(N) if norm else None,
            keep_output=keep,
            norm_out_RHWC=frames(T + 2, H, W, N) if norm else None,
            provider="triton",
        )
    for H, W, C, N in UPSAMPLINGS:
        upsample_conv.upsample_conv(
            frames(2, H, W, C),
            upsample_conv.upsample_weights(frames(N, C, 3, 3), torch.empty(N)),
            gamma_C=torch.empty(N),
            norm_out_RHWC=frames(4, 2 * H, 2 * W, N),
            provider="triton",
        )
    norm_silu.norm_silu(frames(1, 2, 2, 96), torch.empty(96), provider="triton")
    return launches


def source_of(kernel: Any, named: dict[str, Any]) -> ASTSource:
    """As `aot_compile.source_of`, with tensor descriptors."""
    plain = {name: None if isinstance(value, TensorDescriptor) else value for name, value in named.items()}
    for parameter in kernel.params:
        if plain[parameter.name] is None:
            plain[parameter.name] = torch.empty(0, dtype=torch.bfloat16)
    source = aot_compile.source_of(kernel, plain)
    for i, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            source.signature[parameter.name] = f"tensordesc<{aot_compile.TYPES[value.base.dtype]}[{block}]>"
            source.attrs.pop((i,), None)
    return ASTSource(kernel, source.signature, source.constants, source.attrs)


def compile_all(capability: int) -> dict[str, list[dict[str, Any]]]:
    """Compile each distinct kernel; report shared memory and the tensor-core instruction in its PTX."""
    report: dict[str, list[dict[str, Any]]] = {}
    seen = set()
    for kernel, named, options in record_launches(capability):
        source = source_of(kernel, named)
        options = {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in options}
        key = (kernel.__name__, str(source.signature), str(source.constants), str(options))
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        instructions = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
        report.setdefault(kernel.__name__, []).append(
            {
                "shared": compiled.metadata.shared,
                "tensor_core": instructions.group(0) if instructions else None,
                "cubin": len(compiled.asm["cubin"]),
            }
        )
    return report


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps({"capability": int(argument), "kernels": compile_all(int(argument))}), flush=True)
