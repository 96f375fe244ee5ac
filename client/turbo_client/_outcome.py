"""How a command ends: the exit code of each kind of error, its one line on stderr, its JSON on stdout."""

from __future__ import annotations

import functools
import json as json_format
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from turbo_client._errors import (
    APIError,
    DeadlineExceededError,
    InvalidArgumentError,
    ManifestError,
    NotFoundError,
    TurboDiffusionError,
    UnreachableError,
)
from turbo_client._options import UsageError, spread
from turbo_client._screen import Screen

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


def command(app: typer.Typer, *groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function a command of `app`, with the options of `groups`, that ends as this module says."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        return app.command()(_explained(spread(*groups)(function)))

    return decorate


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object, the result of a command, on stdout."""
    typer.echo(json_format.dumps(value, ensure_ascii=False))


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
                print_json({"error": _error_object(error, message, code)})
            Screen().error(message)
            raise typer.Exit(code) from None

    return call


def _one_line(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, NotFoundError) and "unknown model" in error.message:
        return f"{error}; `turbodiffusion status` lists what the server has"
    if isinstance(error, (UsageError, TurboDiffusionError, OSError)):
        return str(error)
    return f"unexpected {type(error).__name__}: {error} (a bug; TURBO_DEBUG=1 shows where)"


def _error_object(error: BaseException, message: str, code: int) -> dict[str, Any]:
    status = error.code.name if isinstance(error, APIError) and error.code is not None else None
    return {
        "type": type(error).__name__,
        "message": message,
        "status": status,
        "request_id": getattr(error, "request_id", None),
        "exit_code": code,
    }
