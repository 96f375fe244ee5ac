"""The UMT5 encoder as a GPU runs it: the formulas of `umt5.Block` in the fewest passes, recorded as CUDA graphs.

    norm                 rides on the addition of the branch before          (`residual_rms_norm`)
    q, k, v              one product
    attention            reads the bias by distance, from a table made once a length for all layers
                                                                             (`relative_attention`)
    gate, fc1            one product; GELU and the product with it in one kernel    (`gelu_gate`)

A short prompt is bound by reading 9.3 GB of weights (2.8 ms at 3.35 TB/s) and would be by launching 200 kernels: so
each padded length has its graph. A prompt is padded to a multiple of 32 tokens, which depends on nothing but its own
length. Padding is masked out as keys, and other rows of a product do not see it; beside the plain layers the products
may round differently, as they do between any two numbers of rows.

Shapes: S padded tokens, D model width, H heads, F width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from turbo_backend.memory import empty_gpu_cache, pack_together
from turbo_backend.quantization import Fp8Linear, LinearWeights, lay_side_by_side
from turbo_kernels import default_provider
from turbo_kernels.fp8_linear import Fp8Rows, quantize_fp8_rows
from turbo_kernels.gelu_gate import gelu_gate
from turbo_kernels.relative_attention import relative_attention
from turbo_kernels.residual_rms_norm import residual_rms_norm

if TYPE_CHECKING:
    from turbo_backend.nets.umt5 import Block, UMT5Encoder

#: Prompts are padded to a multiple of this many tokens.
PADDING = 32


@dataclass(frozen=True, slots=True, eq=False)
class _Recording:
    """One padded length: what to fill, what to replay, what to read. Without a graph it is run each time.

    Attributes:
        x, out: [S, D] embedded tokens, and what becomes of them.
        length: int32 [1] tokens before the padding.
        biases: [num_layers, H, 2 S - 1].
    """

    x: torch.Tensor
    length: torch.Tensor
    biases: torch.Tensor
    out: torch.Tensor
    graph: torch.cuda.CUDAGraph | None


class FusedEncoder:
    """Runs a `UMT5Encoder` whose weights stay where they are from now on.

    Args:
        encoder: its blocks' projections are laid side by side.
        provider: of the kernels; the device's default by default.
    """

    def __init__(self, encoder: UMT5Encoder, *, provider: str | None = None) -> None:
        self._encoder = encoder
        self._provider = provider or default_provider(encoder.device)
        self._blocks: list[Block] = list(encoder.blocks)  # type: ignore[arg-type]
        for block in self._blocks:
            lay_side_by_side(_projections(block))
            lay_side_by_side(_gate_and_up(block))
            empty_gpu_cache()  # else the separate weights' memory would pile up: as much again
        if encoder.device.type == "cuda":
            pack_together(encoder, encoder.device)
        self._recordings: dict[int, _Recording] = {}

    def record(self, max_tokens: int) -> None:
        """Makes ready for prompts of up to `max_tokens` tokens; for longer ones it is done when the first comes."""
        largest = -(-max_tokens // PADDING) * PADDING
        for size in range(largest, 0, -PADDING):  # shorter ones then find room in what longer ones have used
            self._recording(size)

    @torch.inference_mode()
    def __call__(self, token_ids_L: torch.Tensor) -> torch.Tensor:
        """int64 [L] on the CPU, within the vocabulary, to [L, D]; the next call writes over it."""
        num_tokens = len(token_ids_L)
        recording = self._recording(-(-num_tokens // PADDING) * PADDING)
        embedding = self._encoder.token_embedding
        recording.x[:num_tokens] = embedding(token_ids_L.to(embedding.weight.device))
        recording.length.fill_(num_tokens)
        if recording.graph is None:
            recording.out.copy_(self._run(recording))
        else:
            recording.graph.replay()
        return recording.out[:num_tokens]

    @torch.inference_mode()
    def _recording(self, size: int) -> _Recording:
        if size not in self._recordings:
            weight = self._encoder.norm.weight
            recording = _Recording(
                x=weight.new_zeros(size, len(weight)),
                length=torch.full((1,), size, dtype=torch.int32, device=weight.device),
                biases=self._encoder.bias_by_distance(size),
                out=weight.new_empty(size, len(weight)),
                graph=torch.cuda.CUDAGraph() if weight.is_cuda else None,
            )
            if recording.graph is not None:
                self._capture(recording, recording.graph)
            self._recordings[size] = recording
        return self._recordings[size]

    def _capture(self, recording: _Recording, graph: torch.cuda.CUDAGraph) -> None:
        self._run(recording)  # compiles the kernels and lets cuBLAS make its choices
        # One pool for all: they run one after another, and nothing in it outlives a replay.
        others = [other.graph for other in self._recordings.values() if other.graph is not None]
        with torch.cuda.graph(graph, pool=others[0].pool() if others else None):
            recording.out.copy_(self._run(recording))

    def _run(self, recording: _Recording) -> torch.Tensor:
        encoder, eps, provider = self._encoder, self._encoder.config.eps, self._provider
        x_SD = recording.x
        branch_SD: torch.Tensor | None = None
        for block, bias_HO in zip(self._blocks, recording.biases, strict=True):
            quantize = isinstance(block.attn.q, Fp8Linear)
            x_SD, h = residual_rms_norm(
                x_SD, branch_SD, block.norm1.weight, eps=eps, quantize=quantize, provider=provider
            )
            qkv = self._multiply(_projections(block), h)
            attended = relative_attention(qkv, bias_HO, recording.length, provider=provider)
            branch_SD = self._multiply([block.attn.o], attended)
            x_SD, h = residual_rms_norm(
                x_SD, branch_SD, block.norm2.weight, eps=eps, quantize=quantize, provider=provider
            )
            hidden = gelu_gate(self._multiply(_gate_and_up(block), h), quantize=quantize, provider=provider)
            branch_SD = self._multiply([block.ffn.fc2], hidden)
        _, out = residual_rms_norm(x_SD, branch_SD, encoder.norm.weight, eps=eps, provider=provider)
        assert isinstance(out, torch.Tensor)
        return out

    def _multiply(self, linears: Sequence[nn.Module], x: torch.Tensor | Fp8Rows) -> torch.Tensor:
        """The joint product of linears that lie side by side: [S, K] to [S, N]."""
        weights = LinearWeights.joined(linears)
        assert weights is not None
        if weights.weight.dtype == torch.float8_e4m3fn and isinstance(x, torch.Tensor):
            x = quantize_fp8_rows(x, provider=self._provider)
        one = Fp8Rows(x.values[None], x.scale[None]) if isinstance(x, Fp8Rows) else x[None]
        return weights.multiply(one, provider=self._provider)[0]


def _projections(block: Block) -> tuple[nn.Module, ...]:
    return block.attn.q, block.attn.k, block.attn.v


def _gate_and_up(block: Block) -> tuple[nn.Module, ...]:
    return block.ffn.gate[0], block.ffn.fc1
