"""The format in which a store on Redis lays out its keys, written there for the releases to come."""

from __future__ import annotations

from forebay.errors import StoreUnavailable
from forebay.storage.redis_master import RedisMaster
from forebay.storage.redis_url import RedisUrl


def check_format(master: RedisMaster, url: RedisUrl, prefix: str, known: bytes) -> None:
    """Check that what is stored under a prefix has the format that this release knows; if nothing is, write it. Blocks.

    Raises:
        StoreUnavailable: a newer release has written it, or another program.
    """
    key = f"{prefix}format"
    (found,) = master.call(("GET", key))
    if found is None:  # else nothing is written: its memory may be full, and what it has is to end
        _, found = master.call(("SET", key, known, "NX"), ("GET", key))
    if found != known:
        raise other_format(url, prefix, found, known)


def other_format(url: RedisUrl, prefix: str, found: bytes, known: bytes) -> StoreUnavailable:
    """Return the error of a store whose format is not the known one."""
    if found.isdigit() and int(found) > int(known):
        why = f"a newer Forebay wrote {prefix} (format {found.decode()}; this one knows {known.decode()})"
        advice = "Upgrade Forebay here, or give another ?name="
    else:
        why = f"another program wrote {prefix}format ({found[:20]!r}; Forebay writes {known.decode()})"
        advice = "Give another ?name="
    return StoreUnavailable(where=str(url), why=why, advice=advice)
