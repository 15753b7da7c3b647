"""Functions whose calls go through an upstream."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from forebay import clock
from forebay.errors import NotGuardable, Overloaded
from forebay.interfaces import Charge, Outcome
from forebay.upstream.call_drivers import unwrap_result
from forebay.upstream.call_flow import AttemptResult
from forebay.upstream.call_request import CallOutcome, Permit
from forebay.upstream.fallback_chain import FallbackChain, PlainRoute, make_chain, run_chain, run_chain_blocking
from forebay.upstream.fallback_routes import FallbackRoute
from forebay.upstream.shared_account import SharedAccount

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream

P = ParamSpec("P")
T = TypeVar("T")

_THERE = "upstream"  # the parameter by which a function is told where it is to go


def guarded(upstream: Upstream, function: Callable[P, T]) -> Callable[P, T]:
    """See `Upstream.guard`."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise NotGuardable(function=_name(function), made="a generator")
    guard = _Guard(upstream, function)
    wrapped = guard.asynchronous() if _awaits(function) else guard.blocking()
    return functools.wraps(function)(wrapped)


class _Guard:
    """One function, and what it goes through."""

    def __init__(self, upstream: Upstream, function: Callable[..., Any]) -> None:
        self._upstream = upstream
        self._function = function
        self._desk = upstream.accounts.account("")
        self._goes_elsewhere = bool(upstream.fallbacks) and _is_told(function)

    def asynchronous(self) -> Callable[..., Any]:
        """For a coroutine function."""
        function = self._function

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            async def make(leg: PlainRoute, journey: FallbackChain[PlainRoute] | None = None) -> AttemptResult:
                told = kwargs if journey is None else {**kwargs, _THERE: leg.upstream}

                async def attempt(permit: Permit) -> AttemptResult:
                    try:
                        return _done(await function(*args, **told), permit)
                    except Exception as exc:  # noqa: BLE001 - it is raised if it stays so
                        return _failed(exc, permit)

                return await leg.upstream.driver(leg.account, _hurries(journey, leg)).drive(leg.call_request, attempt)

            first, journey = self._begin()
            if journey is None:
                return unwrap_result(await make(first))
            return unwrap_result(await run_chain(journey, functools.partial(make, journey=journey)))

        return guarded

    def blocking(self) -> Callable[..., Any]:
        """For a plain function."""
        function = self._function

        def guarded(*args: Any, **kwargs: Any) -> Any:
            def make(leg: PlainRoute, journey: FallbackChain[PlainRoute] | None = None) -> AttemptResult:
                told = kwargs if journey is None else {**kwargs, _THERE: leg.upstream}

                def attempt(permit: Permit) -> AttemptResult:
                    try:
                        value = function(*args, **told)
                    except Exception as exc:  # noqa: BLE001 - it is raised if it stays so
                        return _failed(exc, permit)
                    if inspect.isawaitable(value):
                        if inspect.iscoroutine(value):
                            value.close()  # it is never awaited
                        raise NotGuardable(function=_name(function), made="an awaitable")
                    return _done(value, permit)

                return leg.upstream.driver(leg.account, _hurries(journey, leg)).drive_blocking(
                    leg.call_request, attempt
                )

            first, journey = self._begin()
            if journey is None:
                return unwrap_result(make(first))
            return unwrap_result(run_chain_blocking(journey, functools.partial(make, journey=journey)))

        return guarded

    def _begin(self) -> tuple[PlainRoute, FallbackChain[PlainRoute] | None]:
        upstream = self._upstream
        first = PlainRoute(upstream, self._desk, upstream.request("", Charge()))
        return first, make_chain(first, _elsewhere) if self._goes_elsewhere else None


def _elsewhere(stop: FallbackRoute, desk: SharedAccount) -> PlainRoute:
    return PlainRoute(stop.upstream, desk, stop.upstream.request(stop.model, Charge()))


def _hurries(journey: FallbackChain[PlainRoute] | None, leg: PlainRoute) -> Callable[[], bool] | None:
    return None if journey is None else functools.partial(journey.skips_retry, leg)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _awaits(function: Callable[..., Any]) -> bool:
    """Whether its call is awaited: a coroutine function, or an object that is called like one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _is_told(function: Callable[..., Any]) -> bool:
    """Whether it takes, by keyword only, the upstream that it is to go to."""
    try:
        parameter = inspect.signature(function).parameters.get(_THERE)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY


def _done(value: Any, permit: Permit) -> AttemptResult:
    seconds = clock.now() - permit.granted_at
    return AttemptResult(value=value, outcome=CallOutcome(kind=Outcome.SUCCESS, latency=seconds))


def _failed(exc: Exception, permit: Permit) -> AttemptResult:
    seconds = clock.now() - permit.granted_at
    if isinstance(exc, Overloaded):  # of another upstream, or a house: it has waited as long as it may
        return AttemptResult(error=exc, outcome=CallOutcome(kind=Outcome.IGNORED, latency=seconds))
    return AttemptResult(
        error=exc, retryable=True, can_fall_back=True, outcome=CallOutcome(kind=Outcome.FAULT, latency=seconds)
    )
