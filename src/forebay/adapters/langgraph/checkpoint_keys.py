"""The keys under which the entries of a thread are kept, in the namespace of the thread.

========================================== ==========================================================================
``c/<checkpoint_ns>/<checkpoint_id>``      a checkpoint. Ids are ordered by time, so the last key is the latest one.
``b/<checkpoint_ns>/<channel>/<version>``  the value that a channel had in one version; it never changes.
``w/<checkpoint_ns>/<id>/<task_id>``       all writes of one task that follow a checkpoint: one entry, so that there is
                                           no part of them.
``i/<run>``                                says that the thread is in the index, for one of its runs (hashed).
========================================== ==========================================================================

A value that is too large for one entry has further ones, whose keys have its own as a prefix. Texts of others are
quoted, so that a slash only separates; a long one is replaced by its digest, except for ids of checkpoints, which must
sort.
"""

from __future__ import annotations

import hashlib

_MAX_QUOTED = 250  # bytes; a key has up to three such texts and a prefix, and may have 1,024


def quote(text: str) -> str:
    """Return `text` without slashes; different texts stay different."""
    return text.replace("%", "%25").replace("/", "%2F")


def unquote(text: str) -> str:
    """Return the text that was quoted."""
    return text.replace("%2F", "/").replace("%25", "%")


def digest(text: str) -> str:
    """Return a short text in place of `text`."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _short(text: str) -> str:
    quoted = quote(text)
    return quoted if len(quoted.encode(errors="surrogatepass")) <= _MAX_QUOTED else f"%~{digest(text)}"


def checkpoints_prefix(checkpoint_ns: str | None = None) -> str:
    """Return the prefix of the keys of checkpoints, all or those of one checkpoint_ns."""
    return "c/" if checkpoint_ns is None else f"c/{_short(checkpoint_ns)}/"


def after_checkpoints(checkpoint_ns: str) -> str:
    """Return a text between the keys of the checkpoints of a checkpoint_ns and the next ones."""
    return f"c/{_short(checkpoint_ns)}0"  # which follows on the slash


def checkpoint_key(checkpoint_ns: str, checkpoint_id: str) -> str:
    """Return the key of a checkpoint."""
    return f"c/{_short(checkpoint_ns)}/{quote(checkpoint_id)}"


def blobs_prefix(checkpoint_ns: str) -> str:
    """Return the prefix of the keys of the values of channels."""
    return f"b/{_short(checkpoint_ns)}/"


def blob_key(checkpoint_ns: str, channel: str, version: str | float) -> str:
    """Return the key of the value that a channel had in a version."""
    return f"b/{_short(checkpoint_ns)}/{_short(channel)}/{_short(str(version))}"


def writes_prefix(checkpoint_ns: str, checkpoint_id: str | None = None) -> str:
    """Return the prefix of the keys of writes, all of a checkpoint_ns or those of one checkpoint."""
    return f"w/{_short(checkpoint_ns)}/" + ("" if checkpoint_id is None else f"{_short(checkpoint_id)}/")


def writes_key(checkpoint_ns: str, checkpoint_id: str, task_id: str) -> str:
    """Return the key of the writes of a task."""
    return f"w/{_short(checkpoint_ns)}/{_short(checkpoint_id)}/{_short(task_id)}"


def marker_key(run: str | None) -> str:
    """Return the key that says that the thread is in the index for a run; None: for those without an id."""
    return "i/" if run is None else f"i/{digest(run)}"
