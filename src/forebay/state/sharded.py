"""State that agents share, spread over shards: keys with values and versions, and compare-and-set."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import msgspec

from forebay import _validate
from forebay.clock import draw
from forebay.errors import Conflict, InvalidShardUrl, InvalidStateKey, InvalidStateValue
from forebay.state.entry import Entry, StoredEntry, Versioned
from forebay.state.guarded_shard import GuardedShard
from forebay.state.moving import Move, Rebalanced
from forebay.state.near_cache import NearCache, NearCacheStatistics
from forebay.state.placement import Placement, unit_of
from forebay.state.shard import ANY_VERSION, WriteRefused
from forebay.state.shard_load import StateLoad
from forebay.state.shard_url import WeightedShard, open_shard
from forebay.storage.shown_url import shown_url

if TYPE_CHECKING:
    from forebay.state.shard import Shard

_MAX_KEY = 1_024  # bytes in UTF-8; a namespace may have as many
_MAX_VALUE = 8 << 20  # bytes, encoded
_MIN_TTL = 0.001  # seconds
_MAX_TTL = 10 * 365 * 86_400.0  # seconds
_PAGE = 100  # entries that a scan asks a shard for
_MAX_BACKOFF = 0.1  # seconds that an update waits after a conflict
_BASE_BACKOFF = 0.001  # seconds, doubled after each conflict

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Namespace:
    """The keys of one name: those of other namespaces are apart, and may be the same.

    The keys of a namespace are on one shard, in one node of a cluster. `ShardedState` itself is the namespace without a
    name: its keys are spread over all shards.
    """

    def __init__(self, state: _Shards, name: str) -> None:
        self._state = state
        self._name = name

    @property
    def name(self) -> str:
        """The whole name, with those of the namespaces that it is in; empty for the state itself."""
        return self._name

    def namespace(self, name: str) -> Namespace:
        """Return a namespace within this one. Nothing is made by that: namespaces need not be created.

        Raises:
            InvalidStateKey: the name is empty, too long, or no text.
        """
        _check_text("namespace", name)
        # Of two names, one with a slash and one within another, the same must not come out.
        inner = name.replace("%", "%25").replace("/", "%2F")
        whole = f"{self._name}/{inner}" if self._name else inner
        _check_text("namespace", whole)
        return Namespace(self._state, whole)

    async def get(self, key: str) -> Versioned | None:
        """Return the value of `key` with its version; None if there is none, or it has expired.

        Raises:
            InvalidStateKey: it is no key.
            ShardUnavailable: its shard is down; the message names it.
        """
        return await self._read(key, cached=True)

    async def _read(self, key: str, *, cached: bool) -> Versioned | None:
        encoded = _check_text("key", key)
        state = self._state
        if state.move is not None:
            await state.move.settle(self._name, encoded)
        shard = state.place(self._name, encoded)
        found = await shard.call(shard.shard.get, self._name, encoded, cached=cached)
        return None if found is None else Versioned(_decode(found.data), found.version)

    async def put(self, key: str, value: Any, ttl: float | None = None, if_version: int | None = None) -> int:
        """Write `value`, and return its version.

        Args:
            key: 1 to 1,024 bytes in UTF-8; any characters.
            value: plain data, up to 8 MiB: None, bool, numbers, str, bytes, lists, dicts, aware datetimes. A tuple
                comes back as a list.
            ttl: seconds after which it expires; None: it does not, even if the value before it would have.
            if_version: write only if the key has this version; 0: only if there is none.

        Raises:
            Conflict: the key has another version.
            InvalidStateKey, InvalidStateValue, InvalidSetting: an argument is invalid.
            ShardUnavailable: its shard is down; the message names it.
            ShardAnswerLost: so is it, and it may have written the value, or do it yet.
        """
        encoded, data = _check_text("key", key), _encode_value(key, value)
        _check_ttl(ttl)
        expected = _check_version(if_version)
        state = self._state
        floor = None if state.move is None else await state.move.settle(self._name, encoded)
        shard = state.place(self._name, encoded)
        try:
            return await shard.call(shard.shard.put, self._name, encoded, data, ttl, expected, floor=floor)
        except WriteRefused as refused:
            raise Conflict(key=key, expected=expected, found=refused.found) from None

    async def update(
        self, key: str, change: Callable[[Any], Any | Awaitable[Any]], ttl: float | None = None
    ) -> Versioned:
        """Replace the value of `key` by what `change` makes of it, and return that with its version.

        `change` is called again with the new value if another writer was faster; so it must do nothing but compute. It
        gets None for a key that there is not, and may be async.

        Raises:
            Exception: what `change` raises; nothing was written.
            ShardUnavailable, ShardAnswerLost, InvalidStateKey, InvalidStateValue, InvalidSetting: as `put`.
        """
        conflicts = 0
        while True:
            found = await self._read(key, cached=False)  # of a stale value it would make a conflict
            value, version = (None, 0) if found is None else found
            new = change(value)
            if inspect.isawaitable(new):
                new = await new
            try:
                return Versioned(new, await self.put(key, new, ttl=ttl, if_version=version))
            except Conflict:
                conflicts += 1
                await asyncio.sleep(draw() * min(_MAX_BACKOFF, _BASE_BACKOFF * 2.0 ** min(conflicts, 10)))

    async def delete(self, key: str, if_version: int | None = None) -> bool:
        """Delete `key`, and return whether it was there.

        Raises:
            Conflict: the key has another version than `if_version`.
            InvalidStateKey, InvalidSetting: an argument is invalid.
            ShardUnavailable, ShardAnswerLost: as `put`.
        """
        encoded = _check_text("key", key)
        expected = _check_version(if_version)
        state = self._state
        floor = None if state.move is None else await state.move.settle(self._name, encoded)
        shard = state.place(self._name, encoded)
        try:
            return await shard.call(shard.shard.delete, self._name, encoded, expected, floor=floor)
        except WriteRefused as refused:
            raise Conflict(key=key, expected=expected, found=refused.found) from None

    async def scan(
        self, prefix: str = "", *, reverse: bool = False, after: str | None = None, limit: int | None = None
    ) -> AsyncIterator[Entry]:
        """Yield the entries whose keys begin with `prefix`, by the order of their code points.

        An entry that is written or deleted meanwhile is yielded or not; all others are, once each.

        Args:
            prefix: a plain text, with no characters that match others.
            reverse: the last ones first.
            after: leave out the keys up to this one, and this one; with `reverse`, this one and those after it. It need
                not be a key that there is.
            limit: how many at most; a shard is asked for no more. None: all.

        Raises:
            InvalidStateKey: the prefix or `after` is no text.
            InvalidSetting: the limit is negative.
            ShardUnavailable: a shard is down that may have such keys.
        """
        encoded = _check_text("prefix", prefix, minimum=0)
        start = None if after is None else _check_text("after", after, minimum=0)
        if limit is not None:
            _validate.check_whole("scan", "limit", limit, minimum=0)
        if limit == 0:
            return
        page = _PAGE if limit is None else min(limit, _PAGE)
        left = limit
        async for each in self._state.entries(self._name, encoded, start, page, reverse=reverse):
            yield _entry(each)
            if left is not None:
                left -= 1
                if not left:
                    return

    def shard_of(self, key: str) -> str:
        """Return the URL of the shard that has `key`, without user and password.

        Raises:
            InvalidStateKey: it is no key.
        """
        return self._state.place(self._name, _check_text("key", key)).url


class ShardedState(Namespace):
    """State that agents share, spread over shards. Use it in the event loop that connected it.

    ::

        state = await ShardedState.connect("redis://a", "redis://b", "redis://c")
        async with state:
            await state.put("topic", "rivers")
            value, version = await state.get("topic")
            await state.namespace("agent-7").update("calls", lambda calls: (calls or 0) + 1)
    """

    @classmethod
    async def connect(
        cls,
        *shards: str | Shard,
        timeout: float = 5.0,  # noqa: ASYNC109 - of each later call
        moving_from: Sequence[str | Shard] | None = None,
        near_cache: int | None = None,
    ) -> Self:
        """Connect to the shards, and return the state on them.

        A shard that cannot be reached is down: its keys fail until it is back.

        Args:
            shards: the URLs of the shards: ``redis://host:port/0``, ``redis+sentinel://host:port,.../service/0``,
                ``redis+cluster://host:port,...`` (with ``?name=``, ``replicas=``, ``fsync=``), ``sqlite:///file.db``,
                or ``memory://``; each with ``?weight=`` for its share of the keys. Keys are placed by the
                URL as it is written, without user, password and options but ``name``: the order is free, and a shard
                that is written in another way is another one.
            timeout: seconds that a shard may take to answer before it is down.
            moving_from: the shards as they were given before, if one was added or removed, or has another weight. Then
                an operation on a key whose shard has changed moves its entry first, and `rebalance` moves all. End all
                processes that use the former shards before the first one starts with the new ones.
            near_cache: entries of shards on Redis that `get` may answer from memory, up to 64 MiB of them; None: none.
                The servers tell when one has changed, so another process's write is seen as soon as that message
                arrives; this one's own at once. `update` and all writes decide by the servers' entries.

        Raises:
            InvalidShardUrl: a URL is malformed or given twice.
            InvalidSetting: no shard is given, the timeout is no positive number, moving_from is no list of shards, or
                near_cache no positive number.
            StoreNotInstalled: a library is missing.
        """
        _validate.check_positive("ShardedState.connect", "timeout", timeout, unit="seconds")
        if not shards:
            _validate.reject("ShardedState.connect", "shards", shards, "at least one URL of a shard")
        if moving_from is not None and (
            not moving_from or isinstance(moving_from, str) or not isinstance(moving_from, Sequence)
        ):
            expected = "a list of the shards as they were given before, or left out if none has changed"
            shown = shown_url(moving_from) if isinstance(moving_from, str) else moving_from  # it may have a password
            _validate.reject("ShardedState.connect", "moving_from", shown, expected)
        if near_cache is not None:
            _validate.check_whole("ShardedState.connect", "near_cache", near_cache)
        state = cls(_Shards(shards, timeout, moving_from, near_cache), "")
        try:
            await state._state.open()
        except BaseException:  # what is connected by now, nobody else could close
            await state.close()
            raise
        return state

    async def close(self) -> None:
        """Finish what is pending and disconnect. Idempotent."""
        await self._state.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def down(self) -> Mapping[str, str]:
        """The shards that are down, by their URLs, and why."""
        return self._state.down

    @property
    def near_cache(self) -> NearCacheStatistics | None:
        """The use of the near cache; None without one."""
        return self._state.near_cache

    async def rebalance(self, progress: Callable[[Rebalanced], object] | None = None) -> Rebalanced:
        """Move all entries to the shards that have their keys now, and return how many were moved.

        The state is used meanwhile. Once this has returned, all entries are in their places, and processes can be
        restarted without `moving_from`. If it is cancelled or fails, what was moved stays moved, and another call, in
        any process, goes on with the rest. Several processes may do it at a time.

        Args:
            progress: is called after each hundred entries or so.

        Raises:
            InvalidSetting: the state was connected without `moving_from`.
            ShardUnavailable: a shard is down; the message names it.
        """
        return await self._state.rebalance(progress)


class _Shards:
    """The shards of a state, and the placement of keys among them.

    Attributes:
        move: the move of keys from their former shards, on which an operation waits for its key; None: there is none.
    """

    def __init__(
        self,
        urls: Sequence[str | Shard],
        timeout: float,
        moving_from: Sequence[str | Shard] | None = None,
        near_cache: int | None = None,
    ) -> None:
        self._near_cache = None if near_cache is None else NearCache(near_cache)
        opened = _opened(urls, self._near_cache)
        former = [] if moving_from is None else _opened(moving_from, None)
        shards, load = {each.shard.url: each for each in (*former, *opened)}, StateLoad()
        self._by_url = {
            url: GuardedShard(each.shard, each.weight, load, timeout=timeout) for url, each in shards.items()
        }
        self._placement = Placement({each.shard.url: each.weight for each in opened})
        self._only = self._by_url[opened[0].shard.url] if len(opened) == 1 else None
        self.move: Move | None = None
        if moving_from is not None:
            old = Placement({each.shard.url: each.weight for each in former})
            self.move = Move(self._by_url, old, self._placement)

    async def open(self) -> None:
        await asyncio.gather(*(shard.open() for shard in self._by_url.values()))

    async def close(self) -> None:
        await asyncio.gather(*(shard.close() for shard in self._by_url.values()))

    @property
    def down(self) -> Mapping[str, str]:
        return {url: shard.why_down for url, shard in self._by_url.items() if shard.is_down}

    @property
    def near_cache(self) -> NearCacheStatistics | None:
        return None if self._near_cache is None else self._near_cache.statistics

    def place(self, namespace: str, key: bytes) -> GuardedShard:
        """Return the shard of a key."""
        return self._only or self._by_url[self._placement.shard_of(unit_of(namespace, key))]

    def entries(
        self, namespace: str, prefix: bytes, after: bytes | None, page: int, *, reverse: bool
    ) -> AsyncIterator[StoredEntry]:
        """Return the entries of a scan, by the order of their keys; a shard is asked for `page` of them at a time."""
        urls = self._placement.shards
        shards = [self.place(namespace, b"")] if namespace else [self._by_url[url] for url in urls]
        if self.move is not None:
            return self.move.entries(namespace, prefix, after, page, shards, reverse=reverse)
        streams = [_entries(shard, namespace, prefix, after, page, reverse=reverse) for shard in shards]
        return streams[0] if len(streams) == 1 else _merge(streams, reverse=reverse)

    async def rebalance(self, progress: Callable[[Rebalanced], object] | None) -> Rebalanced:
        if self.move is None:
            expected = "the shards as they were given before, for rebalance() to have something to move"
            _validate.reject("ShardedState.connect", "moving_from", None, expected)
        return await self.move.rebalance(progress)


def _opened(urls: Sequence[str | Shard], near_cache: NearCache | None) -> Sequence[WeightedShard]:
    """Return the shards, not opened yet.

    Raises:
        InvalidShardUrl: a URL is malformed, or given twice.
    """
    opened = [open_shard(url, near_cache) for url in urls]
    names = [each.shard.url for each in opened]
    for name in names:
        if names.count(name) > 1:
            raise InvalidShardUrl(url=name, why="it is given twice", forms="each shard once")
    return opened


def _entry(stored: StoredEntry) -> Entry:
    return Entry(stored.key.decode(), _decode(stored.data), stored.version)


async def _entries(  # noqa: PLR0913 - what a scan takes
    shard: GuardedShard, namespace: str, prefix: bytes, after: bytes | None, limit: int, *, reverse: bool
) -> AsyncIterator[StoredEntry]:
    while True:
        page = await shard.call(shard.shard.scan, namespace, prefix, after, limit, reverse=reverse)
        for entry in page.entries:
            yield entry
        after = page.after
        if after is None:
            return


async def _merge(streams: list[AsyncIterator[StoredEntry]], *, reverse: bool) -> AsyncIterator[StoredEntry]:
    """Yield the entries of several streams, each of which is in order, in order."""
    heads = dict[int, StoredEntry]()

    async def advance(index: int) -> None:
        head = await anext(streams[index], None)
        if head is None:
            heads.pop(index, None)
        else:
            heads[index] = head

    await asyncio.gather(*(advance(index) for index in range(len(streams))))
    choose = max if reverse else min
    while heads:
        index = choose(heads, key=lambda each: heads[each].key)
        yield heads[index]
        await advance(index)


def _check_text(what: str, text: object, *, minimum: int = 1) -> bytes:
    """Return a key, a prefix or the name of a namespace in UTF-8.

    Raises:
        InvalidStateKey: it is invalid.
    """
    if not isinstance(text, str):
        why = f"of type {type(text).__name__}"
    else:
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            why = "a str with half of a surrogate pair, which is no text"
        else:
            if minimum <= len(encoded) <= _MAX_KEY:
                return encoded
            why = f"{len(encoded):,} bytes long"
    raise InvalidStateKey(what=what, why=why, expected=f"a str of {minimum} to {_MAX_KEY:,} bytes in UTF-8")


def _encode_value(key: str, value: object) -> bytes:
    try:
        data = _encode(value)
        _decode(data)  # what cannot be read, such as a dict with an object for a key, would break each scan over it
    except (TypeError, OverflowError, ValueError, RecursionError, msgspec.DecodeError) as error:
        why = (
            str(error)
            if isinstance(error, TypeError)
            else f"a {type(value).__name__} does not fit ({type(error).__name__})"
        )
        expected = "plain data: None, bool, numbers within 64 bits, str, bytes, lists, dicts or aware datetimes"
        raise InvalidStateValue(key=key, why=why, expected=expected) from None
    if len(data) > _MAX_VALUE:
        why = f"it has {len(data):,} bytes"
        raise InvalidStateValue(key=key, why=why, expected=f"at most {_MAX_VALUE:,} bytes, or store it in parts")
    return data


def _check_ttl(ttl: object) -> None:
    if ttl is not None and not (_validate.is_number(ttl) and _MIN_TTL <= ttl <= _MAX_TTL):
        _validate.reject("put", "ttl", ttl, f"a number of seconds from {_MIN_TTL} to {_MAX_TTL:,.0f}, or None")


def _check_version(if_version: object) -> int:
    if if_version is None:
        return ANY_VERSION
    _validate.check_whole("put", "if_version", if_version, minimum=0)
    return if_version  # type: ignore[return-value]
