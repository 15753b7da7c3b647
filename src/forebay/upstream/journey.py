"""One call on its way through the accounts that may serve it: which is next, and what its caller gets in the end.

`Journey` decides, and waits for nothing; `travel` and `travel_blocking` go where it says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.typing import Outcome
from forebay.upstream.ask import Ask
from forebay.upstream.attempt import Tried
from forebay.upstream.desk import Desk
from forebay.upstream.stops import Choice, Stop

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream


class Leg(Protocol):
    """A call, made ready for one account."""

    @property
    def upstream(self) -> Upstream:
        """Whose account it is."""

    @property
    def desk(self) -> Desk:
        """Of the account."""

    @property
    def ask(self) -> Ask:
        """What it asks of it."""

    def turned_away(self) -> Overloaded | None:
        """What its provider's latest answer comes to, if that was *not now*."""

    def words(self) -> str:
        """What its latest attempt came to, for a person."""


LegT = TypeVar("LegT", bound=Leg)


class Bare:
    """A leg of a call that is no request of ours: its maker knows how to send it."""

    __slots__ = ("ask", "desk", "upstream")

    def __init__(self, upstream: Upstream, desk: Desk, ask: Ask) -> None:
        self.upstream = upstream
        self.desk = desk
        self.ask = ask

    def turned_away(self) -> None:
        """See `Leg`. What no provider is seen of never is."""

    def words(self) -> str:
        """See `Leg`."""
        return f"{self.upstream.name}: it failed there"


class Journey(Generic[LegT]):
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
        stops: Sequence[tuple[Stop, Desk]],
        choice: Choice,
        make: Callable[[Stop, Desk], LegT | None],
    ) -> None:
        self.first = first
        self._make = make
        self._choice = choice
        self._run = context.drawing()
        self._whens = [stop.when for stop, _ in stops]
        if self._run is not None:
            self._run.meet(choice)
            if self._run.refusals and (error := self._run.refusals.get(choice)) is not None:
                raise error
        load = self._load()
        ahead = [way for way in stops if way[0].when < 1.0 and way[0].when <= load and way[1].load_for() < load]
        after = [way for way in stops if way not in ahead]
        self._left: deque[tuple[Stop, Desk] | None] = deque([*ahead, None, *after])  # None is its own
        self._own: Overloaded | Tried | None = None
        self._said: list[str] = []
        self._retry_after: list[float] = []

    def _load(self) -> float:
        """That of its own account for this call, if it matters."""
        return self.first.desk.load_for(self.first.ask) if min(self._whens) < 1.0 else 0.0

    def next(self) -> LegT | None:
        """The call for the account whose turn it is; None when there is none left."""
        while self._left:
            if self._own is not None and self.first.ask.deadline <= clock.now():
                return None
            way = self._left.popleft()
            leg = self.first if way is None else self._make(*way)
            if leg is not None:
                return leg
        return None

    def hurries(self, leg: LegT) -> bool:
        """Whether a call that was answered *not now* goes on at once, rather than wait and try there again."""
        if leg is not self.first or not any(self._left):
            return False
        load = self._load()
        return any(when < 1.0 and when <= load for when in self._whens)

    def refused(self, leg: LegT, error: Overloaded) -> None:
        """An account has refused it."""
        if leg is self.first:
            self._own = error
        else:
            self._said.append(error.reason)
            if error.retry_after is not None:
                self._retry_after.append(error.retry_after)

    def came(self, leg: LegT, tried: Tried) -> bool:
        """What its attempts came to; whether that is what its caller gets."""
        if leg is self.first:
            if not tried.elsewhere:
                return True
            self._own = tried
        elif tried.ended.outcome is Outcome.SUCCESS:
            self.served(leg)
            return True
        else:
            self._said.append(leg.words())
        return False

    def served(self, leg: LegT) -> None:
        """Its caller has what it asked for, from this account."""
        if leg is not self.first:
            self.first.desk.sent_on += 1

    def end(self) -> Tried:
        """None has served it: what its caller gets, which the run that is under way hears of.

        Raises:
            Overloaded: its own account has refused it; the reason says what the others did.
        """
        own = self._own
        if isinstance(own, Overloaded):
            raise self._refusal(own.reason, own)
        assert own is not None  # noqa: S101 - its own turn comes in every journey
        if (refusal := self.first.turned_away()) is not None:
            self._refusal(refusal.reason, refusal)
        return own

    def _refusal(self, reason: str, own: Overloaded) -> Overloaded:
        after = [*self._retry_after, *([] if own.retry_after is None else [own.retry_after])]
        error = Overloaded(
            "; ".join([reason, *self._said]),
            binding=own.binding,
            load=own.load,
            retry_after=min(after, default=None),
        )
        if self._run is not None:
            self._run.refused(self._choice, error)
        return error


def journey_of(
    first: LegT,
    make: Callable[[Stop, Desk], LegT | None],
    *,
    key: str = "",
    fits: Callable[[Stop], bool] = lambda _: True,
) -> Journey[LegT] | None:
    """The journey of a call that another account might serve; None if there is no other.

    Args:
        first: the call, for its own account.
        make: readies it for another; None where that cannot answer it.
        key: its API key.
        fits: whether another could answer it, as far as that is known beforehand.

    Raises:
        Overloaded: the run was refused by all of them before.
    """
    detours = first.upstream.detours
    ways = detours.desks(first.desk, (stop for stop in detours.stops(first.ask.model) if fits(stop)), key)
    if not ways:
        return None
    return Journey(first, ways, detours.choice([first.desk, *(desk for _, desk in ways)]), make)


async def travel(journey: Journey[LegT], make: Callable[[LegT], Awaitable[Tried]]) -> Tried:
    """Make a call at one account after another; what its caller gets.

    Raises:
        Overloaded: its own account has refused it, and no other has served it.
    """
    while (leg := journey.next()) is not None:
        try:
            tried = await make(leg)
        except Overloaded as error:
            journey.refused(leg, error)
            continue
        if journey.came(leg, tried):
            return tried
    return journey.end()


def travel_blocking(journey: Journey[LegT], make: Callable[[LegT], Tried]) -> Tried:
    """As `travel`, in a plain thread."""
    while (leg := journey.next()) is not None:
        try:
            tried = make(leg)
        except Overloaded as error:
            journey.refused(leg, error)
            continue
        if journey.came(leg, tried):
            return tried
    return journey.end()
