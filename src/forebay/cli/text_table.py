"""Text for a terminal: tables with aligned columns, and the words of others without control characters."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Control characters of a terminal, and those that change the direction of the text around them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def one_line(text: str, width: int | None = None) -> str:
    """Return a text on one line, of at most `width` characters, with escapes for what a terminal would obey."""
    safe = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return safe if width is None or len(safe) <= width else safe[: width - 3] + "..."


def text_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; columns without any text are left out."""
    safe = [[one_line(cell) for cell in row] for row in rows]
    used = [index for index in range(len(titles)) if any(row[index] for row in safe)]
    widths = {index: max(len(titles[index]), *(len(row[index]) for row in safe)) for index in used}
    lines = [[title.upper() for title in titles], *safe]
    return "\n".join("  ".join(line[index].ljust(widths[index]) for index in used).rstrip() for line in lines)
