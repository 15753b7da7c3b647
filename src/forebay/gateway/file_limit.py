"""The limit of open files of this process, and the connections that fit in it."""

from __future__ import annotations

import contextlib
import sys
from typing import Final

from forebay.events import log

_FILES_PER_CALL: Final = 2  # the sockets to its caller and to its provider
_OTHER_FILES: Final = 1_100  # name look-ups, log, event loop, and a burst of connections that are rejected


def fit_connections(wanted: int, *, least: int) -> int:
    """Raise this process's limit of open files as far as needed and allowed; return how many connections fit.

    Args:
        wanted: connections of callers at a time.
        least: fewer than that are a reason for a warning, if more are wanted.
    """
    files = _raise_limit(_FILES_PER_CALL * wanted + _OTHER_FILES)
    fitting = wanted if files is None else connections_within(files, wanted)
    if fitting < wanted:
        report = log.warning if fitting < least else log.info
        report(
            "max_connections is lowered from %d to %d, since this process may open %d files only: raise that limit"
            " (ulimit -n) for more",
            *(wanted, fitting, files),
        )
    return fitting


def connections_within(files: int, wanted: int) -> int:
    """Return how many of the wanted connections may be open at a time in a process that may open `files` files."""
    other = min(_OTHER_FILES, files // 4)
    return max(1, min(wanted, (files - other) // _FILES_PER_CALL))


def _raise_limit(wanted: int) -> int | None:
    """Raise the limit of open files to `wanted`, as far as the system allows; return it, or None if there is none."""
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415 - not on Windows

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now == resource.RLIM_INFINITY:
        return None
    if now < wanted:
        allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
            now = allowed
    return int(now)
