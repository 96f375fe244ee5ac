"""Prompts as cross-attention reads them: keys and values of every layer, the same at each step.

Shapes: H heads, D channels of a head, M = H * D channels of the model, S text rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import torch

from turbo_kernels.text_attention import TextRows


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerText:
    """One prompt as the cross-attention of one layer reads it.

    Attributes:
        keys, values: [S, H, D].
        value_amax: float32 scalar, largest magnitude of the values, which bounds the output.
    """

    keys: torch.Tensor
    values: torch.Tensor
    value_amax: torch.Tensor


class ProjectContext(Protocol):
    """A layer's keys and values of embedded text [S, M]; `provider` is that of linears and norms."""

    def __call__(self, context_SM: torch.Tensor, *, provider: str) -> LayerText: ...


class SampleContext(Protocol):
    """One prompt."""

    @property
    def rows(self) -> TextRows:
        """How many there are, on the device."""
        ...

    def read(self, layer: int, project: ProjectContext) -> LayerText:
        """What a layer reads of the prompt; `project` is that layer's."""
        ...


@dataclass(slots=True, eq=False)
class PromptContext:
    """A prompt, embedded; each layer's keys and values are made when it first reads them, and kept.

    So a GPU works on the first blocks while the host still launches what the text needs in later ones.

    Attributes:
        embedded: [S, M], the prompt's rows, and one of padding if there is any.
        num_padding: how many equal padding rows the last row stands for; 0 if the prompt fills the text length.
        provider: of the linears and norms that make keys and values.
        rows: S and `num_padding` on the device.
    """

    embedded: torch.Tensor
    num_padding: int
    provider: str
    rows: TextRows = field(init=False)
    _layers: dict[int, LayerText] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = TextRows.of(len(self.embedded), last_count=max(self.num_padding, 1), device=self.embedded.device)

    def read(self, layer: int, project: ProjectContext) -> LayerText:
        """As `SampleContext` says."""
        if layer not in self._layers:
            self._layers[layer] = project(self.embedded, provider=self.provider)
        return self._layers[layer]


@dataclass(frozen=True, slots=True, eq=False)
class MadeContext:
    """A prompt whose keys and values lie where somebody puts them; only kernels that read `rows` know its length."""

    layers: Sequence[LayerText]
    rows: TextRows

    def read(self, layer: int, project: ProjectContext) -> LayerText:
        """As `SampleContext` says; nothing is projected."""
        return self.layers[layer]


@dataclass(frozen=True, slots=True)
class TextContext:
    """The prompts of a batch, each of its own length, embedded once and read at every step."""

    samples: tuple[SampleContext, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def split(self) -> list[TextContext]:
        """One context a sample."""
        return [TextContext((sample,)) for sample in self.samples]

    @staticmethod
    def cat(contexts: Sequence[TextContext]) -> TextContext:
        """The batch of all their samples, in order."""
        return TextContext(tuple(chain.from_iterable(context.samples for context in contexts)))
