"""The optional package spas_sage_attn (SpargeAttn) as a provider of `sagesla`'s sparse branch.

Its CUDA extension is built for one GPU architecture and fixes the block geometry: 64 x 128 on Hopper, 128 x 64
elsewhere. It launches on CUDA's legacy default stream, so a caller on another stream is synchronised here.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from turbo_kernels.block_map import BlockMap, num_blocks

_INSTALL = (
    "provider 'spargeattn' needs the package spas_sage_attn, which must be built on this machine for its GPU "
    "(CUDA toolkit 12.4 or later): "
    "pip install --no-build-isolation git+https://github.com/thu-ml/SpargeAttn.git"
)
#: Upstream pads transposed values to this many keys on every architecture.
_VALUE_PADDING = 128
_V_MAX = 2.25
_SKIP_NOTHING = 1e6


def load_spargeattn() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Import spas_sage_attn's (attention kernels, fused helpers, quantisation helpers).

    Raises:
        ValueError: not installed, or its extension does not load; says how to install it.
    """
    try:
        return (
            importlib.import_module("spas_sage_attn._qattn"),
            importlib.import_module("spas_sage_attn._fused"),
            importlib.import_module("spas_sage_attn.utils"),
        )
    except ImportError as error:
        raise ValueError(f"{_INSTALL} ({error})") from error


def sage_attention_spargeattn(
    q_BLHD: torch.Tensor, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor, block_map: BlockMap
) -> torch.Tensor:
    """SpargeAttn's int8 QK, 8-bit PV attention over the blocks of `block_map`; returns [B, L, H, D] in q's dtype.

    Raises:
        ValueError: the package is missing, or the block geometry or dtype is not one it was built for.
    """
    attention, fused, quantization = load_spargeattn()
    B, L, H, D = q_BLHD.shape
    device = q_BLHD.device
    capability = torch.cuda.get_device_capability(device)
    geometry = (64, 128) if capability == (9, 0) else (128, 64)
    if (block_map.block_q, block_map.block_k) != geometry:
        raise ValueError(f"spargeattn on {device} takes {geometry} blocks, not {block_map.block_q, block_map.block_k}")
    if q_BLHD.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"spargeattn takes bfloat16 or float16, not {q_BLHD.dtype}")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BLHD, k_BLHD, v_BLHD))  # [B, H, L, D]
    chosen = torch.zeros(B, H, num_blocks(L, geometry[0]), num_blocks(L, geometry[1]), dtype=torch.int32, device=device)
    chosen.scatter_(-1, block_map.indices.long(), 1)
    stream = torch.cuda.current_stream(device)
    legacy = torch.cuda.default_stream(device)
    legacy.wait_stream(stream)
    with torch.cuda.device(device), torch.cuda.stream(legacy):
        q8, q_scale, k8, k_scale = quantization.get_vanilla_qk_quant(q, k, k.mean(-2, keepdim=True), *geometry)
        table, counts = quantization.block_map_lut_triton(chosen)
        # tensor layout [B, H, L, D], not causal, one scale a block
        flags = (1, False, 1, D**-0.5)
        never_skip = torch.full((H,), _SKIP_NOTHING, dtype=torch.float32, device=device)
        if capability < (8, 9):
            out = torch.empty(q.shape, dtype=torch.float16, device=device)
            attention.qk_int8_sv_f16_accum_f16_block_sparse_attn_inst_buf_with_pv_threshold(
                q8, k8, v.half(), out, table, counts, never_skip, q_scale, k_scale, *flags, 0
            )
        else:
            out = torch.empty_like(q)
            padded = num_blocks(L, _VALUE_PADDING) * _VALUE_PADDING
            v_transposed = torch.empty(B, H, D, padded, dtype=v.dtype, device=device)
            v8 = torch.empty(v_transposed.shape, dtype=torch.float8_e4m3fn, device=device)
            v_scale = torch.empty(B, H, D, dtype=torch.float32, device=device)
            fused.transpose_pad_permute_cuda(v, v_transposed, 1)
            fused.scale_fuse_quant_cuda(v_transposed, v8, v_scale, L, _V_MAX, 1)
            if capability == (9, 0):
                attention.qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_sm90(
                    q8, k8, v8, out, table, counts, q_scale, k_scale, v_scale, *flags
                )
            else:
                attention.qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold(
                    q8, k8, v8, out, table, counts, never_skip, q_scale, k_scale, v_scale, *flags, 0
                )
    stream.wait_stream(legacy)
    return out.transpose(1, 2).to(q_BLHD.dtype)
