"""The URL by which a user names a store, and its options."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from forebay.errors import InvalidOverflowUrl
from forebay.storage.redis_url import REDIS_FORM, REDIS_SCHEMES, RedisUrl, parse_redis_url
from forebay.storage.shown_url import shown_option, shown_url, shown_value

DEFAULT_BOUND = 100_000  # tasks

_COUNT = re.compile(r"[1-9][0-9]{0,17}")  # within SQLite's integers
_STORE = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
_QUEUE_NAME = re.compile(r"([A-Za-z0-9_-]+)(\.fifo)?")
_MAX_QUEUE_NAME = 80 - len("-critical")  # characters, ".fifo" included; each priority has a queue of its own


class Fsync(Enum):
    """The durability of a SQLite commit: when the file is synced to the disk, which SQLite calls `synchronous`.

    An acknowledged write then survives:

    ==========  =====================  ===============================  ==========================================
    value       the process is killed  the machine loses power          costs
    ==========  =====================  ===============================  ==========================================
    YES         yes                    yes                              one fsync per group of writes (the default)
    CHECKPOINT  yes                    all but the last moments         an fsync per checkpoint of the log
    NO          yes                    no, and the file may be damaged  none
    ==========  =====================  ===============================  ==========================================
    """

    YES = "yes"
    CHECKPOINT = "checkpoint"
    NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class SqsUrl:
    """The queues of an overflow on SQS, and its index.

    Attributes:
        queue: the name of the queues, without that of the priority, which is appended.
        fifo: True if they are FIFO queues.
        endpoint: the address of the service; None: that of the region.
        region: None: by the environment or the configuration file of the service.
        create: True if queues that are missing are made.
        results: the store that holds the index; None: it is in memory.
    """

    queue: str
    fifo: bool = False
    endpoint: str | None = None
    region: str | None = None
    create: bool = True
    results: StoreUrl | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUrl:
    """A store as a user named it.

    Attributes:
        scheme: the kind of store, such as ``"sqlite"`` or ``"memory"``.
        path: the file, absolute; None if the store has none.
        bound: how many tasks may wait or be leased in it.
        fsync: what a committed write survives; only SQLite has it here, that of Redis is in `redis`.
        sqs: only SQS has it.
        redis: the master; None for other stores.
    """

    scheme: str
    path: Path | None = None
    bound: int = DEFAULT_BOUND
    fsync: Fsync = Fsync.YES
    sqs: SqsUrl | None = None
    redis: RedisUrl | None = None


def parse_url(url: str) -> StoreUrl:
    """Return the store that a URL names. A relative path is resolved against the current directory.

    Raises:
        InvalidOverflowUrl: the URL has none of the known forms, or an option is unknown or out of range.
    """
    try:
        return _parse(_split(url))
    except ValueError as error:
        raise InvalidOverflowUrl(url=shown_url(url), why=str(error), forms=known_forms()) from None


def known_forms() -> str:
    """Return the forms of all URLs of stores, for a message."""
    forms = ", ".join(dict.fromkeys(kind.form for kind in _KINDS.values()))
    return f"{forms}, each with ?bound=TASKS for how many tasks may wait or run in it (by default {DEFAULT_BOUND:,})"


def _split(url: str) -> SplitResult:
    if not _STORE.match(url):
        raise ValueError("it does not begin with the name of a store and ://")
    try:
        return urlsplit(url)
    except ValueError:  # whose message may have the password
        raise ValueError("its host is malformed") from None


def _parse(parts: SplitResult) -> StoreUrl:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError("an option is given twice")
    if (kind := _KINDS.get(parts.scheme)) is None:
        raise ValueError(f"there is no store {parts.scheme!r}")
    store = kind.parse(parts, options, _bound(options))
    if options:
        raise ValueError(f"it has no option {shown_option(min(options))!r}")
    return store


def _memory(parts: SplitResult, options: dict[str, str], bound: int) -> StoreUrl:  # noqa: ARG001 - it has no options
    if parts.netloc or parts.path:
        raise ValueError("a store in memory has no name or path")
    return StoreUrl(scheme="memory", bound=bound)


def _sqlite(parts: SplitResult, options: dict[str, str], bound: int) -> StoreUrl:
    return StoreUrl(scheme="sqlite", path=_path(parts), bound=bound, fsync=_fsync(options))


def _sqs(parts: SplitResult, options: dict[str, str], bound: int) -> StoreUrl:
    name = _QUEUE_NAME.fullmatch(parts.netloc)
    if name is None or parts.path.strip("/") or parts.fragment or len(parts.netloc) > _MAX_QUEUE_NAME:
        allowed = f'letters, digits, "-" and "_", at most {_MAX_QUEUE_NAME} with the ".fifo" of a FIFO queue'
        raise ValueError(f"it names no queue ({allowed}); credentials are taken from the environment")
    endpoint, create = options.pop("endpoint", None), options.pop("create", "yes")
    if endpoint is not None and not _is_endpoint(endpoint):
        raise ValueError("its endpoint is not an address such as https://host:port, without credentials")
    if create not in {"yes", "no"}:
        raise ValueError("its option create is neither yes nor no")
    results = options.pop("results", None)
    sqs = SqsUrl(
        queue=name[1],
        fifo=name[2] is not None,
        endpoint=endpoint,
        region=options.pop("region", None),
        create=create == "yes",
        results=None if results is None else _index(results, bound),
    )
    return StoreUrl(scheme="sqs", bound=bound, sqs=sqs)


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname) and "@" not in parts.netloc


def _index(url: str, bound: int) -> StoreUrl:
    """Return the store that holds the index of a queue service, with the bound of the whole."""
    store = _parse(_split(url))
    if store.sqs is not None:
        raise ValueError("its option results names a queue, and must name a store with results")
    if store.bound != DEFAULT_BOUND:
        raise ValueError("bound is an option of the overflow, and not of its results")
    return replace(store, bound=bound)


def _path(parts: SplitResult) -> Path:
    if parts.netloc:
        raise ValueError('a relative path follows three slashes, an absolute one four: "sqlite:///" + str(path)')
    if parts.fragment:
        raise ValueError("a '#' in a path is written %23")
    path = unquote(parts.path.removeprefix("/"))
    if path == ":memory:":
        raise ValueError("a store in memory is memory://")
    if not path or path.endswith("/") or "\0" in path:
        raise ValueError("it names no file")
    return Path(path).absolute()


def _redis(parts: SplitResult, options: dict[str, str], bound: int) -> StoreUrl:
    return StoreUrl(scheme=parts.scheme, bound=bound, redis=parse_redis_url(parts, options))


def _bound(options: dict[str, str]) -> int:
    text = options.pop("bound", str(DEFAULT_BOUND))
    if not _COUNT.fullmatch(text):
        raise ValueError(f"bound={shown_value(text)} is not a whole number of tasks of at least 1")
    return int(text)


def _fsync(options: dict[str, str]) -> Fsync:
    if "synchronous" in options:  # its name before the first release
        raise ValueError("synchronous= is now fsync=, and full is yes, normal is checkpoint, off is no")
    text = options.pop("fsync", Fsync.YES.value)
    try:
        return Fsync(text)
    except ValueError:
        raise ValueError(f"fsync={shown_value(text)} is none of yes, checkpoint, no") from None


@dataclass(frozen=True, slots=True)
class _Kind:
    """The URLs of one kind of store: their form, and the function that parses the rest of one.

    The function removes the options that it knows.
    """

    form: str
    parse: Callable[[SplitResult, dict[str, str], int], StoreUrl]


_KINDS = {
    "sqlite": _Kind("sqlite:///relative.db, sqlite:////absolute.db (?fsync=yes, checkpoint or no)", _sqlite),
    "memory": _Kind("memory://", _memory),
    "sqs": _Kind("sqs://queue (?endpoint=, region=, create=yes or no, results=URL of another store)", _sqs),
    **dict.fromkeys(REDIS_SCHEMES, _Kind(REDIS_FORM, _redis)),
}
