"""The command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or print one line that says which libraries to install."""
    try:
        from forebay.cli.app import app  # noqa: PLC0415 - typer is an extra
    except ModuleNotFoundError as error:
        sys.exit(missing_extra_message([(error.name or str(error)).partition(".")[0]], "cli"))
    app()


def missing_extra_message(libraries: list[str], extra: str) -> str:
    """Return a message that says how to install the missing libraries of an extra."""
    return f'forebay: this command needs {", ".join(libraries)}. To install: pip install "forebay[{extra}]"'


__all__ = ["main", "missing_extra_message"]
