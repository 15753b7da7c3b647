"""Where a call may go: its own account, and those that its upstream's fallbacks lead to. Nothing here waits."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from forebay.task import Priority
from forebay.typing import Source
from forebay.upstream.desk import Desk
from forebay.upstream.fallback import Fallback
from forebay.upstream.kept import Kept

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream

_KEPT = 1_000  # models whose stops are kept, and choices


class Stop(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Another account by which a call may be served.

    Attributes:
        upstream: whose account it is.
        model: what the model is called there.
        by: the fallback that leads here.
        when: the load of the call's own account from which it is sent here.
        elsewhere: it is not the call's own upstream.
        base_url: where it is; None: where the call was going.
        api_key: as whom; None where it is the call's own upstream, or asks for none.
        reached: whether it is known how a request can be sent there.
    """

    upstream: Upstream
    model: str
    by: Fallback
    when: float
    elsewhere: bool
    base_url: str | None
    api_key: str | None
    reached: bool

    def __repr__(self) -> str:
        return f"Stop({self.upstream.name!r}, {self.model!r})"

    def auth(self, own: str) -> dict[str, str]:
        """The header that says as whom a request is sent there, where that of the call says `own`."""
        if self.api_key is None:
            return {}
        if self.upstream.provider == "azure":
            return {"api-key": self.api_key}
        bears = own.lower().startswith("bearer ")  # as Anthropic's SDK says it from its second version on
        if self.upstream.rules.protocol == "anthropic" and not bears:
            return {"x-api-key": self.api_key}
        return {"authorization": f"Bearer {self.api_key}"}

    def key(self, own: str) -> str:
        """The API key whose account it is of, where that of the call is `own`."""
        return next(iter(self.auth(own).values()), "") if self.elsewhere else own

    def desk(self, own: str) -> Desk:
        """That of its account, where the API key of the call is `own`."""
        return self.upstream.books.desk(self.model, self.key(own))


def stops_of(upstream: Upstream, model: str) -> tuple[Stop, ...]:
    """Where a call of `model` may be sent on to, in order.

    The fallbacks of each upstream are followed once, so there are no loops. Which of these are the same account as
    another is seen once the call's key is known.
    """
    found: list[Stop] = []
    followed = {upstream}
    coming: deque[tuple[Upstream, str, Stop | None]] = deque([(upstream, model, None)])
    while coming:
        here, name, before = coming.popleft()
        for fallback in here.fallbacks:
            if not fallback.serves(name):
                continue
            stop = _stop(fallback, here, name, before)
            found.append(stop)
            if stop.upstream not in followed:
                followed.add(stop.upstream)
                coming.append((stop.upstream, stop.model, stop))
    return tuple(found)


def _stop(fallback: Fallback, here: Upstream, name: str, before: Stop | None) -> Stop:
    """Where a fallback of `here` leads for calls of model `name`, which came there by `before`."""
    when = fallback.when if before is None else max(before.when, fallback.when)
    reached = fallback.reaches and (before is None or before.reached)
    if isinstance(fallback.to, str):
        return Stop(
            upstream=here,
            model=fallback.to,
            by=fallback,
            when=when,
            elsewhere=before is not None,
            base_url=None if before is None else before.base_url,
            api_key=None if before is None else before.api_key,
            reached=reached,
        )
    return Stop(
        upstream=fallback.to,
        model=fallback.model or name,
        by=fallback,
        when=when,
        elsewhere=True,
        base_url=fallback.base_url or (None if before is None else before.base_url),
        api_key=fallback.api_key,
        reached=reached,
    )


class Detours:
    """What the fallbacks of one upstream lead to, by model and key, once it was asked for."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._lock = threading.Lock()
        self._stops: OrderedDict[str, tuple[Stop, ...]] = OrderedDict()
        self._choices: Kept[tuple[Desk, ...], Choice] = Kept(_KEPT)

    def stops(self, model: str) -> tuple[Stop, ...]:
        """Where a call of `model` may be sent on to, in order."""
        with self._lock:
            stops = self._stops.get(model)
            if stops is None:
                stops = self._stops[model] = stops_of(self._upstream, model)
                if len(self._stops) > _KEPT:
                    self._stops.popitem(last=False)
        return stops

    def desks(self, own: Desk, stops: Iterable[Stop], key: str = "") -> list[tuple[Stop, Desk]]:
        """The accounts of `stops` for a call of account `own`, under the API key `key`, each of them once."""
        found: dict[Desk, Stop] = {}
        for stop in stops:
            desk = stop.desk(key)
            if desk is not own:
                found.setdefault(desk, stop)
        return [(stop, desk) for desk, stop in found.items()]

    def choice(self, desks: Sequence[Desk]) -> Choice:
        """What stands for all of these; the same for the same, since a run remembers it."""
        return self._choices.get(tuple(desks), Choice)


class Choice:
    """Several accounts by any of which the calls of a run may be served, as one `Source`: the least loaded tells.

    A run that any of them could serve is not refused, nor held back, because another is full.

    Args:
        desks: of the accounts, the call's own first.
    """

    def __init__(self, desks: Sequence[Desk]) -> None:
        self.desks = tuple(desks)
        self.name = " or ".join(desk.name for desk in desks)

    @property
    def parts(self) -> Sequence[Source]:
        """See `forebay.typing.Source`."""
        return self.desks

    def load(self, rung: Priority = Priority.NORMAL) -> tuple[float, str]:
        """See `forebay.typing.Source`."""
        return min(desk.load(rung) for desk in self.desks)

    def room(self, rung: Priority, load: float) -> tuple[float, float]:
        """See `forebay.typing.Source`."""
        return min(desk.room(rung, load) for desk in self.desks)

    def may_start(self, rung: Priority) -> bool:
        """See `forebay.typing.Source`."""
        return any(desk.may_start(rung) for desk in self.desks)

    def typical(self) -> float:
        """See `forebay.typing.Source`."""
        return self.desks[0].typical()

    def shuts_out(self, rung: Priority) -> bool:
        """See `forebay.typing.Source`."""
        return all(desk.shuts_out(rung) for desk in self.desks)

    def hold_back(self, who: object, runs: int, rung: Priority = Priority.NORMAL) -> None:
        """See `forebay.typing.Source`. They may come to any of them, so they count in each."""
        for desk in self.desks:
            desk.hold_back((self, who), runs, rung)

    def coming(self, runs: int) -> None:
        """See `forebay.typing.Source`. Likewise."""
        for desk in self.desks:
            desk.coming(runs)

    def on_relief(self, who: object, callback: Callable[[], None]) -> None:
        """See `forebay.typing.Source`."""
        for desk in self.desks:
            desk.on_relief((self, who), callback)

    def forget(self, who: object) -> None:
        """See `forebay.typing.Source`."""
        for desk in self.desks:
            desk.forget((self, who))
