"""The accounts that one call tries, one after another, and the result for its caller. Nothing here waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, Protocol, Self, TypeAlias, TypeVar

import msgspec

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.interfaces import Outcome
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.any_of import AnyOf
from forebay.upstream.call_request import AttemptResult, CallRequest
from forebay.upstream.core import UpstreamCore
from forebay.upstream.fallbacks.fallback import FallbackTarget
from forebay.upstream.fallbacks.fallback_routes import FallbackResolver, FallbackRoute
from forebay.upstream.fallbacks.load_balancer import LoadBalancer, Peer


class CallRoute(Protocol):
    """A call, prepared for one account."""

    @property
    def core(self) -> UpstreamCore:
        """The upstream that the account belongs to."""

    @property
    def account(self) -> ThreadSafeAccount:
        """The account."""

    @property
    def call_request(self) -> CallRequest:
        """The needs of the call."""

    @property
    def api_key(self) -> str:
        """The API key of the call, as its header has it."""

    def throttled_error(self) -> Overloaded | None:
        """Return the provider's latest answer as an error if it throttled the call, else None."""

    def describe_failure(self) -> str:
        """Return a description of the latest attempt's failure, for a person."""

    def mark_out_of_time(self, result: AttemptResult) -> None:
        """Mark the answer in a result as one after which no time was left for another attempt."""

    def may_use_key(self, route: FallbackRoute) -> bool:
        """Return whether the call may be sent with the key of `route`, if that has one: the caller is no stranger."""

    def key_refused(self) -> bool:
        """Return whether the provider's latest answer refuses the key (401, 403)."""

    def held_key_invalid(self) -> bool:
        """Return whether the provider's latest answer calls the key invalid (401), and it is not its caller's own."""

    def record_key(self, *, tried: bool) -> None:
        """Note what the call's own provider said about the key of the call.

        Args:
            tried: it did not refuse the key, as far as known: it served the call, or it could not.
        """

    def can_reroute(self, route: FallbackRoute) -> bool:
        """Return whether the call could be served there, by a cheap check."""

    def reroute(self, route: FallbackRoute) -> Self | None:
        """Return the call, prepared for another account; None if it cannot be served there."""


RouteT = TypeVar("RouteT", bound=CallRoute)


class PlainRoute:
    """A `CallRoute` of a call whose content is not known here: a permit taken by hand, a guarded function.

    Args:
        upstream: the `Upstream` that the account belongs to.
        account: the account.
        call_request: the needs of the call.
        request_at: returns the needs of the call at another upstream or model; None if it cannot fall back.
    """

    __slots__ = ("_request_at", "account", "call_request", "core", "upstream")

    api_key: Final = ""

    def __init__(
        self,
        upstream: FallbackTarget,
        account: ThreadSafeAccount,
        call_request: CallRequest,
        request_at: Callable[[UpstreamCore, str], CallRequest] | None = None,
    ) -> None:
        self.upstream = upstream
        self.core = upstream.core
        self.account = account
        self.call_request = call_request
        self._request_at = request_at

    def throttled_error(self) -> None:
        """See `CallRoute`. The provider's answer is not seen here."""

    def describe_failure(self) -> str:
        """See `CallRoute`."""
        return f"{self.core.name}: the call failed there"

    def mark_out_of_time(self, result: AttemptResult) -> None:
        """See `CallRoute`. The provider's answer is not seen here."""

    def may_use_key(self, route: FallbackRoute) -> bool:  # noqa: ARG002 - see CallRoute
        """See `CallRoute`. The call is made in this process."""
        return True

    def key_refused(self) -> bool:
        """See `CallRoute`. The provider's answer is not seen here."""
        return False

    def held_key_invalid(self) -> bool:
        """See `CallRoute`. The provider's answer is not seen here."""
        return False

    def record_key(self, *, tried: bool) -> None:
        """See `CallRoute`."""

    def can_reroute(self, route: FallbackRoute) -> bool:  # noqa: ARG002 - see CallRoute
        """See `CallRoute`."""
        return self._request_at is not None

    def reroute(self, route: FallbackRoute) -> PlainRoute:
        """See `CallRoute`."""
        assert self._request_at is not None  # noqa: S101 - or it is not rerouted
        request = self._request_at(route.core, route.model)
        return PlainRoute(route.upstream, route.account(self.api_key), request, self._request_at)


_STRANGER: Final = "it serves calls whose own key was accepted before, and this one's was not yet"
_Other: TypeAlias = tuple[FallbackRoute, ThreadSafeAccount]


def _is_less_loaded(other: _Other, load: float) -> bool:
    """Return whether calls of an account with this load go to another first: over its threshold, and less loaded."""
    route, account = other
    return route.load_threshold < 1.0 and route.load_threshold <= load and account.load_for() < load


class FallbackChain(Generic[RouteT]):
    """The routes of one call, in the order in which they are tried.

    Accounts that are less loaded than the call's own come first, if its own has reached their load threshold; then its
    own; then the others. None is tried after the call's deadline. If none serves the call, its caller gets the answer
    of its own account or provider.

    Routes with a weight stand with the call's own: each time the account that would send it soonest is tried, and the
    caller gets the answer that is most use to it.

    Args:
        own: the call, prepared for its own account.
        others: the other routes, each with its account.
        any_of: all these accounts as one load source.
        own_weight: share of calls of its own account, if others share them.
        drawn: its own account was chosen among those that share it already.
        draw: returns numbers from [0, 1), by which calls are shared.

    Raises:
        Overloaded: all of them have rejected an earlier call of the same run.
    """

    def __init__(  # noqa: PLR0913 - what it chooses among, and how
        self,
        own: RouteT,
        others: Sequence[tuple[FallbackRoute, ThreadSafeAccount]],
        any_of: AnyOf,
        *,
        own_weight: float = 1.0,
        drawn: bool = False,
        draw: Callable[[], float] = clock.draw,
    ) -> None:
        self.own = own
        self._draw = draw
        self._balancer = _balancer(own, others, own_weight=own_weight, drawn=drawn)
        others = [other for other in others if other[0].weight is None]
        self._any_of = any_of
        self._run = context.call_observer()
        self._thresholds = [route.load_threshold for route, _ in others]
        if self._run is not None:
            self._run.record_call(any_of)
            if (error := self._run.rejection_by(any_of)) is not None:
                raise error
        load = self._own_load()
        ahead = [other for other in others if own.may_use_key(other[0]) and _is_less_loaded(other, load)]
        behind = [other for other in others if other not in ahead]
        self._untried: deque[_Other | None] = deque([*ahead, None, *behind])  # None: own
        self._own_result: Overloaded | AttemptResult | None = None
        self._own_route = own  # whose result that is
        self._left = False  # the latest attempt's account, to which the call may come back
        self._other_failures: list[str] = []
        self._retry_after: list[float] = []

    def _own_load(self) -> float:
        """Return the load of the call's own account for this call; 0 if no threshold depends on it."""
        if min(self._thresholds, default=1.0) >= 1.0:
            return 0.0
        return self.own.account.load_for(self.own.call_request) if self._balancer is None else self._balancer.load()

    def next(self) -> RouteT | None:
        """Return the next route to try; None when there is none left."""
        while self._untried:
            if self._own_result is not None and self.own.call_request.deadline <= clock.now():
                return None
            other = self._untried.popleft()
            if other is None:
                if self._balancer is None:
                    return self.own
                if (balanced := self._next_balanced(self._balancer)) is not None:
                    self._untried.appendleft(None)  # until all of them have ended the call
                    return balanced
                continue
            if not self.own.may_use_key(other[0]):
                self._other_failures.append(f"{other[0].core.name}: {_STRANGER}")
            elif (route := self.own.reroute(other[0])) is not None:
                return route
        return None

    def _next_balanced(self, balancer: LoadBalancer[RouteT]) -> RouteT | None:
        """Return the next route among the accounts that share the call; None if all have ended it."""
        while (peer := balancer.choose(clock.now(), self._draw)) is not None:
            if peer.route is None:
                assert peer.other is not None  # noqa: S101 - its own is prepared
                if self.own.may_use_key(peer.other):
                    peer.route = self.own.reroute(peer.other)
            if peer.route is not None:
                peer.route.call_request.asked_at = min(peer.route.call_request.asked_at, self.own.call_request.asked_at)
                return peer.route
            balancer.close(peer)
        return None

    def pause(self, route: RouteT) -> float:
        """Return the seconds to wait before a call comes back to an account where it failed."""
        peer = None if self._balancer is None else self._balancer.find(route)
        return 0.0 if peer is None else max(0.0, peer.ready_at - clock.now())

    def judge(self, route: RouteT, result: AttemptResult) -> None:
        """Correct the result of an attempt at an account that shares the call: another one has another key.

        An account whose key is refused (401) serves nobody, so that counts as a fault of the account if the key is the
        operator's.
        """
        if self._balancer is None or result.streaming or not route.key_refused() or not self._balancer.find(route):
            return
        result.can_fall_back = True
        if route.held_key_invalid():
            result.outcome = msgspec.structs.replace(result.outcome, kind=Outcome.FAULT)

    def leaves_queue(self, route: RouteT) -> Callable[[float], bool] | None:
        """Return what tells, by the seconds left to wait, whether the call leaves the queue; None if it never does."""
        balancer = self._balancer
        if balancer is None or (peer := balancer.find(route)) is None:
            return None
        return lambda seconds: balancer.leave_queue(clock.now(), peer, seconds)

    def leaves_failed(self, route: RouteT, delay: float) -> bool:
        """Return whether a call that failed goes to another account, instead of waiting `delay` seconds for a retry."""
        peer = None if self._balancer is None else self._balancer.find(route)
        if peer is None or self._balancer is None:
            return False
        self._left = self._balancer.leave_failed(clock.now(), peer, delay)
        return self._left

    def skips_retry(self, route: RouteT) -> bool:
        """Return whether a throttled call goes to the next account at once, instead of waiting for a retry here."""
        if route is not self.own or not self._untried or self._balancer is not None:
            return False
        load = self._own_load()
        return any(other is not None and _is_less_loaded(other, load) for other in self._untried)

    def record_rejection(self, route: RouteT, error: Overloaded) -> None:
        """Note that the account of `route` has rejected the call."""
        if self._end_balanced(route):
            self._keep(route, error)
            self._other_failures.append(error.reason)
            if error.retry_after is not None:
                self._retry_after.append(error.retry_after)
        elif route is self.own:
            self._own_result = error
            if route.call_request.retries:
                route.record_key(tried=True)
        else:
            self._other_failures.append(error.reason)
            if error.retry_after is not None:
                self._retry_after.append(error.retry_after)

    def record_result(self, route: RouteT, result: AttemptResult) -> bool:
        """Note the result of `route`, and return whether the caller gets it."""
        left, self._left = self._left, False
        if left or self._end_balanced(route):
            if not result.can_fall_back:
                return True
            self._keep(route, result)
            self._other_failures.append(route.describe_failure())
        elif route is self.own:
            route.record_key(tried=result.can_fall_back or result.outcome.kind is Outcome.SUCCESS)
            if not result.can_fall_back:
                return True
            self._own_result = result
        elif result.outcome.kind is Outcome.SUCCESS:
            self.own.account.count_served_by_fallback()
            return True
        else:
            self._other_failures.append(route.describe_failure())
        return False

    def _end_balanced(self, route: RouteT) -> bool:
        """Close the account of `route`, if it shares the call; return whether it does."""
        peer = None if self._balancer is None else self._balancer.find(route)
        if peer is None or self._balancer is None:
            return False
        self._balancer.close(peer)
        return True

    def _keep(self, route: RouteT, result: Overloaded | AttemptResult) -> None:
        """Keep the result of an account that shares the call, if it is more use to the caller than the one before."""
        if self._own_result is None or _usefulness(route, result) < _usefulness(self._own_route, self._own_result):
            self._own_result, self._own_route = result, route

    def conclude(self) -> AttemptResult:
        """Return the caller's result when no account has served the call. A rejection is reported to the run.

        Raises:
            Overloaded: the call's own account rejected it. The reason includes the failures of the others.
        """
        own = self._own_result
        if isinstance(own, Overloaded):
            raise self._rejection(own)
        assert own is not None  # noqa: S101 - the own route is in every chain
        if (error := self._own_route.throttled_error()) is not None:
            self._rejection(error)
        return own

    def _rejection(self, own: Overloaded) -> Overloaded:
        """Return the rejection by all accounts, and report it to the run."""
        after = [*self._retry_after, *([] if own.retry_after is None else [own.retry_after])]
        error = Overloaded(
            "; ".join(dict.fromkeys([own.reason, *self._other_failures])),
            limited_by=own.limited_by,
            load=own.load,
            retry_after=min(after, default=None),
        )
        if self._run is not None:
            self._run.record_rejection(self._any_of, error)
        return error


def _balancer(own: RouteT, others: Sequence[_Other], *, own_weight: float, drawn: bool) -> LoadBalancer[RouteT] | None:
    """Return the accounts that share a call; None if its own is the only one."""
    peers: list[Peer[RouteT]] = [
        Peer(route, account, route.weight) for route, account in others if route.weight is not None
    ]
    if not peers:
        return None
    first: Peer[RouteT] = Peer(None, own.account, own_weight)
    first.route = own
    return LoadBalancer([first, *peers], own.call_request, drawn=drawn)


def _usefulness(route: CallRoute, result: Overloaded | AttemptResult) -> tuple[int, float]:
    """Return the order of results by what they are worth to the caller: that it may try again, and when, comes first.

    That a key was refused comes last: it is not its caller's, and others have other keys.
    """
    if isinstance(result, Overloaded):
        return (2, 0.0) if result.retry_after is None else (0, result.retry_after)
    return (3, 0.0) if route.key_refused() else (1, 0.0)


def make_chain(own: RouteT, resolver: FallbackResolver) -> FallbackChain[RouteT] | None:
    """Return the chain of a call; None if only its own account can serve it.

    Raises:
        Overloaded: all accounts of the chain have rejected an earlier call of the same run.
    """
    routes = resolver.routes(own.call_request.model)
    if not routes:
        return None
    fitting = (route for route in routes if own.can_reroute(route))
    others = resolver.accounts(own.account, fitting, own.api_key)
    if not others:
        return None
    any_of = resolver.any_of([own.account, *(account for _, account in others)])
    return FallbackChain(own, others, any_of, own_weight=resolver.own_weight, drawn=resolver.drawn, draw=resolver.draw)
