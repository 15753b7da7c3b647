"""File watch: the open files of a SQLite database, and the disk that they are on.

A file that was removed, replaced or emptied is noticed before a write is acknowledged, and a disk that fills up before
it is full.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_LOG, _INDEX = "-wal", "-shm"  # the write-ahead log, and its index, by which processes lock each other out


class _Identity(NamedTuple):
    """A file, as far as it can be told from another one."""

    device: int
    inode: int
    has_content: bool  # of the database; a log is emptied by a checkpoint


class FileWatch:
    """The files of an open database, and what has become of them.

    SQLite writes to the files that it has opened, wherever their names have gone meanwhile. What is written to a file
    without a name is lost when the last process closes it.

    Args:
        path: the database, open and in use, so that its log and its index exist.

    Attributes:
        change: what had happened to a file at the last `look`; None if all were in place.
        log_bytes: the size of the log then.
        free_bytes: what was free on the disk then.
    """

    def __init__(self, path: Path) -> None:
        self.change: str | None = None
        self.log_bytes = self.free_bytes = 0
        self._directory = os.fspath(path.parent)
        names = [os.fspath(path), f"{path}{_LOG}", f"{path}{_INDEX}"]
        self._known = [(name, identity) for name in names if (identity := self._identity(name)) is not None]
        self.look()

    def look(self) -> None:
        """Look at the files and the disk. It blocks, for microseconds on a local disk."""
        self.change = next(filter(None, [self._find_change(name, known) for name, known in self._known]), None)
        try:
            disk = os.statvfs(self._directory)
        except OSError:  # it has gone with the file
            self.free_bytes = 0
        else:
            self.free_bytes = disk.f_bavail * disk.f_frsize

    def _find_change(self, name: str, known: _Identity) -> str | None:
        found = self._identity(name)
        if found is None:
            return f"{name} was removed while it was open"
        if found[:2] != known[:2]:
            return f"{name} was replaced by another file while it was open"
        if known.has_content and not found.has_content:
            return f"{name} was emptied while it was open"
        return None

    def _identity(self, name: str) -> _Identity | None:
        try:
            found = os.stat(name)  # noqa: PTH116 - before and after each commit, and a Path takes three times as long
        except OSError:
            return None
        if name.endswith(_LOG):
            self.log_bytes = found.st_size
        return _Identity(found.st_dev, found.st_ino, found.st_size > 0 and not name.endswith((_LOG, _INDEX)))
