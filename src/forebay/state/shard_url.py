"""The URL by which a user names a shard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from forebay.errors import InvalidOverflowUrl, InvalidShardUrl, StoreNotInstalled
from forebay.state.memory import MemoryShard
from forebay.state.shard import Shard
from forebay.state.sqlite import SqliteShard
from forebay.storage import StoreUrl, parse_url
from forebay.storage.redis_url import REDIS_FORM, RedisUrl
from forebay.storage.shown_url import shown_url

if TYPE_CHECKING:
    from forebay.state.near_cache import NearCache

_FORMS = (
    f"{REDIS_FORM}, sqlite:///relative.db, sqlite:////absolute.db (?fsync=), memory://, each with ?weight= for its"
    " share of the keys (by default 1)"
)
_MEMBERS = ["url", *(name for name in vars(Shard) if not name.startswith("_"))]  # of a shard
_WEIGHT = re.compile(r"[?&]weight=([^&]*)")


class WeightedShard(NamedTuple):
    """A shard, not opened yet, and its share of the keys compared with the others'."""

    shard: Shard
    weight: float


def open_shard(url: str | Shard, near_cache: NearCache | None = None) -> WeightedShard:
    """Return the shard that a URL names; a shard is returned as it is.

    Args:
        url: as users write it.
        near_cache: for a shard that can have one; None: it has none.

    Raises:
        InvalidShardUrl: the URL has none of the known forms.
        StoreNotInstalled: the library that it needs is not installed.
    """
    if not isinstance(url, str):
        if missing := [name for name in _MEMBERS if not hasattr(url, name)]:
            raise InvalidShardUrl(url=url, why=_why_no_shard(url, missing), forms=_FORMS)
        return WeightedShard(url, 1.0)
    try:
        return _open(url, near_cache)
    except ValueError as error:
        why = error.why if isinstance(error, InvalidOverflowUrl) else str(error)
        raise InvalidShardUrl(url=shown_url(url), why=why, forms=_FORMS) from None


def _why_no_shard(value: object, missing: Sequence[str]) -> str:
    kind = type(value).__name__
    if isinstance(value, list | tuple):
        return f"it is a {kind}; give each shard as an argument of its own: connect(*shards)"
    if isinstance(value, PurePath):
        return f'it is a {kind}; for a SQLite file, write "sqlite:///" + str(path)'
    if len(missing) < len(_MEMBERS):
        return f"it is a {kind}, and a shard of your own also needs {', '.join(missing)}: see forebay.state.Shard"
    return f"it is a {kind}, not a URL or a shard"


def _open(url: str, near_cache: NearCache | None) -> WeightedShard:
    rest, weight = _weight(url)
    store = parse_url(rest)
    if "bound" in dict(parse_qsl(urlsplit(rest).query)):
        raise ValueError("bound is an option of an overflow, and not of a shard")
    match store:
        case StoreUrl(scheme="memory"):
            return WeightedShard(MemoryShard(), weight)
        case StoreUrl(scheme="sqlite", path=Path() as path, fsync=fsync):
            # Not by the absolute path: the files may move together with the working directory.
            written = unquote(urlsplit(rest).path.removeprefix("/"))
            return WeightedShard(SqliteShard(path, f"sqlite:///{written}", fsync=fsync), weight)
        case StoreUrl(redis=RedisUrl() as redis):
            return WeightedShard(_redis_shard(redis, near_cache), weight)
        case _:
            raise ValueError(f"{store.scheme}:// keeps no state")


def _weight(url: str) -> tuple[str, float]:
    """Return `url` without its weight, and the weight."""
    given = _WEIGHT.findall(url)
    if not given:
        return url, 1.0
    try:
        weight = float(given[0])
    except ValueError:
        weight = 0.0
    if len(given) > 1 or not (isfinite(weight) and weight > 0):
        raise ValueError("weight= is given twice, or is not a positive number")
    rest = _WEIGHT.sub("", url, count=1)
    return rest if "?" in rest else rest.replace("&", "?", 1), weight


def _redis_shard(url: RedisUrl, near_cache: NearCache | None) -> Shard:
    try:
        from forebay.state.redis import RedisShard  # noqa: PLC0415 - it needs a library
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise StoreNotInstalled(where=str(url), library="redis", extra="redis") from None
    return RedisShard(url, near_cache)
