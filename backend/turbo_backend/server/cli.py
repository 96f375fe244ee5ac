"""`turbodiffusion-server`: serve, doctor, settings, and the checkpoint commands.

Exit statuses: 0 ok (a server stopped by SIGTERM or Ctrl-C included), 1 failed, 2 wrong usage, 130 interrupted at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from turbo_backend import __version__
from turbo_backend.errors import Misconfigured, TurboError
from turbo_backend.server.binary import find_triton
from turbo_backend.server.launcher import serve
from turbo_backend.server.process import TritonServer
from turbo_backend.settings import Settings, list_variables, unknown_variables

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    help="Serves TurboDiffusion models on NVIDIA Triton Inference Server. Without a command: serve.",
)
#: Commands that need no torch; the others are imported only when they are called for (torch takes seconds).
_OWN_COMMANDS = ("serve", "doctor", "settings")


def main() -> None:
    """Entry point of `turbodiffusion-server`."""
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("--help", "--version")):
        arguments = ["serve", *arguments]
    if arguments[0] not in (*_OWN_COMMANDS, "--version"):
        from turbo_backend.checkpoints import commands

        app.add_typer(commands.app)  # without a name: its commands stand beside ours
    try:
        app(arguments, prog_name="turbodiffusion-server")
    except TurboError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"turbodiffusion-server {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("serve")
def serve_command(
    triton_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- TRITON OPTIONS]", help="More options of tritonserver, after `--`."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Model to serve [TURBO_MODEL]; give it again for another one.")
    ] = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Folder of the published weight files [TURBO_CHECKPOINT_DIR].")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N [TURBO_DEVICE].")] = None,
    attention_provider: Annotated[
        str | None, typer.Option(help="auto, reference, triton or spargeattn [TURBO_ATTENTION_PROVIDER].")
    ] = None,
    quant_linear: Annotated[
        bool | None, typer.Option("--quant-linear/--no-quant-linear", help="8-bit linears [TURBO_QUANT_LINEAR].")
    ] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Choose model and precision by the GPU's free memory; say what was chosen.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8001,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8002,
    model_repository: Annotated[
        Path | None, typer.Option(help="Serve this model repository instead of the committed one.")
    ] = None,
    tritonserver: Annotated[
        Path | None, typer.Option(help="The tritonserver to start, instead of the one found [TRITONSERVER].")
    ] = None,
    log_file: Annotated[Path | None, typer.Option(help="Log to this file instead of standard error.")] = None,
    log_verbose: Annotated[int, typer.Option(min=0, help="Triton's log level.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds in which the models must be ready.")] = 1800.0,
    exit_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that requests in flight may hold up a stop.")
    ] = 60.0,
    restart: Annotated[
        bool, typer.Option("--restart/--no-restart", help="Restart tritonserver when it or a model process dies.")
    ] = True,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="In ten minutes; what dies more often will not get well by itself.")
    ] = 5,
) -> None:
    """Start Triton and serve until SIGTERM or Ctrl-C.

    Prints one line when every model is loaded and warm, and after each restart:
    `ready grpc=HOST:PORT http=URL metrics=URL model=NAME pid=N`

    The exit status is 1 when it dies after --max-restarts in 10 minutes.

    Options override the variables named beside them.
    """
    if triton_options and not triton_options[0].startswith("--"):
        raise typer.BadParameter(f"unexpected {triton_options[0]!r}; options of tritonserver come after `--`")
    given = {
        "TURBO_MODEL": ",".join(model) if model else None,
        "TURBO_CHECKPOINT_DIR": None if checkpoint_dir is None else str(checkpoint_dir.resolve()),
        "TURBO_DEVICE": device,
        "TURBO_ATTENTION_PROVIDER": attention_provider,
        "TURBO_QUANT_LINEAR": None if quant_linear is None else str(quant_linear),
    }
    environment = {name: value for name, value in given.items() if value is not None}
    if auto:
        environment |= _choose_automatically(environment)
    settings = Settings.from_environment({**os.environ, **environment})
    for remark in unknown_variables():
        print(f"warning: {remark}", file=sys.stderr)
    server = TritonServer(
        model_repository,
        installation=find_triton(tritonserver),
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        environment=environment,
        options=triton_options or (),
        log_path=log_file,
        log_to_stderr=log_file is None,
        log_verbose=log_verbose,
        ready_timeout=timeout,
        exit_timeout=exit_timeout,
        restarts=max_restarts if restart else 0,
    )
    raise typer.Exit(serve(server, ",".join(settings.models)))


def _choose_automatically(given: dict[str, str]) -> dict[str, str]:
    """The variables of the configuration that the GPU's free memory admits, printed in one line on standard error.

    Raises:
        TurboError: options or variables choose already, there is no GPU, or nothing fits.
    """
    from turbo_backend.memory import free_bytes
    from turbo_backend.planner import choose_configuration

    chosen_already = [
        name
        for name in ("TURBO_MODEL", "TURBO_QUANT_LINEAR", "TURBO_TEXT_ENCODER_DEVICE")
        if given.get(name) or os.environ.get(name, "").strip()
    ]
    if chosen_already:
        raise Misconfigured(f"--auto chooses what {', '.join(chosen_already)} says already: leave one of them out")
    kept = {name: value for name, value in os.environ.items() if name == "TURBO_DEVICE"}
    device = Settings.from_environment({**kept, **{k: v for k, v in given.items() if k == "TURBO_DEVICE"}}).device
    if device.type != "cuda":
        raise Misconfigured("--auto needs a CUDA GPU: without one the tiny models are what can be served")
    free = free_bytes(device)
    chosen = choose_configuration(free)
    print(
        f"auto: {free / 2**30:.1f} GiB free on {device}: {chosen.model}, {chosen.resolution}, "
        f"{chosen.num_steps} steps, quant_linear {'on' if chosen.quant_linear else 'off'}, text encoder on the "
        f"{'CPU' if chosen.text_encoder_on_cpu else 'GPU'}; {chosen.memory / 2**30:.1f} GiB predicted",
        file=sys.stderr,
    )
    environment = {"TURBO_MODEL": chosen.model, "TURBO_QUANT_LINEAR": str(chosen.quant_linear)}
    if chosen.text_encoder_on_cpu:
        environment["TURBO_TEXT_ENCODER_DEVICE"] = "cpu"
    return environment


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Say what is installed, which GPU, which providers, what would be used and why.

    Starts the tritonserver it finds, to be sure. Exit status 1 when serving could not work.
    """
    from turbo_backend.server.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis.to_dict(), indent=2, ensure_ascii=False))
    else:
        for finding in diagnosis.findings:
            detail = finding.detail.rstrip().replace("\n", "\n" + " " * 29)
            print(f"{finding.state:8} {finding.name:19} {detail}")
        print("would use: " + ", ".join(f"{name}={value}" for name, value in diagnosis.would_use.items()))
    raise typer.Exit(0 if diagnosis.ok else 1)


@app.command("settings")
def settings_command(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference table of all variables.")] = False,
) -> None:
    """Print every setting: its variable, its value here, and what it means."""
    if markdown:
        print("| variable | default | meaning |\n|---|---|---|")
        for variable in list_variables():
            default = f"`{variable.default}`" if variable.default else ""
            print(f"| `{variable.name}` | {default} | {variable.description} |")
        return
    given = Settings.from_environment().to_environment()
    for variable in list_variables():
        chosen = variable.name in given
        value = given.get(variable.name, variable.default) or "(unset)"
        print(f"{variable.name} = {value}{'' if chosen else '  (default)'}\n    {variable.description}")
