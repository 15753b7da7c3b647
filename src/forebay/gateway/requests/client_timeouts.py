"""Timeouts of callers: from their headers, their user agent, and from those that hung up."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping
from typing import Final, NamedTuple

# Seconds without a byte, of SDKs made by Stainless. Python's send the first one, others only the second.
_TIMEOUT_HEADERS: Final = ("x-stainless-read-timeout", "x-stainless-timeout")
_MAX_TIMEOUT: Final = 86_400.0  # seconds
_DEFAULT_READ_TIMEOUT: Final = 600.0  # seconds without a byte from the provider, as in the SDKs
_GRACE: Final = 5.0  # seconds that the gateway reads longer than its caller, whose own timeout should come first
_MARGIN: Final = 1.0  # seconds before its timeout at which a queued call is rejected, so that the response arrives
_MAX_MARGIN_SHARE: Final = 0.1  # of the timeout

# Seconds that clients wait at their defaults, by the start of the user agent, in lower case. The SDKs for JavaScript
# announce 600 s or nothing, but Node's fetch (undici) gives up after 300 s without a header (`headersTimeout`): seen
# with openai 7.59, @anthropic-ai/sdk 1.14, ai 7.0 and fetch of Node 20. aiohttp's default for a whole call is 300 s.
_BY_USER_AGENT: Final = (
    ("openai/js", 300.0),
    ("anthropic/js", 300.0),
    ("ai/", 300.0),
    ("ai-sdk", 300.0),
    ("node", 300.0),
    ("undici", 300.0),
)
_IN_USER_AGENT: Final = (("aiohttp/", 300.0),)  # "Python/3.13 aiohttp/3.13.0"

_MAX_CLIENTS: Final = 1_000  # kinds of clients that are remembered; forgetting one costs a few callers their answers
_MAX_WAITS: Final = 64  # latest waits of one kind of client
_MIN_WAIT: Final = 2.0  # seconds: shorter waits say nothing, people cancel
_SAME: Final = (1.05, 0.5)  # factor and seconds within which two hang-ups are the same timeout
_MIN_HANG_UPS: Final = 3  # that make a timeout
_TRUSTED_SHARE: Final = 10  # of callers that announce a longer timeout: one long wait outweighs so many hang-ups
_DOUBTED: Final = 10  # calls of which one may wait longer than a learned timeout, to show whether its kind does
_REMEMBERED: Final = 600.0  # seconds since a wait; older ones no longer count


class ClientTimeouts(NamedTuple):
    """The timeouts of a caller.

    Attributes:
        max_wait: seconds that its call may be queued; a response by then still reaches it.
        read_timeout: seconds without a byte from the provider.
    """

    max_wait: float
    read_timeout: float


class AnnouncedTimeouts(NamedTuple):
    """The timeouts that the headers of a request announce.

    Attributes:
        by_header: seconds without a byte, by a header of their own; None if there is none.
        shortest: the seconds that the caller waits, by its headers and its user agent; None if they do not say.
        kind: tells one kind of client from another, see `client_kind`.
    """

    by_header: float | None
    shortest: float | None
    kind: Hashable

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> AnnouncedTimeouts:
        """Return what headers (by lower-case name) announce."""
        by_header = _from_headers(headers)
        known = [each for each in (by_header, _from_user_agent(headers.get("user-agent", ""))) if each is not None]
        return cls(by_header, min(known, default=None), client_kind(headers))


class ClientTimeoutReader:
    """A reader of callers' timeouts that learns from callers who hang up while they wait.

    A timeout shows in hang-ups: of one kind of client they come after equally many seconds, and hardly any wait is
    longer. A person or an agent that cancels does so at any time.

    Callers with the same user agent and key may differ. So one call in ten may wait longer than was learned, and
    callers that announce a longer timeout are believed once a tenth of the waits of their kind are longer. Pure: the
    caller passes the time.

    Args:
        default: seconds that a caller waits if its headers, its user agent and earlier hang-ups do not say.
    """

    def __init__(self, default: float) -> None:
        self._default = default
        self._clients: OrderedDict[Hashable, _Waits] = OrderedDict()

    def change(self, default: float) -> None:
        """Set another default; what was learned stays."""
        self._default = default

    @property
    def knows_hang_ups(self) -> bool:
        """True if a caller has hung up, so that answers count too."""
        return bool(self._clients)

    def read(self, now: float, headers: Mapping[str, str]) -> ClientTimeouts:
        """Return the timeouts of the caller with these headers (by lower-case name)."""
        return self.timeouts(now, AnnouncedTimeouts.read(headers))

    def timeouts(self, now: float, announced: AnnouncedTimeouts) -> ClientTimeouts:
        """Return the timeouts of a caller whose headers announce these."""
        by_header = announced.by_header
        read_timeout = _DEFAULT_READ_TIMEOUT if by_header is None else by_header + _GRACE
        seconds = self._default if announced.shortest is None else announced.shortest
        waits = self._clients.get(announced.kind) if self._clients else None
        if waits is not None:
            seconds = waits.limit(now, seconds, announced=by_header is not None)
        return ClientTimeouts(seconds - min(_MARGIN, _MAX_MARGIN_SHARE * seconds), read_timeout)

    def record_hang_up(self, now: float, headers: Mapping[str, str], waited: float) -> None:
        """Note that a caller left after `waited` seconds without an answer."""
        if waited < _MIN_WAIT:
            return
        kind = client_kind(headers)
        waits = self._clients.setdefault(kind, _Waits())
        self._clients.move_to_end(kind)
        waits.add(now, waited, hung_up=True)
        while len(self._clients) > _MAX_CLIENTS:
            self._clients.popitem(last=False)

    def record_answer(self, now: float, headers: Mapping[str, str], waited: float) -> None:
        """Note that a caller was still there when its answer began, after `waited` seconds."""
        if waited < _MIN_WAIT or not self._clients:
            return
        waits = self._clients.get(client_kind(headers))
        if waits is not None:
            waits.add(now, waited, hung_up=False)


class _Waits:
    """The latest waits of one kind of client, and the timeout that they show."""

    __slots__ = ("_announced_timeout", "_doubted", "_timeout", "_waits")

    def __init__(self) -> None:
        self._waits: deque[tuple[float, float, bool]] = deque(maxlen=_MAX_WAITS)  # when, seconds, hung up
        self._timeout = math.inf
        self._announced_timeout = math.inf  # of callers that announce a longer one
        self._doubted = 0  # calls that said that they wait longer

    def add(self, now: float, waited: float, *, hung_up: bool) -> None:
        self._waits.append((now, waited, hung_up))
        self._timeout = self._find_timeout(now, weight=1)
        self._announced_timeout = self._find_timeout(now, weight=_TRUSTED_SHARE)

    def limit(self, now: float, seconds: float, *, announced: bool) -> float:
        """Return how long a call waits that says `seconds`; `announced`: in a header of its own."""
        timeout = self._announced_timeout if announced else self._timeout
        if timeout >= seconds or now - self._waits[-1][0] > _REMEMBERED:
            return seconds
        self._doubted += 1
        return timeout if self._doubted % _DOUBTED else seconds

    def _find_timeout(self, now: float, *, weight: int) -> float:
        """Return the shortest wait at which several hung up, more than waited longer; infinity if there is none.

        Args:
            now: the time.
            weight: hang-ups that one longer wait outweighs.
        """
        recent = [(waited, hung_up) for when, waited, hung_up in self._waits if now - when <= _REMEMBERED]
        factor, seconds = _SAME
        for candidate in sorted(waited for waited, hung_up in recent if hung_up):
            end = factor * candidate + seconds
            equal = [waited for waited, hung_up in recent if hung_up and candidate <= waited <= end]
            latest = max(equal)
            longer = sum(waited > (end if hung_up else latest) for waited, hung_up in recent)
            if len(equal) >= _MIN_HANG_UPS and len(equal) > weight * longer:
                return candidate
        return math.inf


def client_kind(headers: Mapping[str, str]) -> Hashable:
    """Return what tells one kind of client from another: its user agent and its API key, the latter only as a hash."""
    credentials = (headers.get(name) for name in ("authorization", "x-api-key", "api-key"))
    return hash((headers.get("user-agent", ""), *credentials))


def _from_headers(headers: Mapping[str, str]) -> float | None:
    for header in _TIMEOUT_HEADERS:
        try:
            seconds = float(headers.get(header, "nan"))
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds > 0:
            return min(seconds, _MAX_TIMEOUT)
    return None


def _from_user_agent(user_agent: str) -> float | None:
    user_agent = user_agent.lower()
    for start, seconds in _BY_USER_AGENT:
        if user_agent.startswith(start):
            return seconds
    return next((seconds for part, seconds in _IN_USER_AGENT if part in user_agent), None)
