"""The `turbodiffusion` command.

Results go to stdout, everything for people to stderr. Exit codes:

    0    done
    1    the server failed, or the result could not be written
    2    the call is wrong: options, files, or a value that the server refuses (INVALID_ARGUMENT)
    3    the server cannot be reached
    4    the time given was not enough
    130  interrupted (143: terminated)
"""

from __future__ import annotations

import dataclasses
import functools
import json as json_format
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from turbo_client import __version__
from turbo_client._client import Client
from turbo_client._errors import (
    APIError,
    DeadlineExceededError,
    InvalidArgumentError,
    ManifestError,
    TurboDiffusionError,
    UnreachableError,
)
from turbo_client._files import atomic_file
from turbo_client._manifest import read_manifest
from turbo_client._options import ConnectionOptions, OutputOptions, ParameterOptions, UsageError, spread
from turbo_client._requests import GenerationRequest
from turbo_client._screen import Screen, manifest_table, status_table, stdout_console
from turbo_client._video import Video

#: The first class that an exception belongs to decides. The last one is for bugs: TURBO_DEBUG=1 shows where.
EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (UsageError, 2),
    (InvalidArgumentError, 2),
    (ManifestError, 2),
    (UnreachableError, 3),
    (DeadlineExceededError, 4),
    (TurboDiffusionError, 1),
    (OSError, 1),
    (KeyboardInterrupt, 130),
    (Exception, 1),
)

_Result = TypeVar("_Result")

app = typer.Typer(
    name="turbodiffusion",
    help="Video from text or an image, by a TurboDiffusion server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point."""
    # A plain SIGTERM would end the process without removing a file half written.
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _explained(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Turns what went wrong into one line and an exit code."""

    @functools.wraps(command)
    def call(**values: Any) -> _Result:
        try:
            return command(**values)
        except BrokenPipeError:
            # Whoever read our stdout has gone; Python would complain again when flushing it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except typer.Exit:
            raise
        except tuple(kind for kind, _ in EXIT_CODES) as error:
            if os.environ.get("TURBO_DEBUG"):
                raise
            code = next(code for kind, code in EXIT_CODES if isinstance(error, kind))
            message = _one_line(error)
            if values.get("json"):
                _print_json({"error": _error_object(error, message, code)})
            Screen().error(message)
            raise typer.Exit(code) from None

    return call


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, (UsageError, TurboDiffusionError, OSError)):
        return str(error)
    return f"unexpected {type(error).__name__}: {error} (a bug; TURBO_DEBUG=1 shows where)"


def _command(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        return app.command()(_explained(spread(*groups)(command)))

    return decorate


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"turbodiffusion {__version__}")
        raise typer.Exit


@_command(ParameterOptions, OutputOptions, ConnectionOptions)
def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows; - reads it from stdin.", show_default=False)],
    parameters: ParameterOptions,
    delivery: OutputOptions,
    connection: ConnectionOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File to write.",
            show_default="out.mp4, or out.npy for raw frames",
            rich_help_panel="Output",
        ),
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(
            help="mp4, or raw for a .npy of uint8 frames.", show_default="by the file's name", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Generate a video from a prompt, or from a prompt and an image."""
    if container is None:
        container = "raw" if output is not None and output.suffix == ".npy" else "mp4"
    if output is None:
        output = Path("out.npy" if container == "raw" else "out.mp4")
    if (container == "raw") != (output.suffix == ".npy"):
        raise UsageError(f"{output} does not fit --container {container}: raw frames are written as .npy")
    text = _read_stdin() if prompt == "-" else prompt
    request = parameters.request(text, container=container, preview=delivery.preview_dir is not None)
    with connection.client() as client:
        _run(client, request, output, delivery)


@_command(OutputOptions, ConnectionOptions)
def replay(
    file: Annotated[Path, typer.Argument(help="MP4 made by this system.", exists=True, dir_okay=False)],
    delivery: OutputOptions,
    connection: ConnectionOptions,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Ensemble to call.", show_default="the one that made FILE")] = None,
    image: Annotated[
        Path | None, typer.Option(help="The image that the video started from.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Generate the video of FILE again, from the manifest inside it."""
    manifest = read_manifest(file)
    request = dataclasses.replace(manifest.request(image=image), preview=delivery.preview_dir is not None)
    if model is not None:
        request = dataclasses.replace(request, model=model)
    with connection.client() as client:
        video = _run(client, request, output, delivery)
    for difference in manifest.differences(video.report):
        Screen().warn(difference)


@_command()
def info(
    file: Annotated[Path, typer.Argument(help="MP4 made by this system.", exists=True, dir_okay=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Show how the video of FILE was made."""
    manifest = read_manifest(file)
    if json:
        _print_json(dict(manifest.raw))
    else:
        stdout_console().print(manifest_table(manifest))


@_command(ConnectionOptions)
def status(
    connection: ConnectionOptions,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show whether the server and its models are ready (exit code 1 when not)."""
    with connection.client() as client:
        found = client.status()
    if json:
        _print_json({"url": connection.url, **dataclasses.asdict(found)})
    else:
        state = "ready" if found.ready else "live, not ready" if found.live else "not live"
        console = stdout_console()
        console.print(f"{connection.url}  {found.name} {found.version}  {state}", markup=False)
        console.print(status_table(found))
    if not found.ready:
        raise typer.Exit(1)


def _run(client: Client, request: GenerationRequest, output: Path, delivery: OutputOptions) -> Video:
    """Generates, shows progress, writes the files, and prints the result."""
    _check_output(output, force=delivery.force)
    if delivery.preview_dir is not None:
        _check_preview_dir(delivery.preview_dir)
    screen = Screen(quiet=delivery.quiet)
    remark = request.remark()
    if remark is not None and not delivery.quiet:
        screen.warn(remark)
    started = time.monotonic()
    with screen.progress() as progress_screen, client.stream(**request.arguments()) as stream:
        for progress in stream:
            progress_screen.show(progress)
            if progress.preview is not None and delivery.preview_dir is not None:
                with atomic_file(delivery.preview_dir / _preview_name(progress.step, progress.num_steps)) as file:
                    file.write(progress.preview)
        video = stream.result()
    seconds = time.monotonic() - started
    if not delivery.force and os.path.lexists(output):
        raise FileExistsError(f"{output} appeared while the video was made; it was left alone, and nothing was written")
    video.save(output)
    screen.summary(video, seconds)
    if delivery.json:
        _print_json(_result_object(video, output, seconds))
    else:
        typer.echo(str(output))
    return video


def _preview_name(step: int, num_steps: int) -> str:
    return f"step_{step}_of_{num_steps}.jpg"


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError:
        raise UsageError("the prompt on stdin is not UTF-8") from None


def _check_output(output: Path, *, force: bool) -> None:
    """Refuses before minutes of work what could not be written after them."""
    if os.path.lexists(output) and not (output.exists() and not output.is_file()) and not force:
        raise UsageError(f"{output} exists; --force replaces it")
    if output.exists() and not output.is_file():
        raise UsageError(f"{output} exists and is not a regular file")
    _check_writable(output.parent)


def _check_preview_dir(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make folder {folder}: {error.strerror}") from None
    _check_writable(folder)


def _check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(f"folder {folder} does not exist")
    # Permission bits say little under network file systems and for root: write something.
    probe = folder / f".turbodiffusion-{os.getpid()}.part"
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise UsageError(f"cannot write in folder {folder}: {error.strerror}") from None
    probe.unlink()


def _result_object(video: Video, output: Path, seconds: float) -> dict[str, Any]:
    return {
        "path": str(output),
        "container": video.container,
        "request_id": video.request_id,
        "seed": video.seed,
        "width": video.width,
        "height": video.height,
        "num_frames": video.num_frames,
        "fps": video.fps,
        "bytes": output.stat().st_size,
        "seconds": round(seconds, 3),
        "report": video.report,
    }


def _error_object(error: BaseException, message: str, code: int) -> dict[str, Any]:
    status = error.code.name if isinstance(error, APIError) and error.code is not None else None
    return {
        "type": type(error).__name__,
        "message": message,
        "status": status,
        "request_id": getattr(error, "request_id", None),
        "exit_code": code,
    }


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json_format.dumps(value, ensure_ascii=False))


if __name__ == "__main__":
    main()
