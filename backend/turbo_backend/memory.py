"""Memory: what a request will need beside weights, what is free, and out-of-memory errors told apart."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import torch
from torch import nn

from turbo_backend.config import DiTConfig, TextEncoderConfig, VAEConfig
from turbo_backend.errors import ResourceExhausted, TurboError
from turbo_backend.parameters import GenerationParameters
from turbo_kernels import attention_geometry

_log = logging.getLogger(__name__)

#: In messages of RuntimeError. The last two are oneDNN's; a convolution that it cannot do at all fails to give a
#: "primitive descriptor" instead.
_OUT_OF_MEMORY = re.compile("can't allocate memory|bad_alloc|could not create a (memory object|primitive)$")
#: What the reference provider takes however short the video is: buffers of the matrix library.
_REFERENCE_FIXED_BYTES = 16 << 20
#: Of each GPU, as `plan_with_gpu_memory` was told; 0 for all.
_gpu_capacity = 0


def denoiser_bytes(
    config: DiTConfig, parameters: GenerationParameters, dtype: torch.dtype, *, provider: str, device: torch.device
) -> int:
    """Workspace of one denoising step, in bytes (weights not counted).

    With kernels, a block's live tensors at its widest point: 10.1 to 11 times `[L, D]` in self-attention were measured
    (the residual stream, its norm, q, k, v, their forms for the kernel, the output), 10.5 are counted; or the stream,
    its norm, the output and the FFN's activations of `[L, ffn_dim]`. Then the table of rotations. The `reference`
    provider computes in fp32 whatever the dtype, and keeps each step of its formulas: 19 (`original`) to 28
    (`sagesla`) times `[L, D]` were measured, 32 are counted. Its `sla` also holds, for one head, the scores of all
    queries four times and the selected keys and values of every query block. Then the state in float64 and the noise
    in float32.
    """
    tokens = parameters.num_tokens
    t, h, w = parameters.latent_shape
    state = 5 * config.out_channels * t * h * w * 8
    if provider != "reference":
        rotations = tokens * config.head_dim * 4
        return (
            int(tokens * max(10.5 * config.dim, 3 * config.dim + config.ffn_dim) * dtype.itemsize) + rotations + state
        )
    widest = max(32 * config.dim, 8 * config.dim + 3 * config.ffn_dim)
    workspace = tokens * widest * 4 + _REFERENCE_FIXED_BYTES
    if parameters.attention_type == "sla":
        block_q, block_k = attention_geometry("sla", device)
        keys = block_k * max(1, math.ceil(parameters.sla_topk * math.ceil(tokens / block_k)))
        workspace += 4 * keys * (4 * tokens + 2 * config.head_dim * math.ceil(tokens / block_q))
    return workspace + state


def decoder_bytes(
    config: VAEConfig, parameters: GenerationParameters, dtype: torch.dtype, *, device: torch.device
) -> int:
    """Workspace of decoding one video chunk by chunk, in bytes: convolution caches, the widest chunk, the frames.

    On a GPU 19.1 chunks were measured at 480p and at 720p; frames leave it as they are made. On the CPU, oneDNN keeps
    reordered fp32 copies of what it convolves, whatever the dtype, and frames that pass between large buffers keep the
    allocator from giving memory back: 20 chunks, and each frame's bytes six times, are above all that was measured (16
    to 19 chunks, 2 to 6 times).
    """
    pixels = parameters.width * parameters.height
    frames = parameters.num_frames * pixels * 3
    chunk = 4 * pixels * config.base_dim
    if device.type == "cpu":
        return 20 * chunk * 4 + 6 * frames
    return int(19.1 * chunk * dtype.itemsize)


def encoder_bytes(config: VAEConfig, parameters: GenerationParameters, *, device: torch.device) -> int:
    """Workspace of encoding one image's video in float32, in bytes: the video, convolution caches, the widest chunk.

    An estimate from shapes: half of what decoding holds, whose upper stages are wider.
    """
    pixels = parameters.width * parameters.height
    chunk = 4 * pixels * config.base_dim * 4
    return (20 if device.type == "cpu" else 8) * chunk + parameters.num_frames * pixels * 3 * 4


def text_encoder_bytes(config: TextEncoderConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Workspace of encoding one prompt, in bytes: attention scores in float32, and a block's activations."""
    scores = 3 * config.num_heads * num_tokens * num_tokens * 4
    return scores + num_tokens * (4 * config.dim_ffn + 8 * config.dim) * dtype.itemsize


def plan_with_gpu_memory(capacity: int) -> None:
    """Has this process take every GPU for one of so many bytes, in use by whom it may be; 0 for what it is."""
    global _gpu_capacity
    _gpu_capacity = capacity


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """Free bytes and all bytes of a GPU, of those that are planned with."""
    free, total = torch.cuda.mem_get_info(device)
    capacity = min(_gpu_capacity or total, total)
    return max(0, free - (total - capacity)), capacity


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation can have: free on the GPU plus what PyTorch's cache holds unused, or free RAM."""
    if device.type == "cuda":
        free, _ = gpu_memory(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise TurboError("/proc/meminfo has no MemAvailable line")


class FreeMemory:
    """What requests may count on.

    On a GPU the most that was ever free when looked at since serving began: other stages' weights stay, and what they
    take to work comes back, so that a request is not refused because another one is being decoded. Should another
    program have taken memory since, the stage that lacks it says so. On a CPU, where running out ends the process, what
    was free when last looked at.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begin()

    def begin(self) -> None:
        """Forgets what was seen while other stages were loading."""
        self._last = self._most = 0

    def look(self) -> int:
        """Looks while none of this stage's own work runs, whose workspace would be missing."""
        self._last = free_bytes(self._device)
        self._most = max(self._most, self._last)
        return self.bytes

    @property
    def bytes(self) -> int:
        """What may be counted on, by what was seen."""
        return self._most if self._device.type == "cuda" else self._last


def pack_together(module: nn.Module, device: torch.device) -> None:
    """Moves a network's tensors off a device and back in order, so that no gaps are left between them.

    Tensors that are quantised or laid side by side one by one leave gaps that are too small to be given back. Those
    that share memory still do, and those that are elsewhere stay as they are.
    """
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.device == device]
    places = [(tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride()) for tensor in tensors]

    def move(where: str | torch.device) -> None:
        moved: dict[int, torch.Tensor] = {}
        for tensor, (memory, offset, stride) in zip(tensors, places, strict=True):
            if memory not in moved:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
                moved[memory] = whole.to(where, copy=True)
            empty = torch.empty(0, dtype=tensor.dtype, device=where)
            tensor.data = empty.set_(moved[memory].untyped_storage(), offset, tensor.shape, stride)

    move("cpu")
    settle_gpu(device)
    move(device)


def empty_gpu_cache() -> None:
    """Gives back what PyTorch's caches of all GPUs hold unused, once this process's kernels on them are through.

    A GPU that is not the current one is not waited for by itself: its memory went while kernels read it.
    """
    for index in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(index):
            torch.cuda.synchronize(index)
    torch.cuda.empty_cache()


def settle_gpu(device: torch.device) -> None:
    """Gives back what loading left in PyTorch's cache, and lets `gpu_peak` count from here."""
    if device.type == "cuda":
        empty_gpu_cache()
        torch.cuda.reset_peak_memory_stats(device)


def release_workspace(device: torch.device, *, room: int) -> None:
    """Gives PyTorch's cache of free GPU memory back, for the other stages' processes; call it between requests.

    The next request would have to take it again, 40 to 60 ms of a decode at 480p: so it is kept where others have room.

    Args:
        device: a GPU whose cache it is; on a CPU nothing is done.
        room: bytes that shall be free for others, the cache not counted.
    """
    if device.type == "cuda" and gpu_memory(device)[0] < room:
        empty_gpu_cache()


def gpu_peak() -> dict[str, int]:
    """Of this process for a stage's report: most bytes of tensors, and of PyTorch's cache of them; empty without GPU.

    A CUDA context comes on top (`planner.CONTEXT_BYTES`).
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    devices = range(torch.cuda.device_count())
    return {
        "gpu_peak_bytes": sum(torch.cuda.max_memory_allocated(device) for device in devices),
        "gpu_reserved_bytes": sum(torch.cuda.max_memory_reserved(device) for device in devices),
    }


def as_turbo_error(error: Exception, stage: str) -> TurboError:
    """The error a caller is told: ours as they are, out of memory by name, anything else INTERNAL and logged."""
    if isinstance(error, ResourceExhausted):
        return error
    if _is_out_of_memory(error) or (isinstance(error, TurboError) and _is_out_of_memory(error.__cause__)):
        if torch.cuda.is_available():
            empty_gpu_cache()
        _log.warning("%s ran out of memory: %s", stage, error)
        return ResourceExhausted(f"{stage} ran out of memory; ask for fewer frames or a lower resolution")
    if isinstance(error, TurboError):
        return error
    _log.error("%s failed", stage, exc_info=error)
    return TurboError(f"{stage} failed: {type(error).__name__}: {error}")


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: as Python, CUDA, PyTorch's allocator or oneDNN put it."""
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError)
