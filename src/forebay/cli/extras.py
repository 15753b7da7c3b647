"""The message for a command whose libraries are not installed."""

from __future__ import annotations


def missing_extra_message(libraries: list[str], extra: str) -> str:
    """Return a message that says how to install the missing libraries of an extra."""
    return f'forebay: this command needs {", ".join(libraries)}. To install: pip install "forebay[{extra}]"'
