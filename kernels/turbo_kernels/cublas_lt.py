"""The one product that PyTorch does not offer: cuBLASLt's e4m3 GEMM with bias, GELU and e4m3 output in its epilogue.

    y8 = e4m3(GELU(x_scale * w_scale * x8 w8^T + bias) * y_inverse)         GELU in its tanh form, scales scalar

`libcublasLt` is the one that PyTorch has loaded already; its C interface is called through ctypes, so nothing is built.
Constants are those of cublasLt.h (CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

_COMPUTE_32F = 68
_R_32F, _R_16BF, _R_8F_E4M3 = 0, 14, 28
_TRANSA, _EPILOGUE, _BIAS_POINTER = 3, 7, 8
_A_SCALE_POINTER, _B_SCALE_POINTER, _D_SCALE_POINTER = 17, 18, 20
_FAST_ACCUM, _BIAS_DATA_TYPE = 25, 26
_EPILOGUE_GELU_BIAS = 36
_MAX_WORKSPACE_BYTES = 1
_WORKSPACE_BYTES = 32 << 20


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@cache
def _library() -> ctypes.CDLL:
    major = (torch.version.cuda or "none").partition(".")[0]
    return ctypes.CDLL(f"libcublasLt.so.{major}")


@cache
def _handle(device_index: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device_index):
        _call("cublasLtCreate", ctypes.byref(handle))
    return handle


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with status {status}")


class _Description:
    """Operation and layouts of one product, let go with it: they are cheap, and sharing them would take a lock."""

    def __init__(self, N: int, L: int, K: int) -> None:
        self.operation = ctypes.c_void_p()
        _call("cublasLtMatmulDescCreate", ctypes.byref(self.operation), _COMPUTE_32F, _R_32F)
        # cuBLAS counts by columns: y^T [N, L] = w [K, N]^T x [K, L].
        self.weight, self.x = self._layout(_R_8F_E4M3, K, N), self._layout(_R_8F_E4M3, K, L)
        self.c, self.y = self._layout(_R_16BF, N, L), self._layout(_R_8F_E4M3, N, L)

    @staticmethod
    def _layout(dtype: int, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        sizes = ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)
        _call("cublasLtMatrixLayoutCreate", ctypes.byref(layout), dtype, *sizes)
        return layout

    def set(self, attribute: int, value: Any) -> None:
        _call(
            "cublasLtMatmulDescSetAttribute", self.operation, attribute, ctypes.byref(value),
            ctypes.c_size_t(ctypes.sizeof(value)),
        )  # fmt: skip

    def __del__(self) -> None:
        _library().cublasLtMatmulDescDestroy(self.operation)
        for layout in (self.weight, self.x, self.c, self.y):
            _library().cublasLtMatrixLayoutDestroy(layout)


_algorithms: dict[tuple[int, int, int, int], _Heuristic] = {}


def _algorithm(description: _Description, device_index: int, shape: tuple[int, int, int]) -> _Heuristic:
    """cuBLAS's first choice for a shape, asked once: the same shape always runs the same kernel."""
    key = (device_index, *shape)
    if key not in _algorithms:
        preference, found = ctypes.c_void_p(), ctypes.c_int(0)
        _call("cublasLtMatmulPreferenceCreate", ctypes.byref(preference))
        limit, heuristic = ctypes.c_size_t(_WORKSPACE_BYTES), _Heuristic()
        try:
            _call(
                "cublasLtMatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE_BYTES, ctypes.byref(limit),
                ctypes.c_size_t(8),
            )  # fmt: skip
            _call(
                "cublasLtMatmulAlgoGetHeuristic", _handle(device_index), description.operation, description.weight,
                description.x, description.c, description.y, preference, 1, ctypes.byref(heuristic),
                ctypes.byref(found),
            )  # fmt: skip
        finally:
            _library().cublasLtMatmulPreferenceDestroy(preference)
        if not found.value:
            raise RuntimeError("cuBLASLt has no e4m3 product with GELU for this shape")
        _algorithms[key] = heuristic
    return _algorithms[key]


def gelu_product_fp8(
    x8_LK: torch.Tensor,
    x_scale: torch.Tensor,
    w8_NK: torch.Tensor,
    w_scale: torch.Tensor,
    bias_N: torch.Tensor,
    y_inverse: torch.Tensor,
) -> torch.Tensor:
    """The formula above on one sample, on the current stream; returns e4m3 [L, N].

    Args:
        x8_LK, w8_NK: e4m3, contiguous, on one GPU.
        x_scale, w_scale, y_inverse: one fp32 value each, on that GPU.
        bias_N: bf16.

    Raises:
        RuntimeError: cuBLASLt refuses.
    """
    (L, K), N = x8_LK.shape, w8_NK.shape[0]
    index = x8_LK.device.index
    with torch.cuda.device(index):
        y8 = torch.empty(L, N, dtype=torch.float8_e4m3fn, device=x8_LK.device)
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=x8_LK.device)
        description = _Description(N, L, K)
        description.set(_TRANSA, ctypes.c_int32(1))
        description.set(_EPILOGUE, ctypes.c_int32(_EPILOGUE_GELU_BIAS))
        description.set(_BIAS_POINTER, ctypes.c_uint64(bias_N.data_ptr()))
        description.set(_BIAS_DATA_TYPE, ctypes.c_int32(_R_16BF))
        description.set(_A_SCALE_POINTER, ctypes.c_uint64(w_scale.data_ptr()))
        description.set(_B_SCALE_POINTER, ctypes.c_uint64(x_scale.data_ptr()))
        description.set(_D_SCALE_POINTER, ctypes.c_uint64(y_inverse.data_ptr()))
        description.set(_FAST_ACCUM, ctypes.c_int8(1))
        heuristic = _algorithm(description, index, (N, L, K))
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        _call(
            "cublasLtMatmul", _handle(index), description.operation, ctypes.byref(one),
            ctypes.c_void_p(w8_NK.data_ptr()), description.weight, ctypes.c_void_p(x8_LK.data_ptr()), description.x,
            ctypes.byref(zero), None, description.c, ctypes.c_void_p(y8.data_ptr()), description.y,
            ctypes.byref(heuristic.algo), ctypes.c_void_p(workspace.data_ptr()), ctypes.c_size_t(_WORKSPACE_BYTES),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
    return y8
