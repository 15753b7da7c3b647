"""Guarded functions: each call goes through an upstream."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

from forebay import clock
from forebay.errors import NotGuardable
from forebay.interfaces import Charge, Outcome
from forebay.upstream.accounts.nested_calls import begin_hold, end_hold
from forebay.upstream.binding_advice import CLASS, NOT_CALLABLE
from forebay.upstream.call_flow import CallRunner
from forebay.upstream.call_request import AttemptResult, CallOutcome, CallRequest, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.failed_attempts import judge_exception
from forebay.upstream.fallbacks.fallback import FallbackTarget
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

P = ParamSpec("P")
T = TypeVar("T")

_PARAMETER: Final = "upstream"  # receives the upstream to call
_LATER: Final = (
    "calling it returns {made}, and its work is done only later. Guard the function that does the work, `async def` or"
    " plain; for a stream hold a permit: `async with upstream.call(...):`."
)
_TOOL: Final = (
    "it is a tool of LangChain or CrewAI that is not made from a function. Guard what its _run and _arun call:"
    " `@upstream.guard` above that function."
)
_FUNCTION_TOOL: Final = (
    "it is a tool of Agent Framework, and its approval mode would be lost. Guard the function that it is made from:"
    " `tool(upstream.guard(function))`."
)
_TOOL_FUNCTIONS: Final = ("func", "coroutine")  # of tools that are made from functions
_TOOL_MODULES: Final = ("langchain_core.tools.base", "crewai.tools.base_tool")


def guarded(upstream: FallbackTarget, runner: CallRunner, function: Callable[P, T]) -> Callable[P, T]:
    """Return `function` with each call sent through `upstream`. See `Upstream.guard`."""
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise NotGuardable(function=_name(function), why=_LATER.format(made="a generator"))
    if _is_tool(function):
        tool: Callable[P, T] = _guarded_tool(upstream, runner, function)
        return tool
    if _is_a(function, "agent_framework._tools", "FunctionTool"):
        raise NotGuardable(function=_name(function), why=_FUNCTION_TOOL)
    if isinstance(function, type):
        raise NotGuardable(function=_name(function), why=CLASS.format(name=_name(function)))
    if not callable(function):
        raise NotGuardable(function=_name(function), why=NOT_CALLABLE)
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
                begin_hold(permit)
                try:
                    return _succeeded(await self._function(*args, **self._arguments(kwargs, route)), permit)
                except Exception as exc:  # noqa: BLE001 - raised by the flow if it is the last attempt
                    return judge_exception(route.account, permit, exc)
                finally:
                    end_hold(permit)

            if self._passes_upstream:  # it may name a model there
                await self._runner.load_prices()
            return await self._runner.run(self._route(), send)

        return guarded

    def blocking_wrapper(self) -> Callable[..., Any]:
        """Return the wrapper of a plain function."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            def send(route: PlainRoute, permit: Permit) -> AttemptResult:
                begin_hold(permit)
                try:
                    value = self._function(*args, **self._arguments(kwargs, route))
                except Exception as exc:  # noqa: BLE001 - raised by the flow if it is the last attempt
                    return judge_exception(route.account, permit, exc)
                finally:
                    end_hold(permit)
                if inspect.isawaitable(value):
                    if inspect.iscoroutine(value):
                        value.close()  # it is never awaited
                    raise NotGuardable(function=_name(self._function), why=_LATER.format(made="an awaitable"))
                return _succeeded(value, permit)

            return self._runner.run_blocking(self._route(), send)

        return guarded

    def _route(self) -> PlainRoute:
        request_at = _request_at if self._passes_upstream else None
        return PlainRoute(self._upstream, self._account, _request_at(self._upstream.core, ""), request_at)

    def _arguments(self, kwargs: dict[str, Any], route: PlainRoute) -> dict[str, Any]:
        return {**kwargs, _PARAMETER: route.upstream} if self._passes_upstream else kwargs


def _is_tool(function: Any) -> bool:
    """Return whether this is a tool of LangChain or CrewAI."""
    return any(_is_a(function, module, "BaseTool") for module in _TOOL_MODULES)


def _is_a(thing: Any, module: str, name: str) -> bool:
    return any(base.__module__ == module and base.__name__ == name for base in type(thing).__mro__)


def _guarded_tool(upstream: FallbackTarget, runner: CallRunner, tool: Any) -> Any:
    """Return a copy of a tool whose functions are guarded, so that it stays a tool.

    Raises:
        NotGuardable: it is not made from functions.
    """
    functions = {name: function for name in _TOOL_FUNCTIONS if callable(function := getattr(tool, name, None))}
    if not functions:
        raise NotGuardable(function=_name(tool), why=_TOOL)
    return tool.model_copy(update={name: guarded(upstream, runner, each) for name, each in functions.items()})


def _request_at(core: UpstreamCore, model: str) -> CallRequest:
    if core.settings.has_strict_quota(model):
        reason = "a guarded function does not tell how much output it makes"
        advice = "bind its client, or call it within upstream.call(model, output_tokens=...), the most it may make"
        return core.request(model, Charge(), price=core.unbounded_call(reason, advice))
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
