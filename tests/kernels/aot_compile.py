"""Compile every kernel for one GPU architecture without a GPU; run as `python aot_compile.py CAPABILITY...`.

In bf16 at head dimension 128, and the block geometry that the architecture is served with. The ops are called on
small CPU tensors with launching replaced by recording, so that what is compiled is exactly what the launchers ask
for (constants, warps, stages). Prints one JSON line an architecture:
{"capability": 90, "kernels": {name: [{"shared": bytes, "tensor_core": "wgmma", ...}]}}.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import turbo_kernels
from turbo_kernels import attention, providers

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


def start_recording() -> list[tuple[Any, dict, dict]]:
    """Has kernels recorded in place of launched from now on: (kernel, arguments by name, options) of each launch."""
    launches: list[tuple[Any, dict, dict]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        options = {name: named.pop(name) for name in list(named) if name not in self.arg_names}
        launches.append((self, named, options))

    JITFunction.run = record
    providers.INTERPRETED = True  # lets provider "triton" accept CPU tensors
    return launches


def record_launches(capability: int) -> list[tuple[Any, dict, dict]]:
    """(kernel, arguments by name, options) of every launch of every op."""
    launches = start_recording()
    fp8, descriptors = capability >= 89, capability >= 90
    sage_module = sys.modules["turbo_kernels.sage_attention"]  # the package's attribute of that name is the function
    sage_module.has_fp8 = lambda device: fp8
    sage_module.has_tile_descriptors = lambda device: descriptors
    for module in (sage_module, sys.modules["turbo_kernels.sparse_attention"], sys.modules["turbo_kernels.summary"]):
        module.is_hopper = lambda device: capability == 90

    dtype, head_dim = torch.bfloat16, 128
    q, k, v = (torch.zeros(1, 256, 2, head_dim, dtype=dtype) for _ in range(3))
    weight, bias = torch.zeros(head_dim, head_dim, dtype=dtype), torch.zeros(head_dim, dtype=dtype)
    int8_weight, scale = torch.zeros(128, 2 * head_dim, dtype=torch.int8), torch.zeros(1, head_dim // 64)
    geometry = (64, 128) if capability == 90 else (128, 64)
    attention.attention_geometry = lambda attention_type, device: geometry if attention_type == "sagesla" else (128, 64)
    for attention_type in ("sla", "sagesla"):
        turbo_kernels.sla_attention(q, k, v, weight, bias, attention_type=attention_type, topk=0.5, provider="triton")
    if fp8:
        attention.sagesla_attention_fp8(q, k, v, weight, bias, topk=0.5, provider="triton")
    turbo_kernels.block_map(q, k, block_q=128, block_k=64, topk=0.5, provider="triton")
    turbo_kernels.linear_attention(q, k, v, provider="triton")
    turbo_kernels.int8_linear(q.flatten(2), int8_weight, scale, None, provider="triton")
    return launches


def source_of(kernel: Any, named: dict[str, Any]) -> ASTSource:
    """What triton's own launcher would compile: types, constants, and alignment of what it may specialise on."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned = True
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
            aligned = False
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            aligned = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
            aligned = False
        if aligned and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_all(capability: int) -> dict[str, list[dict[str, Any]]]:
    """Compile each distinct kernel; report shared memory and the tensor-core instruction in its PTX."""
    report: dict[str, list[dict[str, Any]]] = {}
    seen = set()
    for kernel, named, options in record_launches(capability):
        source = source_of(kernel, named)
        key = (kernel.__name__, str(source.signature), str(source.constants), str(options))
        if key in seen:
            continue
        seen.add(key)
        options = {
            name: value
            for name, value in options.items()
            if name in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
        }
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        instructions = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
        report.setdefault(kernel.__name__, []).append(
            {
                "shared": compiled.metadata.shared,
                "tensor_core": instructions.group(0) if instructions else None,
                "cubin": len(compiled.asm["cubin"]),
                "constants": {kernel.arg_names[index]: value for (index,), value in source.constants.items()},
            }
        )
    return report


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps({"capability": int(argument), "kernels": compile_all(int(argument))}), flush=True)
