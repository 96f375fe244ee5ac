"""Command-line options, declared once as dataclass fields and spread over the commands that take them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from turbo_client._client import Client
from turbo_client._requests import GenerationRequest
from turbo_client._settings import TLS

_Result = TypeVar("_Result")
_CONNECTION = "Connection"
_PARAMETERS = "Parameters"
_DELIVERY = "Output"


def _file(help_text: str) -> Any:
    return typer.Option(help=help_text, exists=True, dir_okay=False, readable=True, rich_help_panel=_CONNECTION)


class UsageError(Exception):
    """The call is wrong in a way that typer cannot see."""


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """How to reach the server."""

    url: Annotated[
        str,
        typer.Option(help="HOST:PORT of the gRPC port.", envvar="TURBO_URL", rich_help_panel=_CONNECTION),
    ] = "127.0.0.1:8001"
    timeout: Annotated[
        float,
        typer.Option(help="Seconds for the whole call; 0 for no limit.", min=0, rich_help_panel=_CONNECTION),
    ] = 600.0
    api_key: Annotated[
        str | None,
        typer.Option(
            help="API key; the environment keeps it out of the process list.",
            envvar="TURBO_API_KEY",
            show_envvar=True,
            rich_help_panel=_CONNECTION,
        ),
    ] = None
    api_key_header: Annotated[str, typer.Option(help="Header that carries the key.", rich_help_panel=_CONNECTION)] = (
        "authorization"
    )
    tls: Annotated[bool, typer.Option("--tls", help="Use TLS, trusting public roots.", rich_help_panel=_CONNECTION)] = (
        False
    )
    tls_ca: Annotated[Path | None, _file("PEM roots to trust; implies --tls.")] = None
    tls_cert: Annotated[Path | None, _file("Client certificate, for mutual TLS.")] = None
    tls_key: Annotated[Path | None, _file("Its private key.")] = None
    tls_server_name: Annotated[
        str | None, typer.Option(help="Name expected in the server's certificate.", rich_help_panel=_CONNECTION)
    ] = None

    def client(self) -> Client:
        """A client as these options ask for it.

        Raises:
            UsageError: they cannot work.
        """
        secure = (self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)
        try:
            tls = None
            if self.tls or any(value is not None for value in secure):
                tls = TLS(ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key, server_name=self.tls_server_name)
            return Client(
                self.url,
                timeout=self.timeout or None,
                tls=tls,
                api_key=self.api_key,
                api_key_header=self.api_key_header,
            )
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class ParameterOptions:
    """What to generate; names and defaults are those of `GenerationRequest`."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Ensemble to call.",
            show_default="text_to_video, or image_to_video with --image",
            rich_help_panel=_PARAMETERS,
        ),
    ] = None
    image: Annotated[
        Path | None,
        typer.Option(
            help="JPEG, PNG or WebP that the video starts from.",
            exists=True,
            dir_okay=False,
            readable=True,
            rich_help_panel=_PARAMETERS,
        ),
    ] = None
    boundary: Annotated[
        float,
        typer.Option(help="With --image: noise time of the low-noise expert.", rich_help_panel=_PARAMETERS),
    ] = 0.9
    adaptive_resolution: Annotated[
        bool,
        typer.Option(
            "--adaptive-resolution/--fixed-resolution",
            help="With --image: follow its aspect ratio.",
            rich_help_panel=_PARAMETERS,
        ),
    ] = False
    fit: Annotated[str, typer.Option(help="With --image: stretch or crop.", rich_help_panel=_PARAMETERS)] = "stretch"
    seed: Annotated[int, typer.Option(help="0 draws one.", rich_help_panel=_PARAMETERS)] = 0
    num_steps: Annotated[int, typer.Option(help="Denoising steps, 1 to 4.", rich_help_panel=_PARAMETERS)] = 4
    num_frames: Annotated[
        int | None, typer.Option(help="Frames, 4k + 1.", show_default="the model's", rich_help_panel=_PARAMETERS)
    ] = None
    resolution: Annotated[
        str | None, typer.Option(help="Such as 480p or 720p.", show_default="the model's", rich_help_panel=_PARAMETERS)
    ] = None
    aspect_ratio: Annotated[str, typer.Option(help="16:9, 9:16, 4:3, 3:4 or 1:1.", rich_help_panel=_PARAMETERS)] = (
        "16:9"
    )
    sigma_max: Annotated[
        float | None, typer.Option(help="Highest noise level.", show_default="the model's", rich_help_panel=_PARAMETERS)
    ] = None
    attention_type: Annotated[str, typer.Option(help="sagesla, sla or original.", rich_help_panel=_PARAMETERS)] = (
        "sagesla"
    )
    sla_topk: Annotated[
        float, typer.Option(help="Share of key blocks kept, over 0 to 1.", rich_help_panel=_PARAMETERS)
    ] = 0.1
    ode: Annotated[
        bool, typer.Option("--ode/--no-ode", help="Deterministic sampling.", rich_help_panel=_PARAMETERS)
    ] = False
    fps: Annotated[int, typer.Option(help="Frames a second of the MP4.", rich_help_panel=_PARAMETERS)] = 16
    priority_level: Annotated[
        int | None, typer.Option(help="0, most urgent, to 9.", show_default="5", rich_help_panel=_PARAMETERS)
    ] = None
    deadline_ms: Annotated[
        int | None,
        typer.Option(help="Refuse at once what cannot be denoised in this time.", rich_help_panel=_PARAMETERS),
    ] = None
    request_id: Annotated[
        str | None,
        typer.Option(help="Name of this request in logs.", show_default="drawn", rich_help_panel=_PARAMETERS),
    ] = None

    def request(self, prompt: str, *, container: str, preview: bool) -> GenerationRequest:
        """The request as these options ask for it; a prompt `-` is read from stdin.

        Raises:
            UsageError: a value cannot be sent.
        """
        text = _read_stdin() if prompt == "-" else prompt
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        try:
            return GenerationRequest(text, container=container, preview=preview, **values)
        except ValueError as error:
            raise UsageError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where results and progress go."""

    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace an existing output file.", rich_help_panel=_DELIVERY)
    ] = False
    preview_dir: Annotated[
        Path | None,
        typer.Option(help="Save each step's preview in this folder.", file_okay=False, rich_help_panel=_DELIVERY),
    ] = None
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=_DELIVERY)
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=_DELIVERY)] = (
        False
    )


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError:
        raise UsageError("the prompt on stdin is not UTF-8") from None


def spread(*groups: type) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Replaces a command's parameters that are option groups by the fields of those groups."""

    def decorate(command: Callable[..., _Result]) -> Callable[..., _Result]:
        # Not get_type_hints: before Python 3.11 it hides `Annotated` where the default is None.
        own = inspect.signature(command, eval_str=True).parameters.values()
        names = {item.name: item.annotation for item in own if item.annotation in groups}

        @functools.wraps(command)
        def call(**values: Any) -> _Result:
            for name, group in names.items():
                values[name] = group(**{item.name: values.pop(item.name) for item in fields(group)})
            return command(**values)

        parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own if item.name not in names]
        for group in names.values():
            types = get_type_hints(group, include_extras=True)
            parameters += [
                inspect.Parameter(
                    item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=types[item.name]
                )
                for item in fields(group)
            ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {item.name: item.annotation for item in parameters}
        del call.__wrapped__
        return call

    return decorate
