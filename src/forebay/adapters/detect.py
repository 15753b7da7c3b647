"""Telling what was registered: a callable, an agent of a framework, a supervisor, or a mistake."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from forebay.adapters.handler import Handler
from forebay.errors import InvalidHandler, InvalidSetting
from forebay.task import Task

#: What a framework's agent may be registered with: its own configuration, or what makes one for each task.
Config = Mapping[str, Any] | Callable[[Task], Mapping[str, Any]]

#: By the top-level package that an agent's class comes from: the adapter, imported when such an agent is met. It has
#: ``handler(agent, *, worker, config) -> Handler``.
FRAMEWORKS = {"langgraph": "forebay.adapters.langgraph"}


def as_handler(obj: Any, *, worker: str = "handler", config: Config | None = None) -> Handler:
    """Turn `obj` into a Handler.

    Known are: a Handler; an object with ``__forebay_handler__()``, such as a supervisor; an agent of a framework, found
    without importing the framework; an async callable, which runs in the loop; any other callable, which runs in a
    thread. One that only turns out to return an awaitable is called in the thread and awaited in the loop.

    Args:
        obj: what was registered.
        worker: its name, for messages.
        config: the framework's own configuration, or a plain callable that makes one of the task.

    Raises:
        InvalidHandler: it cannot be run; the message says what to pass instead.
        InvalidSetting: `config` was given for what takes none, or is not a mapping or a callable.
    """
    hooked = hasattr(type(obj), "__forebay_handler__")  # outranks a framework that its class may be derived from
    adapter = None if hooked else _adapter_of(obj)
    if adapter is not None:
        _check_config(config, worker)
        return _handler_of_framework(adapter, obj, worker, config)
    if config is not None:
        expected = "left out: only an agent of a framework takes one"
        raise InvalidSetting(owner=worker, name="config", value=_name(config), expected=expected)
    if isinstance(obj, Handler):
        return obj
    hint = _mistake(obj)
    if hint:
        raise InvalidHandler(worker=worker, type=_name(obj), hint=hint)
    if hooked:
        return _handler_of_itself(obj, worker)
    if callable(obj):
        _check_takes_the_task(obj, worker)
        return Handler(call=obj, blocking=not _is_async(obj))
    raise InvalidHandler(worker=worker, type=_name(obj), frameworks=", ".join(FRAMEWORKS))


def _adapter_of(obj: Any) -> str | None:
    """The adapter of the framework that `obj` is an agent of, also where its class was derived elsewhere."""
    for cls in type(obj).__mro__:
        adapter = FRAMEWORKS.get(cls.__module__.partition(".")[0])
        if adapter is not None:
            return adapter
    return None


def _handler_of_framework(adapter: str, obj: Any, worker: str, config: Config | None) -> Handler:
    handler: Handler = import_module(adapter).handler(obj, worker=worker, config=config)
    return handler


def _handler_of_itself(obj: Any, worker: str) -> Handler:
    handler = obj.__forebay_handler__()
    if not isinstance(handler, Handler):
        hint = f"its __forebay_handler__() returned a {_name(handler)}, and must return a forebay.adapters.Handler"
        raise InvalidHandler(worker=worker, type=_name(obj), hint=hint)
    return handler


def _check_config(config: Config | None, worker: str) -> None:
    if config is None or isinstance(config, Mapping) or (callable(config) and not _is_async(config)):
        return
    expected = "a mapping, or a plain callable of the Task that returns one"
    raise InvalidSetting(owner=worker, name="config", value=_name(config), expected=expected)


def _mistake(obj: Any) -> str | None:
    """What to do about the things that are passed by mistake, though some of them can be called."""
    if obj is None:
        return "pass handler=, or factory= to have one made for each task"
    if inspect.isclass(obj):
        return "it is a class: pass an instance of it, or factory= to have one made for each task"
    if inspect.iscoroutine(obj):
        obj.close()  # else Python warns that it was never awaited, beside the error that says so better
        return "it is a call that has begun already: pass the function itself, without parentheses"
    if inspect.isawaitable(obj):
        return "it is the result of a call: pass the function that was called"
    if _unwrapped_is(obj, inspect.isasyncgenfunction) or _unwrapped_is(obj, inspect.isgeneratorfunction):
        return "it is a generator, and which value would be its result? Pass each on with progress(), return the result"
    return None


def _check_takes_the_task(obj: Any, worker: str) -> None:
    """Better to hear it now than from each of the first five tasks."""
    try:
        signature = inspect.signature(obj)
    except (TypeError, ValueError):  # some builtins do not tell
        return
    try:
        signature.bind(None)
    except TypeError as error:
        hint = f"it is called with one argument, the Task, and takes {signature} ({error})"
        raise InvalidHandler(worker=worker, type=_name(obj), hint=hint) from None


def _is_async(obj: Any) -> bool:
    return _unwrapped_is(obj, inspect.iscoroutinefunction)


def _unwrapped_is(obj: Any, check: Callable[[Any], bool]) -> bool:
    """Whether `check` holds for `obj`, for what it is a partial of, or for its class's ``__call__``."""
    while isinstance(obj, functools.partial):
        obj = obj.func
    return check(obj) or check(getattr(type(obj), "__call__", None))  # noqa: B004 - whose: the class's, as Python does


def _name(obj: Any) -> str:
    return obj.__name__ if inspect.isclass(obj) else type(obj).__name__
