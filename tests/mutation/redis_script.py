"""A change to the script that Redis runs for the overflow."""

from __future__ import annotations

import hashlib

from tests.mutation.injection import NothingToChange

from forebay.overflow import redis


def change_script(old: str, new: str) -> None:
    """Put `new` in the only place of `old` in the script."""
    if redis._SCRIPT.count(old) != 1:
        raise NothingToChange(f"the script has no such text, or several: {old}")
    redis._SCRIPT = redis._SCRIPT.replace(old, new)
    redis._SHA = hashlib.sha1(redis._SCRIPT.encode()).hexdigest()  # noqa: S324 - the name that Redis gives it
