"""The URL by which a user names a store, read into what it says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from forebay.errors import InvalidOverflowUrl

DEFAULT_BOUND = 100_000  # rows


class Synchronous(Enum):
    """How hard SQLite presses a commit onto the disk before it is acknowledged. What then survives:

    ========  =====================  ==================================  ==========================================
    value     the process is killed  the machine loses power             costs
    ========  =====================  ==================================  ==========================================
    FULL      everything             everything                          one fsync per group of writes (the default)
    NORMAL    everything             the file, but not the last moments  an fsync per checkpoint of the log
    OFF       everything             perhaps nothing: the file may be    none
                                     damaged
    ========  =====================  ==================================  ==========================================
    """

    FULL = "full"
    NORMAL = "normal"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUrl:
    """A store as a user named it.

    Attributes:
        scheme: ``"sqlite"`` or ``"memory"``.
        path: the file, absolute; None if there is none.
        bound: rows that it may hold.
        synchronous: what a commit survives, in SQLite.
    """

    scheme: str
    path: Path | None = None
    bound: int = DEFAULT_BOUND
    synchronous: Synchronous = Synchronous.FULL


def parse_url(url: str) -> StoreUrl:
    """Read a store's URL. A relative path is taken from where the process stands now.

    Raises:
        InvalidOverflowUrl: it is none of the known forms, or an option is unknown or out of range.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidOverflowUrl(url=url, why=str(error)) from None
    options = _options(url, parts)
    bound = _bound(url, options.pop("bound", None))
    match parts.scheme:
        case "memory":
            store = StoreUrl(scheme="memory", bound=bound)
            if parts.netloc or parts.path:
                raise InvalidOverflowUrl(url=url, why="a ledger in memory has no name or path")
        case "sqlite":
            synchronous = _synchronous(url, options.pop("synchronous", None))
            store = StoreUrl(scheme="sqlite", path=_path(url, parts), bound=bound, synchronous=synchronous)
        case scheme:
            why = f"there is no store {scheme!r}" if scheme else "it does not begin with a store's name and ://"
            raise InvalidOverflowUrl(url=_without_password(url, parts), why=why)
    if options:
        raise InvalidOverflowUrl(url=url, why=f"it has no option {min(options)!r}")
    return store


def _options(url: str, parts: SplitResult) -> dict[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs):
        raise InvalidOverflowUrl(url=_without_password(url, parts), why="an option is given twice")
    return options


def _path(url: str, parts: SplitResult) -> Path:
    if parts.netloc:
        raise InvalidOverflowUrl(url=url, why="a path follows three slashes, an absolute one four")
    if parts.fragment:
        raise InvalidOverflowUrl(url=url, why="a '#' in a path is written %23")
    path = unquote(parts.path.removeprefix("/"))
    if path == ":memory:":
        raise InvalidOverflowUrl(url=url, why="a ledger in memory is memory://")
    if not path or path.endswith("/") or "\0" in path:
        raise InvalidOverflowUrl(url=url, why="it names no file")
    return Path(path).absolute()


def _bound(url: str, text: str | None) -> int:
    if text is None:
        return DEFAULT_BOUND
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 2**63:
        raise InvalidOverflowUrl(url=url, why=f"bound={text} is not a number of rows, at least 1")
    return int(text)


def _synchronous(url: str, text: str | None) -> Synchronous:
    if text is None:
        return Synchronous.FULL
    try:
        return Synchronous(text.lower())
    except ValueError:
        raise InvalidOverflowUrl(url=url, why=f"synchronous={text} is none of full, normal, off") from None


def _without_password(url: str, parts: SplitResult) -> str:
    """The URL fit to be shown: a mistyped scheme must not put a password into a log."""
    userinfo, at, _ = parts.netloc.rpartition("@")
    return url.replace(userinfo + at, "***@", 1) if at else url
