"""Run ``python -m demo``, or ``make demo``, which installs what it needs first."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Final

LIBRARIES: Final = ("aiohttp", "langgraph", "matplotlib", "openai", "rich", "typer")
"""Libraries that the demo imports, apart from Forebay's own requirements."""


def main() -> None:
    """Run the demo, or say in one line which libraries are missing."""
    if missing := [name for name in LIBRARIES if not _installed(name)]:
        sys.exit(f"demo: not installed here: {', '.join(missing)}. Run `make demo`, which installs what it needs.")
    from demo.command import app  # noqa: PLC0415 - typer may be missing

    app()


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # sys.modules holds None in its place
        return False


if __name__ == "__main__":
    main()
