"""GPU kernels for sparse-linear 8-bit video attention, each beside its PyTorch reference."""

from turbo_kernels.attention import attention_geometry, dense_attention, sla_attention
from turbo_kernels.block_map import BlockMap, block_map
from turbo_kernels.int8_linear import int8_linear, quantize_int8_blockwise
from turbo_kernels.linear_attention import linear_attention
from turbo_kernels.providers import default_provider
from turbo_kernels.rms_norm_rope import rms_norm_rope
from turbo_kernels.sage_attention import sage_attention
from turbo_kernels.self_check import SelfCheck, self_check
from turbo_kernels.sparse_attention import sparse_attention

__all__ = [
    "BlockMap",
    "SelfCheck",
    "attention_geometry",
    "block_map",
    "default_provider",
    "dense_attention",
    "int8_linear",
    "linear_attention",
    "quantize_int8_blockwise",
    "rms_norm_rope",
    "sage_attention",
    "self_check",
    "sla_attention",
    "sparse_attention",
]
