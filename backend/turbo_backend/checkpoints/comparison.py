"""Comparing what a file holds with what a network needs, and saying the difference so that a person can act on it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from turbo_backend.checkpoints.recognise import Recognised, Specs, recognise

_GROUPS_SHOWN = 4

_SCALE = ".scale"
_INT8_WEIGHT = ".int8_weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Differences between a file and a network; `fits` when there are none.

    Attributes:
        missing: keys the network needs and the file lacks.
        extra: keys the file holds and the network has no place for.
        misshaped: (key, shape in the file, shape in the network).
        mistyped: (key, dtype in the file, dtype in the network): an integer where a float belongs or the reverse.
        to_quantize: names of linears whose floating `weight` becomes `int8_weight` and `scale` while loading.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    mistyped: tuple[tuple[str, torch.dtype, torch.dtype], ...]
    to_quantize: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.extra or self.misshaped or self.mistyped)

    def counts(self) -> str:
        """`80 keys missing, 2 extra`."""
        parts = (
            (len(self.missing), "missing"),
            (len(self.extra), "extra"),
            (len(self.misshaped), "of another shape"),
            (len(self.mistyped), "of another type"),
        )
        return ", ".join(f"{count} {what}" for count, what in parts if count) or "none"

    def lines(self) -> list[str]:
        """Every kind of difference, keys of repeated blocks folded into one line; at most 20 lines."""
        lines: list[str] = []
        lines += _section("missing", [(key, "") for key in self.missing])
        lines += _section("extra", [(key, "") for key in self.extra])
        shapes = [(key, f": file {list(found)}, network {list(wanted)}") for key, found, wanted in self.misshaped]
        lines += _section("other shape", shapes)
        types = [(key, f": file {_name(found)}, network {_name(wanted)}") for key, found, wanted in self.mistyped]
        lines += _section("other type", types)
        return lines


def compare(found: Specs, needed: Specs, *, quantize: bool = False) -> Comparison:
    """Compares strictly: every key of either side counts.

    Floating types may differ (they are converted); integers must be exactly those needed.

    Args:
        found: keys, shapes and dtypes of the file.
        needed: the same of the network.
        quantize: accept a floating `X.weight` where the network needs `X.int8_weight` and `X.scale`.
    """
    to_quantize: list[str] = []
    missing: list[str] = []
    misshaped = []
    mistyped = []
    accounted: set[str] = set()
    for key, (shape, dtype) in needed.items():
        source = key
        if quantize and key not in found:
            for ending in (_INT8_WEIGHT, _SCALE):
                name = key.removesuffix(ending)
                if name != key and f"{name}.weight" in found and f"{name}{_INT8_WEIGHT}" in needed:
                    source = f"{name}.weight"
        if source not in found:
            missing.append(key)
            continue
        accounted.add(source)
        if source != key:
            if key.endswith(_SCALE):
                continue
            to_quantize.append(key.removesuffix(_INT8_WEIGHT))
            dtype = torch.float32
        if found[source][0] != shape:
            misshaped.append((source, found[source][0], shape))
        elif not _convertible(found[source][1], dtype):
            mistyped.append((source, found[source][1], dtype))
    return Comparison(
        missing=tuple(missing),
        extra=tuple(key for key in found if key not in accounted),
        misshaped=tuple(misshaped),
        mistyped=tuple(mistyped),
        to_quantize=tuple(to_quantize),
    )


def explain(path: Path, comparison: Comparison, found: Specs, needed: Specs) -> str:
    """The report of a file that does not fit: a headline, what the file seems to be, then the keys."""
    file_is, network_is = recognise(found), recognise(needed)
    if file_is.kind == "foreign":
        return f"{path}: this is {file_is.description}: {file_is.advice}"
    headline = f"{path}: does not fit the network: keys {comparison.counts()}"
    if hint := _hint(file_is, network_is, comparison):
        headline += f"\n  {hint}"
    return "\n".join([headline, *comparison.lines()])


def _hint(file: Recognised, network: Recognised, comparison: Comparison) -> str:
    if file.kind == "unknown":
        return "the file is of no known layout"
    if file.kind != network.kind and network.kind != "unknown":
        return f"this file is {file.description}; {network.description} is needed"
    if file.kind == "denoiser" and file.models != network.models:
        return f"this file is {file.description}; the configured network is {network.description}"
    if file.quantized and not network.quantized:
        return "this is a quantized file: set quant_linear"
    if network.quantized and not file.quantized:
        return "this file is not quantized: unset quant_linear, use the -quant file, or quantize while loading"
    if any(".proj_l." in key for key in comparison.missing):
        return "the file has no sparse-linear attention: it is not a TurboDiffusion denoiser"
    if comparison.missing and not comparison.extra:
        return f"the file is {file.description}, but incomplete"
    return f"the file is {file.description}"


def _section(title: str, entries: list[tuple[str, str]]) -> list[str]:
    """Entries with equal names but for their block number folded to `blocks.*.`."""
    if not entries:
        return []
    groups: dict[str, int] = {}
    for key, rest in entries:
        line = re.sub(r"^blocks\.\d+\.", "blocks.*.", key[:120]) + rest
        groups[line] = groups.get(line, 0) + 1
    lines = [f"  {title} ({len(entries)}):"]
    for line, count in list(groups.items())[:_GROUPS_SHOWN]:
        lines.append(f"    {line}" + (f"  x {count}" if count > 1 else ""))
    if len(groups) > _GROUPS_SHOWN:
        rest_count = sum(list(groups.values())[_GROUPS_SHOWN:])
        lines[-1] += f"  ... and {rest_count} more"
    return lines


def _convertible(found: torch.dtype, wanted: torch.dtype) -> bool:
    if wanted.is_floating_point:
        return found in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return found == wanted


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def total_bytes(specs: Specs) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
