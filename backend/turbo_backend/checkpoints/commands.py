"""The command line over weight files: `inspect`, `convert`, `weights`.

Results go to stdout, progress and errors to stderr. Exit codes: 0 ok, 1 a problem was found, 2 wrong usage.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from turbo_backend.config import MODELS
from turbo_backend.errors import CheckpointError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Inspect, convert and fetch weight files.")

P = ParamSpec("P")
R = TypeVar("R")

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _explained(command: Callable[P, R]) -> Callable[P, R]:
    """Turns a CheckpointError into its message on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except CheckpointError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return run


@app.command("inspect")
@_explained
def inspect_command(
    path: Annotated[Path, typer.Argument(help="A .pth, .safetensors or .safetensors.index.json file.")],
    as_json: Json = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every tensor.")] = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="Take the SHA-256 (reads the whole file).")] = False,
    values: Annotated[bool, typer.Option("--values", help="Look for NaN and infinity (reads the whole file).")] = False,
) -> None:
    """Say what a weight file is, what it holds, and whether it fits a known model."""
    from turbo_backend.checkpoints.inspection import inspect_file

    found = inspect_file(path, sha256=sha256, values=values)
    if as_json:
        document = found.to_dict()
        if not keys:
            del document["tensors"]
        typer.echo(json.dumps(document, indent=2))
        raise typer.Exit(1 if found.problems else 0)
    table = Table(show_header=False, box=None)
    rows = [
        ("file", found.path),
        ("format", f"{found.file_format}, {len(found.files)} file(s), {_size(found.file_bytes)}"),
        ("is", found.description),
        ("fits", ", ".join(found.models) or "no known model"),
        ("tensors", f"{found.num_tensors:,}, {_size(found.tensor_bytes)}"),
        ("dtypes", ", ".join(f"{count:,} {name}" for name, count in found.dtypes.items())),
        *((f"metadata {name}", value) for name, value in found.metadata.items()),
        *((("sha256", found.sha256),) if found.sha256 else ()),
        *(("problem", problem) for problem in found.problems),
    ]
    for name, value in rows:
        table.add_row(f"[bold]{escape(name)}[/bold]", escape(value))
    console = _stdout()
    console.print(table)
    if keys:
        listing = Table("key", "shape", "dtype", "size", box=None)
        for tensor in found.tensors:
            listing.add_row(escape(tensor.key), escape(str(list(tensor.shape))), tensor.dtype, _size(tensor.num_bytes))
        console.print(listing)
    raise typer.Exit(1 if found.problems else 0)


@app.command("convert")
@_explained
def convert_command(
    source: Annotated[Path, typer.Argument(help="The file to read.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Split into files of at most this size, such as 5GB.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace files already there.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a weight file to safetensors, bit for bit, recording where it came from."""
    from turbo_backend.checkpoints.convert import convert_checkpoint
    from turbo_backend.checkpoints.reader import open_checkpoint

    max_shard_bytes = _parse_size(max_shard_size) if max_shard_size else None
    if not target.name.endswith(".safetensors"):
        raise typer.BadParameter(f"{target}: must end in .safetensors", param_hint="TARGET")
    checkpoint = open_checkpoint(source)
    total = sum(checkpoint.num_bytes(key) for key in checkpoint)
    with _progress() as progress:
        task = progress.add_task(target.name, total=total)
        converted = convert_checkpoint(
            checkpoint,
            target,
            force=force,
            max_shard_bytes=max_shard_bytes,
            on_bytes=lambda count: progress.advance(task, count),
        )
    if as_json:
        document = {
            "path": str(converted.path),
            "files": [str(file) for file in converted.files],
            "num_tensors": converted.num_tensors,
            "num_bytes": converted.num_bytes,
            "source_sha256": converted.source_sha256,
        }
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(f"{converted.path}: {converted.num_tensors} tensors, {_size(converted.num_bytes)}")


@app.command("weights")
@_explained
def weights_command(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(MODELS)}.")],
    checkpoint_dir: Annotated[
        Path, typer.Option("--checkpoint-dir", envvar="TURBO_CHECKPOINT_DIR", help="Folder of the weight files.")
    ] = Path("checkpoints"),
    quant_linear: Annotated[bool, typer.Option("--quant-linear", help="The quantized denoisers (-quant).")] = False,
    as_json: Json = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="Compare the published SHA-256 (reads the files).")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch what is absent from the hub.")] = False,
) -> None:
    """List the published files a model needs, and check those that are there; fetch the others if asked to."""
    from turbo_backend.checkpoints.download import ask_hub, endpoint, fetch
    from turbo_backend.checkpoints.published import published_files
    from turbo_backend.checkpoints.weights import check_files

    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is none of {', '.join(MODELS)}", param_hint="MODEL")
    files = published_files(MODELS[model], quant_linear=quant_linear)
    if not files:
        typer.echo(f"{model} needs no download: its weights come with the server", err=True)
        if as_json:
            typer.echo(json.dumps({"model": model, "checkpoint_dir": str(checkpoint_dir), "files": []}, indent=2))
        return
    statuses = check_files(MODELS[model], files, checkpoint_dir, sha256=sha256)
    absent = [file for file, status in zip(files, statuses, strict=True) if status.state == "absent"]
    if download and absent:
        remote = ask_hub(absent)
        for item in remote:
            typer.echo(f"{item.file.repository}/{item.file.name}: {_size(item.size)}", err=True)
        total = sum(item.size for item in remote)
        typer.echo(f"fetching {_size(total)} from {endpoint()} into {checkpoint_dir}", err=True)
        for item in remote:
            fetch(item, checkpoint_dir)
        statuses = check_files(MODELS[model], files, checkpoint_dir, sha256=sha256)
    if as_json:
        document = {
            "model": model,
            "checkpoint_dir": str(checkpoint_dir),
            "quant_linear": quant_linear,
            "files": [status.to_dict() for status in statuses],
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        table = Table("file", "for", "state", "size", "from", box=None)
        for status in statuses:
            size = status.size if status.size is not None else status.expected_size
            shown = _size(size) if size is not None else f"about {_size(status.estimated_size or 0)}"
            table.add_row(escape(status.name), status.kind, status.state, shown, status.repository)
        console = _stdout()
        console.print(table)
        for status in statuses:
            if status.problem:
                console.print(escape(status.problem))
    states = {status.state for status in statuses}
    if "absent" in states:
        typer.echo("fetch absent files with --download", err=True)
    if "wrong" in states:
        typer.echo("files that are wrong are never replaced: remove them and use --download", err=True)
    if states & {"absent", "wrong"}:
        raise typer.Exit(1)


def _stdout() -> Console:
    """A console whose lines stay whole when piped into a file or another program."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=4096, soft_wrap=True)
    return console


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def _parse_size(text: str) -> int:
    """`5GB`, `500 MB` or bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text.strip())
    scale = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    size = int(float(found[1]) * scale[found[2]]) if found else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB or 500MB", param_hint="--max-shard-size")
    return size
