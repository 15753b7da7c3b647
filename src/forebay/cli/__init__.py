"""The command line."""

from __future__ import annotations

import sys

from forebay.cli.extras import missing_extra_message


def main() -> None:
    """Run the command, or print one line with the libraries to install."""
    try:
        from forebay.cli.app import app  # noqa: PLC0415 - typer is an extra
    except ModuleNotFoundError as error:
        sys.exit(missing_extra_message([(error.name or str(error)).partition(".")[0]], "cli"))
    app()


__all__ = ["main"]
