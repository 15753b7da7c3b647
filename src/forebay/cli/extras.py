"""The message for a command whose libraries are not installed."""

from __future__ import annotations


def missing_extra_message(libraries: list[str], extra: str) -> str:
    """Return the message for missing libraries of an extra, with the command that installs them."""
    return f'forebay: this command needs {", ".join(libraries)}. To install: pip install "forebay[{extra}]"'
