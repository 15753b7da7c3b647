"""One call on its way through the accounts that may serve it: which is next, and what its caller gets in the end.

`FallbackChain` decides, and waits for nothing; `travel` and `travel_blocking` go where it says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.interfaces import Outcome
from forebay.upstream.call_flow import AttemptResult
from forebay.upstream.call_request import CallRequest
from forebay.upstream.fallback_routes import AnyOf, FallbackRoute
from forebay.upstream.shared_account import SharedAccount

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream


class CallRoute(Protocol):
    """A call, made ready for one account."""

    @property
    def upstream(self) -> Upstream:
        """Whose account it is."""

    @property
    def account(self) -> SharedAccount:
        """Of the account."""

    @property
    def call_request(self) -> CallRequest:
        """What it asks of it."""

    def throttled_error(self) -> Overloaded | None:
        """What its provider's latest answer comes to, if that was *not now*."""

    def describe_failure(self) -> str:
        """What its latest attempt came to, for a person."""


LegT = TypeVar("LegT", bound=CallRoute)


class PlainRoute:
    """A leg of a call that is no request of ours: its maker knows how to send it."""

    __slots__ = ("account", "call_request", "upstream")

    def __init__(self, upstream: Upstream, desk: SharedAccount, ask: CallRequest) -> None:
        self.upstream = upstream
        self.account = desk
        self.call_request = ask

    def throttled_error(self) -> None:
        """See `CallRoute`. What no provider is seen of never is."""

    def describe_failure(self) -> str:
        """See `CallRoute`."""
        return f"{self.upstream.name}: it failed there"


class FallbackChain(Generic[LegT]):
    """The accounts that one call tries, one after another, until one serves it.

    First those that are less loaded than its own, if that is above the load from which the call goes there; then its
    own; then the others. None is tried once the call's deadline has passed. If none serves it, what its own account
    or provider said stands.

    Args:
        first: the call, for its own account.
        stops: the others, and the desk of each.
        choice: what stands for all of them in the run that is under way.
        make: readies the call for another; None where that cannot answer it.

    Raises:
        Overloaded: the run was refused by all of them before.
    """

    def __init__(
        self,
        first: LegT,
        stops: Sequence[tuple[FallbackRoute, SharedAccount]],
        choice: AnyOf,
        make: Callable[[FallbackRoute, SharedAccount], LegT | None],
    ) -> None:
        self.own = first
        self._make = make
        self._choice = choice
        self._run = context.call_observer()
        self._whens = [stop.load_threshold for stop, _ in stops]
        if self._run is not None:
            self._run.record_call(choice)
            if self._run.rejections and (error := self._run.rejections.get(choice)) is not None:
                raise error
        load = self._load()
        ahead = [
            way
            for way in stops
            if way[0].load_threshold < 1.0 and way[0].load_threshold <= load and way[1].load_for() < load
        ]
        after = [way for way in stops if way not in ahead]
        self._left: deque[tuple[FallbackRoute, SharedAccount] | None] = deque([*ahead, None, *after])  # None is its own
        self._own: Overloaded | AttemptResult | None = None
        self._said: list[str] = []
        self._retry_after: list[float] = []

    def _load(self) -> float:
        """That of its own account for this call, if it matters."""
        return self.own.account.load_for(self.own.call_request) if min(self._whens) < 1.0 else 0.0

    def next(self) -> LegT | None:
        """The call for the account whose turn it is; None when there is none left."""
        while self._left:
            if self._own is not None and self.own.call_request.deadline <= clock.now():
                return None
            way = self._left.popleft()
            leg = self.own if way is None else self._make(*way)
            if leg is not None:
                return leg
        return None

    def skips_retry(self, leg: LegT) -> bool:
        """Whether a call that was answered *not now* goes on at once, rather than wait and try there again."""
        if leg is not self.own or not any(self._left):
            return False
        load = self._load()
        return any(when < 1.0 and when <= load for when in self._whens)

    def record_rejection(self, leg: LegT, error: Overloaded) -> None:
        """An account has refused it."""
        if leg is self.own:
            self._own = error
        else:
            self._said.append(error.reason)
            if error.retry_after is not None:
                self._retry_after.append(error.retry_after)

    def record_result(self, leg: LegT, tried: AttemptResult) -> bool:
        """What its attempts came to; whether that is what its caller gets."""
        if leg is self.own:
            if not tried.can_fall_back:
                return True
            self._own = tried
        elif tried.outcome.kind is Outcome.SUCCESS:
            self.record_served(leg)
            return True
        else:
            self._said.append(leg.describe_failure())
        return False

    def record_served(self, leg: LegT) -> None:
        """Its caller has what it asked for, from this account."""
        if leg is not self.own:
            self.own.account.served_by_fallback += 1

    def conclude(self) -> AttemptResult:
        """None has served it: what its caller gets, which the run that is under way hears of.

        Raises:
            Overloaded: its own account has refused it; the reason says what the others did.
        """
        own = self._own
        if isinstance(own, Overloaded):
            raise self._refusal(own.reason, own)
        assert own is not None  # noqa: S101 - its own turn comes in every journey
        if (refusal := self.own.throttled_error()) is not None:
            self._refusal(refusal.reason, refusal)
        return own

    def _refusal(self, reason: str, own: Overloaded) -> Overloaded:
        after = [*self._retry_after, *([] if own.retry_after is None else [own.retry_after])]
        error = Overloaded(
            "; ".join([reason, *self._said]),
            limited_by=own.limited_by,
            load=own.load,
            retry_after=min(after, default=None),
        )
        if self._run is not None:
            self._run.record_rejection(self._choice, error)
        return error


def make_chain(
    first: LegT,
    make: Callable[[FallbackRoute, SharedAccount], LegT | None],
    *,
    key: str = "",
    fits: Callable[[FallbackRoute], bool] = lambda _: True,
) -> FallbackChain[LegT] | None:
    """The journey of a call that another account might serve; None if there is no other.

    Args:
        first: the call, for its own account.
        make: readies it for another; None where that cannot answer it.
        key: its API key.
        fits: whether another could answer it, as far as that is known beforehand.

    Raises:
        Overloaded: the run was refused by all of them before.
    """
    detours = first.upstream.fallback_resolver
    ways = detours.accounts(
        first.account, (stop for stop in detours.routes(first.call_request.model) if fits(stop)), key
    )
    if not ways:
        return None
    return FallbackChain(first, ways, detours.any_of([first.account, *(desk for _, desk in ways)]), make)


async def run_chain(journey: FallbackChain[LegT], make: Callable[[LegT], Awaitable[AttemptResult]]) -> AttemptResult:
    """Make a call at one account after another; what its caller gets.

    Raises:
        Overloaded: its own account has refused it, and no other has served it.
    """
    while (leg := journey.next()) is not None:
        try:
            tried = await make(leg)
        except Overloaded as error:
            journey.record_rejection(leg, error)
            continue
        if journey.record_result(leg, tried):
            return tried
    return journey.conclude()


def run_chain_blocking(journey: FallbackChain[LegT], make: Callable[[LegT], AttemptResult]) -> AttemptResult:
    """As `travel`, in a plain thread."""
    while (leg := journey.next()) is not None:
        try:
            tried = make(leg)
        except Overloaded as error:
            journey.record_rejection(leg, error)
            continue
        if journey.record_result(leg, tried):
            return tried
    return journey.conclude()
