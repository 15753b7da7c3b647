"""Fallback routes: the other accounts that can serve a call. Nothing here waits."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.any_of import AnyOf
from forebay.upstream.core import UpstreamCore
from forebay.upstream.fallbacks.even_draws import EvenDraws
from forebay.upstream.fallbacks.fallback import Fallback, FallbackTarget
from forebay.upstream.weak_lru import WeakLRU

_CACHED = 1_000  # models whose routes are kept; combinations of accounts whose load source is kept


class FallbackRoute(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Another account that can serve a call.

    Attributes:
        upstream: the `Upstream` that the account belongs to.
        model: the model's name there.
        fallback: the setting that leads there.
        load_threshold: the load of the call's own account from which the call goes there.
        other_upstream: the account belongs to another upstream than the call's own.
        base_url: address of the API there; None for the address of the call.
        api_key: key to send there; None for the call's own upstream, or if there is no key.
        reachable: a request can be sent there: the address or the key is known.
        weight: the account's share of calls; None if it serves only those that others do not.
    """

    upstream: FallbackTarget
    model: str
    fallback: Fallback
    load_threshold: float
    other_upstream: bool
    base_url: str | None
    api_key: str | None
    reachable: bool
    weight: float | None

    def __repr__(self) -> str:
        return f"FallbackRoute({self.upstream.name!r}, {self.model!r})"

    @property
    def core(self) -> UpstreamCore:
        """The upstream's accounts, money and retries."""
        return self.upstream.core

    def auth_headers(self, own_key: str) -> dict[str, str]:
        """Return the headers with the API key for a request that is sent there.

        Args:
            own_key: the authentication header of the call.
        """
        if self.api_key is None:
            return {}
        if self.core.provider == "azure":
            return {"api-key": self.api_key}
        bearer = own_key.lower().startswith("bearer ")  # Anthropic's SDK sends one from version 2 on
        if self.core.profile.protocol == "anthropic" and not bearer:
            return {"x-api-key": self.api_key}
        return {"authorization": f"Bearer {self.api_key}"}

    def account(self, own_key: str) -> ThreadSafeAccount:
        """Return the account, for a call with the API key `own_key`."""
        key = next(iter(self.auth_headers(own_key).values()), "") if self.other_upstream else own_key
        return self.core.accounts.account(self.model, key)


def _find_routes(upstream: FallbackTarget, peers: Sequence[Fallback], model: str) -> tuple[FallbackRoute, ...]:
    """Return the routes by which a call of `model` can fall back, in order.

    The fallbacks of each upstream are followed once, so there are no loops. Two routes may lead to the same account,
    which only the API key of a call shows.
    """
    found = [_route(peer, upstream, model, None) for peer in peers]
    followed = {upstream.core}
    queue: deque[tuple[FallbackTarget, str, FallbackRoute | None]] = deque([(upstream, model, None)])
    for route in found:
        if route.core not in followed:
            followed.add(route.core)
            queue.append((route.upstream, route.model, route))
    while queue:
        here, name, before = queue.popleft()
        for fallback in here.fallbacks:
            if not fallback.applies_to(name):
                continue
            route = _route(fallback, here, name, before)
            found.append(route)
            if route.core not in followed:
                followed.add(route.core)
                queue.append((route.upstream, route.model, route))
    return tuple(found)


def _route(fallback: Fallback, here: FallbackTarget, model: str, before: FallbackRoute | None) -> FallbackRoute:
    """Return the route of one fallback of `here` for calls of `model`, which got there by the route `before`."""
    shares = before is None or before.weight is not None  # calls come here at any load
    threshold = fallback.load_threshold
    if before is not None and not shares:
        threshold = max(before.load_threshold, threshold)
    weight = fallback.weight if shares else None
    reachable = fallback.is_reachable and (before is None or before.reachable)
    base_url = None if before is None else before.base_url
    if isinstance(fallback.to, str):
        return FallbackRoute(
            upstream=here,
            model=fallback.to,
            fallback=fallback,
            load_threshold=threshold,
            other_upstream=before is not None,
            base_url=base_url,
            api_key=None if before is None else before.api_key,
            reachable=reachable,
            weight=weight,
        )
    return FallbackRoute(
        upstream=fallback.to,
        model=fallback.model or model,
        fallback=fallback,
        load_threshold=threshold,
        other_upstream=True,
        base_url=fallback.base_url or base_url,
        api_key=fallback.api_key,
        reachable=reachable,
        weight=weight,
    )


class FallbackResolver:
    """Finds the fallback routes of one upstream, and remembers them by model.

    Args:
        upstream: the upstream whose fallbacks are followed.
        peers: share the calls that come here, before any of its own fallbacks; each has a weight.
        own_weight: share of calls of the upstream's own account.
        drawn: the upstream was chosen among its peers already, for calls like the next one.

    Attributes:
        has_fallbacks: there are other accounts that can serve a call.
        own_weight: as given.
        drawn: as given.
        draw: returns the numbers by which the peers share calls.
    """

    def __init__(
        self,
        upstream: FallbackTarget,
        peers: Sequence[Fallback] = (),
        *,
        own_weight: float = 1.0,
        drawn: bool = False,
    ) -> None:
        self.has_fallbacks = bool(upstream.fallbacks) or bool(peers)
        self.own_weight = own_weight
        self.drawn = drawn
        self.draw = EvenDraws()
        self._routes = functools.lru_cache(_CACHED)(functools.partial(_find_routes, upstream, tuple(peers)))
        self._any_of: WeakLRU[tuple[ThreadSafeAccount, ...], AnyOf] = WeakLRU(_CACHED)

    def routes(self, model: str) -> tuple[FallbackRoute, ...]:
        """Return the routes by which a call of `model` can fall back, in order."""
        return self._routes(model)

    def accounts(
        self, own: ThreadSafeAccount, routes: Iterable[FallbackRoute], key: str = ""
    ) -> list[tuple[FallbackRoute, ThreadSafeAccount]]:
        """Return the routes to other accounts than the call's own, one for each, with the account.

        Args:
            own: the call's own account.
            routes: in order.
            key: the API key of the call.
        """
        found: dict[ThreadSafeAccount, FallbackRoute] = {}
        for route in routes:
            account = route.account(key)
            if account is not own:
                found.setdefault(account, route)
        return [(route, account) for account, route in found.items()]

    def any_of(self, accounts: Sequence[ThreadSafeAccount]) -> AnyOf:
        """Return the load source of these accounts, the call's own first: always the same one, as runs keep it."""
        name = " or ".join(account.name for account in accounts)
        return self._any_of.get(tuple(accounts), lambda members: AnyOf(name, lambda: members))
