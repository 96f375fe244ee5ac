"""The commands `turbodiffusion jobs ...`: requests that the server keeps and runs by itself."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated

import typer

from turbo_client._jobs import JobStatus
from turbo_client._options import ConnectionOptions, OutputOptions, ParameterOptions
from turbo_client._outcome import command, print_json
from turbo_client._output import check_output, check_preview_dir, result_object, save, save_preview
from turbo_client._screen import Screen, jobs_table, stdout_console

app = typer.Typer(
    help="Videos that the server makes by itself, over lost connections and its own restarts.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_JobId = Annotated[str, typer.Argument(help="The job's id.", show_default=False)]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@command(app, ParameterOptions, ConnectionOptions)
def submit(
    prompt: Annotated[str, typer.Argument(help="What the video shows; - reads it from stdin.", show_default=False)],
    parameters: ParameterOptions,
    connection: ConnectionOptions,
    json: _Json = False,
) -> None:
    """Submit a job and print its id; --request-id chooses it, and makes it safe to repeat the command."""
    request = parameters.request(prompt, container="mp4", preview=True)
    remark = request.remark()
    if remark is not None:
        Screen().warn(remark)
    with connection.client() as client:
        job = client.jobs.submit(**request.arguments())
    _print(job, as_json=json)


@command(app, ConnectionOptions)
def status(job_id: _JobId, connection: ConnectionOptions, json: _Json = False) -> None:
    """Show how far a job is."""
    with connection.client() as client:
        job = client.jobs.status(job_id)
    if json:
        print_json(dataclasses.asdict(job))
    else:
        stdout_console().print(jobs_table([job]))


@command(app, ConnectionOptions)
def list(connection: ConnectionOptions, json: _Json = False) -> None:
    """Show every job that the server keeps, in the order of submission."""
    with connection.client() as client:
        found = client.jobs.list()
    if json:
        print_json({"jobs": [dataclasses.asdict(job) for job in found]})
    else:
        stdout_console().print(jobs_table(found))


@command(app, OutputOptions, ConnectionOptions)
def watch(job_id: _JobId, delivery: OutputOptions, connection: ConnectionOptions) -> None:
    """Show a job's progress until it ends, also over a restart of the server."""
    if delivery.preview_dir is not None:
        check_preview_dir(delivery.preview_dir)
    with connection.client() as client:
        with Screen(quiet=delivery.quiet).progress() as screen:
            for progress in client.jobs.watch(job_id, timeout=connection.timeout or math.inf):
                screen.show(progress)
                save_preview(progress, delivery.preview_dir)
        job = client.jobs.status(job_id)
    _print(job, as_json=delivery.json)


@command(app, OutputOptions, ConnectionOptions)
def result(
    job_id: _JobId,
    delivery: OutputOptions,
    connection: ConnectionOptions,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.", show_default="JOB_ID.mp4")
    ] = None,
) -> None:
    """Wait for a job's end and write its video."""
    output = output or Path(f"{job_id}.mp4")
    check_output(output, force=delivery.force)
    started = time.monotonic()
    with connection.client() as client:
        video = client.jobs.result(job_id, timeout=connection.timeout or math.inf)
    save(video, output, force=delivery.force)
    seconds = time.monotonic() - started
    Screen(quiet=delivery.quiet).summary(video, seconds)
    if delivery.json:
        print_json(result_object(video, output, seconds))
    else:
        typer.echo(str(output))


@command(app, ConnectionOptions)
def cancel(job_id: _JobId, connection: ConnectionOptions, json: _Json = False) -> None:
    """Cancel a job: a queued one at once, a running one within its next step."""
    with connection.client() as client:
        job = client.jobs.cancel(job_id)
    if job.has_ended and job.state != "cancelled":
        Screen().warn(f"{job_id} is {job.state} already, there is nothing to cancel")
    _print(job, as_json=json)


@command(app, ConnectionOptions)
def resume(job_id: _JobId, connection: ConnectionOptions, json: _Json = False) -> None:
    """Go on with an interrupted, failed or cancelled job after its last finished step."""
    with connection.client() as client:
        job = client.jobs.resume(job_id)
    if job.state == "done":
        Screen().warn(f"{job_id} is done already, there is nothing to resume")
    _print(job, as_json=json)


@command(app, ConnectionOptions)
def delete(job_id: _JobId, connection: ConnectionOptions, json: _Json = False) -> None:
    """Remove a job that is not queued or running, with its video."""
    with connection.client() as client:
        _print(client.jobs.delete(job_id), as_json=json)


def _print(job: JobStatus, *, as_json: bool) -> None:
    """One job: its id for scripts, or all of it as JSON."""
    if as_json:
        print_json(dataclasses.asdict(job))
    else:
        typer.echo(job.job_id)
