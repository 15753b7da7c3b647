"""File watch: an open SQLite file that was removed, replaced or emptied is noticed before a write is acknowledged."""

from __future__ import annotations

from pathlib import Path

_COMPANIONS = ("-wal", "-shm")  # the write-ahead log, and its index, by which processes lock each other out


class FileWatch:
    """The identity of the files of an open database.

    SQLite writes to the files that it has opened, wherever their names have gone meanwhile. What is written to a file
    without a name is lost when the last process closes it.

    Args:
        path: the database, open and in use, so that its companions exist.
    """

    def __init__(self, path: Path) -> None:
        paths = [path, *(path.with_name(path.name + suffix) for suffix in _COMPANIONS)]
        self._known = [(each, identity) for each in paths if (identity := _identity(each)) is not None]

    def find_change(self) -> str | None:
        """Return what has happened to a file since; None if all are in place."""
        for path, known in self._known:
            identity = _identity(path)
            if identity is None:
                return f"{path} was removed while it was open"
            if identity[:2] != known[:2]:
                return f"{path} was replaced by another file while it was open"
            if known[2] and not identity[2]:
                return f"{path} was emptied while it was open"
        return None


def _identity(path: Path) -> tuple[int, int, bool] | None:
    """Return the device and the inode of a file, and whether it has any content; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    # A write-ahead log is emptied by a checkpoint.
    return found.st_dev, found.st_ino, found.st_size > 0 and not path.name.endswith(_COMPANIONS)
