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
import signal
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from turbo_client import __version__, _jobs_cli
from turbo_client._client import Client
from turbo_client._manifest import read_manifest
from turbo_client._options import ConnectionOptions, OutputOptions, ParameterOptions, UsageError
from turbo_client._outcome import command, print_json
from turbo_client._output import check_output, check_preview_dir, result_object, save, save_preview
from turbo_client._requests import GenerationRequest
from turbo_client._screen import Screen, manifest_table, status_table, stdout_console
from turbo_client._video import Video

app = typer.Typer(
    name="turbodiffusion",
    help="Video from text or an image, by a TurboDiffusion server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(_jobs_cli.app, name="jobs")


def main() -> None:
    """Entry point."""
    # A plain SIGTERM would end the process without removing a file half written.
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"turbodiffusion {__version__}")
        raise typer.Exit


@command(app, ParameterOptions, OutputOptions, ConnectionOptions)
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
    request = parameters.request(prompt, container=container, preview=delivery.preview_dir is not None)
    with connection.client() as client:
        _run(client, request, output, delivery)


@command(app, OutputOptions, ConnectionOptions)
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


@command(app)
def info(
    file: Annotated[Path, typer.Argument(help="MP4 made by this system.", exists=True, dir_okay=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Show how the video of FILE was made."""
    manifest = read_manifest(file)
    if json:
        print_json(dict(manifest.raw))
    else:
        stdout_console().print(manifest_table(manifest))


@command(app, ConnectionOptions)
def status(
    connection: ConnectionOptions,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show whether the server and its models are ready (exit code 1 when not)."""
    with connection.client() as client:
        found = client.status()
    if json:
        print_json({"url": connection.url, **dataclasses.asdict(found)})
    else:
        state = "ready" if found.ready else "live, not ready" if found.live else "not live"
        console = stdout_console()
        console.print(f"{connection.url}  {found.name} {found.version}  {state}", markup=False)
        console.print(status_table(found))
    if not found.ready:
        raise typer.Exit(1)


@command(app, ConnectionOptions)
def cancel(
    request_id: Annotated[str, typer.Argument(help="Id of a running generation.", show_default=False)],
    connection: ConnectionOptions,
) -> None:
    """Cancel a running generation of any client by its request id (a job: `jobs cancel`)."""
    with connection.client() as client:
        client.cancel(request_id)
    # Nobody knows of a request before its first step, nor of one that has ended.
    Screen().note(f"a generation named {request_id} ends within its next step, if there is one")


def _run(client: Client, request: GenerationRequest, output: Path, delivery: OutputOptions) -> Video:
    """Generates, shows progress, writes the files, and prints the result."""
    check_output(output, force=delivery.force)
    if delivery.preview_dir is not None:
        check_preview_dir(delivery.preview_dir)
    screen = Screen(quiet=delivery.quiet)
    remark = request.remark()
    if remark is not None and not delivery.quiet:
        screen.warn(remark)
    started = time.monotonic()
    with screen.progress() as progress_screen, client.stream(**request.arguments()) as stream:
        for progress in stream:
            progress_screen.show(progress)
            save_preview(progress, delivery.preview_dir)
        video = stream.result()
    seconds = time.monotonic() - started
    save(video, output, force=delivery.force)
    screen.summary(video, seconds)
    if delivery.json:
        print_json(result_object(video, output, seconds))
    else:
        typer.echo(str(output))
    return video


if __name__ == "__main__":
    main()
