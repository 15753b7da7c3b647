"""Text for error messages, log lines and printed reports: numbers with units, and the words of others made safe."""

from __future__ import annotations

import math
import re

# For each unit: the number below which it is used, its size in seconds (or bytes), and its name.
_DURATIONS = (
    (0.9995e-3, 1e-6, "us"),  # a number that would round to 1,000 takes the next unit
    (0.9995, 1e-3, "ms"),
    (2 * 60.0, 1.0, "s"),
    (3600.0, 60.0, "min"),
    (2 * 86400.0, 3600.0, "h"),
    (math.inf, 86400.0, "days"),
)
_SIZES = (
    (999.5, 1.0, "bytes"),
    (999.5e3, 1e3, "kB"),
    (999.5e6, 1e6, "MB"),
    (999.5e9, 1e9, "GB"),
    (math.inf, 1e12, "TB"),
)


_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_MAX_ERROR = 10_000  # characters of an error's text


def error_text(text: str) -> str:
    """Return the text of an error as it can be stored, sent and printed: valid Unicode, of a bounded length.

    A surrogate, which no encoding has, is written as an escape.
    """
    text = text.encode(errors="backslashreplace").decode()
    if len(text) > _MAX_ERROR:
        kept = _MAX_ERROR - 50  # so that the whole is within the bound, and the text of a text is the same
        text = f"{text[:kept]}... ({len(text) - kept:,} more characters)"
    return text


def as_clause(text: str) -> str:
    """Return the first line of a text that is not empty, without its full stop: as a part of a sentence."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if line.endswith("..") else line.removesuffix(".")


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: it holds no surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def header_value(text: str) -> str:
    """Return a text as the value of a header: a space for a control character, an escape for what is not ASCII."""
    return _CONTROLS.sub(" ", text.encode("ascii", "backslashreplace").decode()).strip()


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that reads best, with three significant digits: ``"250 ms"``, ``"24 h"``.

    Args:
        seconds: may be negative, infinite or not a number.
    """
    if not math.isfinite(seconds):
        return "an unknown time" if math.isnan(seconds) or seconds < 0 else "an unlimited time"
    return _format(seconds, _DURATIONS) if seconds else "0 s"


def format_bytes(size: float) -> str:
    """Return a finite number of bytes in the decimal unit that reads best: ``"512 bytes"``, ``"16 MB"``."""
    return "1 byte" if size == 1 else _format(size, _SIZES)


def _format(number: float, units: tuple[tuple[float, float, str], ...]) -> str:
    """Return `number` in the first of `units` that it fits, never with an exponent."""
    factor, unit = next((factor, unit) for below, factor, unit in units if abs(number) < below)
    text = f"{number / factor:.3g}"
    return f"{number / factor:,.0f} {unit}" if "e" in text else f"{text} {unit}"
