"""Guarded functions: each call goes through an upstream."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

from forebay import clock
from forebay.errors import NotGuardable
from forebay.interfaces import Charge, Outcome
from forebay.upstream.call_flow import CallRunner
from forebay.upstream.call_request import AttemptResult, CallOutcome, CallRequest, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.exchange import judge_exception
from forebay.upstream.fallbacks.fallback import FallbackTarget
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

P = ParamSpec("P")
T = TypeVar("T")

_PARAMETER: Final = "upstream"  # receives the upstream to call


def guarded(upstream: FallbackTarget, runner: CallRunner, function: Callable[P, T]) -> Callable[P, T]:
    """Return `function` with each call sent through `upstream`. See `Upstream.guard`."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise NotGuardable(function=_name(function), made="a generator")
    guard = _Guard(upstream, runner, function)
    wrapper = guard.async_wrapper() if _is_async(function) else guard.blocking_wrapper()
    return functools.wraps(function)(wrapper)


class _Guard:
    """A function, and the upstream that its calls go through."""

    def __init__(self, upstream: FallbackTarget, runner: CallRunner, function: Callable[..., Any]) -> None:
        self._upstream = upstream
        self._runner = runner
        self._function = function
        self._account = upstream.core.accounts.account("")
        self._passes_upstream = bool(upstream.fallbacks) and _takes_upstream(function)

    def async_wrapper(self) -> Callable[..., Any]:
        """Return the wrapper of a coroutine function."""

        async def guarded(*args: Any, **kwargs: Any) -> Any:
            async def send(route: PlainRoute, permit: Permit) -> AttemptResult:
                try:
                    return _succeeded(await self._function(*args, **self._arguments(kwargs, route)), permit)
                except Exception as exc:  # noqa: BLE001 - raised by the flow if it is the last attempt
                    return judge_exception(route.account, permit, exc)

            return await self._runner.run(self._route(), send)

        return guarded

    def blocking_wrapper(self) -> Callable[..., Any]:
        """Return the wrapper of a plain function."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            def send(route: PlainRoute, permit: Permit) -> AttemptResult:
                try:
                    value = self._function(*args, **self._arguments(kwargs, route))
                except Exception as exc:  # noqa: BLE001 - raised by the flow if it is the last attempt
                    return judge_exception(route.account, permit, exc)
                if inspect.isawaitable(value):
                    if inspect.iscoroutine(value):
                        value.close()  # it is never awaited
                    raise NotGuardable(function=_name(self._function), made="an awaitable")
                return _succeeded(value, permit)

            return self._runner.run_blocking(self._route(), send)

        return guarded

    def _route(self) -> PlainRoute:
        request_at = _request_at if self._passes_upstream else None
        return PlainRoute(self._upstream, self._account, _request_at(self._upstream.core, ""), request_at)

    def _arguments(self, kwargs: dict[str, Any], route: PlainRoute) -> dict[str, Any]:
        return {**kwargs, _PARAMETER: route.upstream} if self._passes_upstream else kwargs


def _request_at(core: UpstreamCore, model: str) -> CallRequest:
    return core.request(model, Charge())


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _is_async(function: Callable[..., Any]) -> bool:
    """Return whether calls are awaited: a coroutine function, or an object whose ``__call__`` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _takes_upstream(function: Callable[..., Any]) -> bool:
    """Return whether the function has a keyword-only parameter for the upstream to call."""
    try:
        parameter = inspect.signature(function).parameters.get(_PARAMETER)
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY


def _succeeded(value: Any, permit: Permit) -> AttemptResult:
    latency = clock.now() - permit.granted_at
    return AttemptResult(value=value, outcome=CallOutcome(kind=Outcome.SUCCESS, latency=latency))
