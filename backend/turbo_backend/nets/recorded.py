"""A network's forwards as CUDA graphs, one for each shape: a replay costs the host nothing.

A forward launches hundreds of kernels, which takes the host longer than a GPU needs for a few frames. The graph's
kernels are those of the plain forward, so the result is the same to the bit. Timestep, latents and text are read from
fixed memory; how long the text is, its kernels read off the device (`TextRows`), so a graph serves all prompts whose
kernel is the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from turbo_backend.memory import free_bytes
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import WanDiT, sinusoidal_embedding
from turbo_backend.nets.rope import rope_table
from turbo_backend.nets.text_context import LayerText, MadeContext, TextContext
from turbo_kernels.text_attention import TextRows, rows_compiled_for

#: Shapes whose graphs are kept, the least lately used one going first.
_MAX_RECORDINGS = 16
#: Scalars lie at addresses that kernels may take to be aligned, as in memory of their own.
_ALIGNED = 4

#: Shape of the latents, attention, most rows of the text.
_Key = tuple[torch.Size, AttentionSettings, int]


@dataclass(frozen=True, slots=True, eq=False)
class _Recording:
    """One shape: what to fill, what to replay, what to read. Without a graph it is run each time.

    Attributes:
        latents, sinusoids: arguments of `WanDiT.evaluate`.
        run: evaluates the network with them.
        out: [1, C, T, h, w] where the graph leaves its result.
    """

    latents: torch.Tensor
    sinusoids: torch.Tensor
    run: Callable[[], torch.Tensor]
    out: torch.Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class _TextMemory:
    """Where recorded forwards read the text from: any prompt's keys and values are copied to it."""

    def __init__(self, net: WanDiT) -> None:
        config, device = net.config, net.device
        shape = (config.num_layers, config.text_len, config.num_heads, config.head_dim)
        self._keys, self._values = (torch.zeros(shape, dtype=net.dtype, device=device) for _ in range(2))
        self._amax = torch.zeros(config.num_layers, _ALIGNED, device=device)
        self._rows = TextRows.of(1, device=device)
        layers = zip(self._keys, self._values, self._amax[:, 0], strict=True)
        self._layers = [LayerText(keys=keys, values=values, value_amax=amax) for keys, values, amax in layers]

    def fill(self, layers: list[LayerText], rows: TextRows) -> None:
        """Copies a prompt's."""
        count = rows.most
        torch._foreach_copy_([mine.keys[:count] for mine in self._layers], [theirs.keys for theirs in layers])
        torch._foreach_copy_([mine.values[:count] for mine in self._layers], [theirs.values for theirs in layers])
        torch._foreach_copy_([mine.value_amax for mine in self._layers], [theirs.value_amax for theirs in layers])
        self._rows.count.copy_(rows.count)
        self._rows.last_log2.copy_(rows.last_log2)

    def as_context(self, most: int) -> TextContext:
        """What lies there, for a forward that is recorded for texts of up to `most` rows."""
        return TextContext((MadeContext(self._layers, self._rows.allowing(most)),))


class RecordedForwards:
    """Evaluates a network for one sample at a time, from the second time of a shape on by its graph.

    Args:
        net: resident, its weights where they stay, run by the `triton` kernels.
        room: bytes of GPU memory that shall be free for other stages; where they are not, nothing is recorded.
    """

    def __init__(self, net: WanDiT, *, room: int = 0) -> None:
        self._net = net
        self._room = room
        self._recordings: OrderedDict[_Key, _Recording] = OrderedDict()
        self._text: _TextMemory | None = None

    @torch.inference_mode()
    def __call__(
        self, latents: torch.Tensor, timesteps: torch.Tensor, context: TextContext, *, attention: AttentionSettings
    ) -> torch.Tensor:
        """As the network's own forward, of a batch of one."""
        net = self._net
        (sample,) = context.samples
        text_len = net.config.text_len
        key = (latents.shape, attention, min(rows_compiled_for(sample.rows.most) or text_len, text_len))
        recording = self._recordings.get(key)
        if recording is None:
            velocity: torch.Tensor = net(latents, timesteps, context, attention=attention)
            if self._has_room():
                self._recordings[key] = self._record(*key)
                if len(self._recordings) > _MAX_RECORDINGS:
                    self._recordings.popitem(last=False)
            return velocity
        self._recordings.move_to_end(key)
        assert self._text is not None
        recording.latents.copy_(latents)
        recording.sinusoids.copy_(sinusoidal_embedding(timesteps, net.config.freq_dim), non_blocking=True)
        self._text.fill(net.read_text(sample), sample.rows)
        if recording.graph is None or recording.out is None:
            return recording.run()
        recording.graph.replay()
        return recording.out.clone()

    def clear(self) -> None:
        """Gives all graphs and their memory back."""
        self._recordings.clear()
        self._text = None

    def _has_room(self) -> bool:
        """Whether others have theirs; what this stage's cache holds counts as free, since the graph takes its place."""
        device = self._net.device
        return device.type != "cuda" or free_bytes(device) >= self._room

    def _record(self, shape: torch.Size, attention: AttentionSettings, most: int) -> _Recording:
        net, device = self._net, self._net.device
        if self._text is None:
            self._text = _TextMemory(net)
        latents = torch.zeros(shape, dtype=net.dtype, device=device)
        sinusoids = torch.zeros(1, net.config.freq_dim, device=device)
        context = self._text.as_context(most)
        rope = rope_table(net.patch_grid(shape), net.config.head_dim, device)

        def run() -> torch.Tensor:
            return net.evaluate(latents, sinusoids, context, attention=attention, rope=rope)

        if device.type != "cuda":
            return _Recording(latents, sinusoids, run)
        run()  # once with this memory: kernels are loaded, libraries have what they need
        graph = torch.cuda.CUDAGraph()
        # One pool for all: they run one after another, and of what lies in it only their results outlive a replay.
        others = [other.graph for other in self._recordings.values() if other.graph is not None]
        # Other threads draw noise into page-locked memory and copy meanwhile.
        with torch.cuda.graph(graph, pool=others[0].pool() if others else None, capture_error_mode="thread_local"):
            out = run()
        return _Recording(latents, sinusoids, run, out, graph)
