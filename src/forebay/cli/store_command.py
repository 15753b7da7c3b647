"""The parts that commands on a store share: opening it, mistakes and errors on stderr, exit codes, JSON, times."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, Protocol, TypeVar

import typer

from forebay._text import format_duration
from forebay.cli.text_table import one_line
from forebay.errors import ForebayError, InvalidOverflowUrl, InvalidSagaLogUrl, StoreNotInstalled

USAGE_ERROR: Final = 2  # exit status, as typer's; 1 is that of a failure

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Store(Protocol):
    """A store that is opened for a command, and closed after it."""

    async def open(self) -> None:
        """Open it."""

    async def close(self) -> None:
        """Close it."""


S = TypeVar("S", bound=Store)
T = TypeVar("T")


def run(find: Callable[[], S], action: Callable[[S], Awaitable[T]]) -> T:
    """Return what `action` returns of the store that `find` returns; if it cannot, print why and exit."""
    try:
        return asyncio.run(_with_store(find(), action))
    except (InvalidOverflowUrl, InvalidSagaLogUrl, StoreNotInstalled) as error:
        fail(str(error), status=USAGE_ERROR)
    except ForebayError as error:
        fail(str(error))


async def _with_store(store: S, action: Callable[[S], Awaitable[T]]) -> T:
    await store.open()
    try:
        return await action(store)
    finally:
        await store.close()


def check_file(path: Path | None) -> None:
    """Exit if a store's file does not exist: opening it would make it."""
    if path is not None and not path.is_file():
        fail(f"there is no file {one_line(str(path))}")


def fail(message: str, status: int = 1) -> NoReturn:
    """Print a message on stderr, and exit."""
    typer.echo(f"forebay: {message}", err=True)
    raise typer.Exit(status)


def print_json(value: Any) -> None:
    """Print plain data as JSON."""
    typer.echo(json.dumps(value, indent=2))


def relative(at: float, now: float) -> str:
    """Return a time as a person says it: "in 5 min", "17 min ago"."""
    return f"in {format_duration(at - now)}" if at >= now else f"{format_duration(now - at)} ago"


def date(at: float) -> str:
    """Return epoch seconds as a date and a time in UTC."""
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):  # beyond the calendar
        return f"{at}"
