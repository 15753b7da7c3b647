"""Where a call may go: its own account, and those that its upstream's fallbacks lead to. Nothing here waits."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from forebay.interfaces import LoadSource
from forebay.task import Priority
from forebay.upstream.fallback import Fallback
from forebay.upstream.shared_account import SharedAccount
from forebay.upstream.weak_lru import WeakLRU

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream

_KEPT = 1_000  # models whose stops are kept, and choices


class FallbackRoute(msgspec.Struct, frozen=True, kw_only=True, eq=False):
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
    fallback: Fallback
    load_threshold: float
    other_upstream: bool
    base_url: str | None
    api_key: str | None
    reachable: bool

    def __repr__(self) -> str:
        return f"Stop({self.upstream.name!r}, {self.model!r})"

    def auth_headers(self, own: str) -> dict[str, str]:
        """The header that says as whom a request is sent there, where that of the call says `own`."""
        if self.api_key is None:
            return {}
        if self.upstream.provider == "azure":
            return {"api-key": self.api_key}
        bears = own.lower().startswith("bearer ")  # as Anthropic's SDK says it from its second version on
        if self.upstream.profile.protocol == "anthropic" and not bears:
            return {"x-api-key": self.api_key}
        return {"authorization": f"Bearer {self.api_key}"}

    def account_key(self, own: str) -> str:
        """The API key whose account it is of, where that of the call is `own`."""
        return next(iter(self.auth_headers(own).values()), "") if self.other_upstream else own

    def account(self, own: str) -> SharedAccount:
        """That of its account, where the API key of the call is `own`."""
        return self.upstream.accounts.account(self.model, self.account_key(own))


def resolve_routes(upstream: Upstream, model: str) -> tuple[FallbackRoute, ...]:
    """Where a call of `model` may be sent on to, in order.

    The fallbacks of each upstream are followed once, so there are no loops. Which of these are the same account as
    another is seen once the call's key is known.
    """
    found: list[FallbackRoute] = []
    followed = {upstream}
    coming: deque[tuple[Upstream, str, FallbackRoute | None]] = deque([(upstream, model, None)])
    while coming:
        here, name, before = coming.popleft()
        for fallback in here.fallbacks:
            if not fallback.applies_to(name):
                continue
            stop = _stop(fallback, here, name, before)
            found.append(stop)
            if stop.upstream not in followed:
                followed.add(stop.upstream)
                coming.append((stop.upstream, stop.model, stop))
    return tuple(found)


def _stop(fallback: Fallback, here: Upstream, name: str, before: FallbackRoute | None) -> FallbackRoute:
    """Where a fallback of `here` leads for calls of model `name`, which came there by `before`."""
    when = fallback.load_threshold if before is None else max(before.load_threshold, fallback.load_threshold)
    reached = fallback.is_reachable and (before is None or before.reachable)
    if isinstance(fallback.to, str):
        return FallbackRoute(
            upstream=here,
            model=fallback.to,
            fallback=fallback,
            load_threshold=when,
            other_upstream=before is not None,
            base_url=None if before is None else before.base_url,
            api_key=None if before is None else before.api_key,
            reachable=reached,
        )
    return FallbackRoute(
        upstream=fallback.to,
        model=fallback.model or name,
        fallback=fallback,
        load_threshold=when,
        other_upstream=True,
        base_url=fallback.base_url or (None if before is None else before.base_url),
        api_key=fallback.api_key,
        reachable=reached,
    )


class FallbackResolver:
    """What the fallbacks of one upstream lead to, by model and key, once it was asked for."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._lock = threading.Lock()
        self._stops: OrderedDict[str, tuple[FallbackRoute, ...]] = OrderedDict()
        self._choices: WeakLRU[tuple[SharedAccount, ...], AnyOf] = WeakLRU(_KEPT)

    def routes(self, model: str) -> tuple[FallbackRoute, ...]:
        """Where a call of `model` may be sent on to, in order."""
        with self._lock:
            stops = self._stops.get(model)
            if stops is None:
                stops = self._stops[model] = resolve_routes(self._upstream, model)
                if len(self._stops) > _KEPT:
                    self._stops.popitem(last=False)
        return stops

    def accounts(
        self, own: SharedAccount, stops: Iterable[FallbackRoute], key: str = ""
    ) -> list[tuple[FallbackRoute, SharedAccount]]:
        """The accounts of `stops` for a call of account `own`, under the API key `key`, each of them once."""
        found: dict[SharedAccount, FallbackRoute] = {}
        for stop in stops:
            desk = stop.account(key)
            if desk is not own:
                found.setdefault(desk, stop)
        return [(stop, desk) for desk, stop in found.items()]

    def any_of(self, desks: Sequence[SharedAccount]) -> AnyOf:
        """What stands for all of these; the same for the same, since a run remembers it."""
        return self._choices.get(tuple(desks), AnyOf)


class AnyOf:
    """Several accounts by any of which the calls of a run may be served, as one `Source`: the least loaded tells.

    A run that any of them could serve is not refused, nor held back, because another is full.

    Args:
        desks: of the accounts, the call's own first.
    """

    def __init__(self, desks: Sequence[SharedAccount]) -> None:
        self.members = tuple(desks)
        self.name = " or ".join(desk.name for desk in desks)

    @property
    def accounts(self) -> Sequence[LoadSource]:
        """See `forebay.interfaces.Source`."""
        return self.members

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """See `forebay.interfaces.Source`."""
        return min(desk.load(priority) for desk in self.members)

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:
        """See `forebay.interfaces.Source`."""
        return min(desk.time_until_below(priority, load) for desk in self.members)

    def may_start(self, priority: Priority) -> bool:
        """See `forebay.interfaces.Source`."""
        return any(desk.may_start(priority) for desk in self.members)

    def typical_latency(self) -> float:
        """See `forebay.interfaces.Source`."""
        return self.members[0].typical_latency()

    def blocks(self, priority: Priority) -> bool:
        """See `forebay.interfaces.Source`."""
        return all(desk.blocks(priority) for desk in self.members)

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:
        """See `forebay.interfaces.Source`. They may come to any of them, so they count in each."""
        for desk in self.members:
            desk.hold_back((self, holder), runs, priority)

    def add_expected_calls(self, runs: int) -> None:
        """See `forebay.interfaces.Source`. Likewise."""
        for desk in self.members:
            desk.add_expected_calls(runs)

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        """See `forebay.interfaces.Source`."""
        for desk in self.members:
            desk.on_relief((self, holder), callback)

    def forget(self, holder: object) -> None:
        """See `forebay.interfaces.Source`."""
        for desk in self.members:
            desk.forget((self, holder))
