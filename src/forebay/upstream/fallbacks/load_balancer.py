"""The accounts that share calls by their room, as one call sees them: which one it goes to next. Nothing here waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.call_request import CallRequest, Prospect
from forebay.upstream.fallbacks.fallback_routes import FallbackRoute

RouteT = TypeVar("RouteT")

_MOST_CALLS: Final = 1e9  # room that is not bounded
_LEAST_CALLS: Final = 1e-3  # of an account that could send one call now
_RETURNS: Final = 2  # times that a call leaves an account to which it may come back
_MOVES: Final = 8  # times that a call goes from one queue to another
_WORTH_MOVING: Final = 0.5  # of the wait that is left: a call that would wait for less elsewhere moves there
_LEAST_GAIN: Final = 0.25  # seconds that a move must save


def choose_by_room(options: Sequence[tuple[Prospect, float]], draw: float) -> int:
    """Return the number of the account that is chosen for a call.

    It is the account that would send the call soonest. Of several that would send it equally soon, each is chosen with
    a probability in proportion to its room times its weight.

    Args:
        options: of each account, at least one, what the call can expect there, and its weight, above 0.
        draw: a random number in [0, 1).
    """
    soonest = min(prospect.seconds for prospect, _ in options)
    rooms = [
        min(_MOST_CALLS, max(_LEAST_CALLS, prospect.calls)) * weight if prospect.seconds == soonest else 0.0
        for prospect, weight in options
    ]
    left = draw * sum(rooms)
    for number, room in enumerate(rooms):
        left -= room
        if left < 0.0:
            return number
    return max(range(len(rooms)), key=rooms.__getitem__)  # by a rounding error


class Peer(Generic[RouteT]):
    """One of the accounts that share a call.

    Args:
        other: the route there; None for the call's own account.
        account: the account.
        weight: its share.

    Attributes:
        other: as given.
        account: as given.
        weight: as given.
        route: the call, prepared for it, once that was needed.
        visits: how often the call has left it to come back.
        ready_at: the time from which the call may come back.
    """

    __slots__ = ("account", "other", "ready_at", "route", "visits", "weight")

    def __init__(self, other: FallbackRoute | None, account: ThreadSafeAccount, weight: float) -> None:
        self.other = other
        self.account = account
        self.weight = weight
        self.route: RouteT | None = None
        self.visits = 0
        self.ready_at = -math.inf

    def prospect(self, now: float, request: CallRequest) -> Prospect:
        """Return what the call can expect here, the rest of a backoff included."""
        seconds, calls = self.account.prospect_for(request)
        return Prospect(max(seconds, self.ready_at - now), calls)


class LoadBalancer(Generic[RouteT]):
    """The accounts that share one call, as far as they have not ended it.

    Args:
        peers: the accounts, the call's own first.
        request: the needs of the call.
        drawn: its own account was chosen among them already, for calls like this one: it is taken if it is free.
    """

    def __init__(self, peers: Sequence[Peer[RouteT]], request: CallRequest, *, drawn: bool) -> None:
        self._all = tuple(peers)
        self._open = list(peers)
        self._request = request
        self._drawn = drawn
        self._moves = 0

    def choose(self, now: float, draw: Callable[[], float]) -> Peer[RouteT] | None:
        """Return the account to try next; None if all have ended the call.

        Args:
            now: the time.
            draw: returns random numbers from [0, 1).
        """
        drawn, self._drawn = self._drawn, False
        if drawn and self._open and self._open[0].prospect(now, self._request).seconds <= 0.0:
            return self._open[0]
        if not self._open:
            return None
        options = [(peer.prospect(now, self._request), peer.weight) for peer in self._open]
        return self._open[choose_by_room(options, draw())]

    def find(self, route: RouteT) -> Peer[RouteT] | None:
        """Return the account of a route; None if it is not one of those that share the call."""
        return next((peer for peer in self._all if peer.route is route), None)

    def close(self, peer: Peer[RouteT]) -> None:
        """Note that an account has ended the call: it rejected it, or the last attempt there is over."""
        if peer in self._open:
            self._open.remove(peer)

    def load(self) -> float:
        """Return the load of the least loaded account for the call, see `ThreadSafeAccount.load_for`."""
        return min((peer.account.load_for(self._request) for peer in self._open), default=math.inf)

    def leave_failed(self, now: float, peer: Peer[RouteT], delay: float) -> bool:
        """Return whether a call that failed at an account goes elsewhere, instead of waiting there for a retry.

        It does if another account would send it sooner. It may come back once that delay is over.

        Args:
            now: the time.
            peer: the account.
            delay: seconds until the retry.
        """
        if peer.visits >= _RETURNS:
            return False
        here = max(delay, peer.account.prospect_for(self._request).seconds)
        for other in self._open:
            if other is peer:
                continue
            seconds = other.prospect(now, self._request).seconds
            if seconds < here or (seconds == here < math.inf and not other.visits):
                peer.visits += 1
                peer.ready_at = now + delay
                return True
        return False

    def leave_queue(self, now: float, peer: Peer[RouteT], seconds: float) -> bool:
        """Return whether a call that still waits for `seconds` in the queue of an account moves to another one.

        It does if it could be sent there at once, or in half of the time.
        """
        if self._moves >= _MOVES:
            return False
        enough = max(0.0, min(_WORTH_MOVING * seconds, seconds - _LEAST_GAIN))
        others = (other for other in self._open if other is not peer)
        if not any(other.prospect(now, self._request).seconds <= enough for other in others):
            return False
        self._moves += 1
        return True
