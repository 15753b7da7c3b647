"""Detect what was registered: a callable, an agent of a framework, a supervisor, or a mistake."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from forebay._hooks import is_async, unwrapped_is
from forebay.adapters.handler import Config, Handler
from forebay.errors import InvalidHandler, InvalidSetting


class Framework(NamedTuple):
    """A framework whose agents can be registered as they are.

    Attributes:
        name: of its distribution, for messages.
        adapter: a module that is imported when such an agent is registered; it has ``handler(agent, *, worker, config)
            -> Handler``.
        marker: a name that its package has, and no other package of the same name: yours may well be called "agents".
    """

    name: str
    adapter: str
    marker: str = ""


# Of agents, as frameworks name them, the async ones first: a wrapper that awaits can be cancelled.
_METHODS = ("ainvoke", "arun", "run_async", "kickoff_async", "invoke_async", "run", "invoke", "kickoff", "execute")

_SINGLE_USE = "it keeps state from run to run: pass factory=, a function without arguments that makes one for each task"

#: By the top-level package of an agent's class.
FRAMEWORKS = {
    "agent_framework": Framework("agent-framework", "forebay.adapters.agent_framework", "AgentFrameworkException"),
    "agents": Framework("openai-agents", "forebay.adapters.openai_agents", "set_default_openai_client"),
    "autogen_agentchat": Framework("autogen-agentchat", "forebay.adapters.autogen"),
    "autogen_core": Framework("autogen-agentchat", "forebay.adapters.autogen"),  # what an agent is made of
    "crewai": Framework("crewai", "forebay.adapters.crewai", "Crew"),
    "langgraph": Framework("langgraph", "forebay.adapters.langgraph"),
    "pydantic_ai": Framework("pydantic-ai", "forebay.adapters.pydantic_ai", "ModelMessagesTypeAdapter"),
    "swarm": Framework("openai-swarm", "forebay.adapters.openai_swarm", "Swarm"),
}


def as_handler(
    obj: Any, *, worker: str = "handler", config: Config | None = None, from_factory: bool = False
) -> Handler:
    """Turn `obj` into a Handler.

    `obj` may be: a Handler; an object with ``__forebay_handler__()``, such as a supervisor; an agent of a framework,
    detected without importing the framework; an async callable, which runs in the loop; any other callable, which runs
    in a thread. If such a callable returns an awaitable, it is called in the thread and awaited in the loop.

    Args:
        obj: the object that was registered.
        worker: the worker's name, for messages.
        config: the framework's own configuration, or a plain callable that makes one for a task.
        from_factory: whether `obj` was made for one task.

    Raises:
        InvalidHandler: it cannot be run, or runs one task only; the message says what to pass instead.
        InvalidSetting: `config` was given for an object that takes none, or is not a mapping or a callable.
    """
    hooked = hasattr(type(obj), "__forebay_handler__")  # outranks a framework that its class may be derived from
    adapter = None if hooked else _adapter_of(obj)
    if adapter is not None:
        _check_config(config, worker)
        handler = _handler_from_framework(adapter, obj, worker, config)
        if handler.single_use and not from_factory:
            raise InvalidHandler(worker=worker, type=_type_name(obj), hint=_SINGLE_USE)
        return handler
    if config is not None:
        expected = "left out: only an agent of a framework takes one"
        raise InvalidSetting(owner=f"worker {worker!r}", name="config", value=_type_name(config), expected=expected)
    if isinstance(obj, Handler):
        return obj
    hint = _mistake(obj)
    if hint:
        raise InvalidHandler(worker=worker, type=_type_name(obj), hint=hint)
    if hooked:
        return _handler_from_hook(obj, worker)
    if callable(obj):
        _check_no_method_of_agent(obj, worker)
        _check_takes_task(obj, worker)
        return Handler(call=obj, blocking=not is_async(obj))
    frameworks = ", ".join(dict.fromkeys(framework.name for framework in FRAMEWORKS.values()))
    wrapper = _wrapper(obj, worker, from_factory=from_factory)
    raise InvalidHandler(worker=worker, type=_type_name(obj), frameworks=frameworks, wrapper=wrapper)


def is_agent(obj: Any) -> bool:
    """Return whether `obj` is called with a Task by an adapter or a hook of its own, whatever else it can be."""
    return isinstance(obj, Handler) or hasattr(type(obj), "__forebay_handler__") or _adapter_of(obj) is not None


def _adapter_of(obj: Any) -> str | None:
    """Return the adapter of the framework that `obj` is an agent of, also if its class was derived elsewhere."""
    kind = type(obj)
    for cls in (*kind.__mro__, type(kind)):  # a metaclass is all that CrewAI's @CrewBase leaves of it
        package = cls.__module__.partition(".")[0]
        framework = FRAMEWORKS.get(package)
        if framework and (not framework.marker or hasattr(sys.modules.get(package), framework.marker)):
            return framework.adapter
    return None


def _wrapper(obj: Any, worker: str, *, from_factory: bool) -> str:
    """Return the function that runs an agent of an unsupported framework, as source; empty for a builtin."""
    if type(obj).__module__ == "builtins":
        return ""
    found = (name for name in _METHODS if callable(getattr(type(obj), name, None)))
    name = next(found, "run")
    method = getattr(type(obj), name, None)
    awaits = is_async(method)
    agent = f"{type(obj).__name__}(...)" if from_factory else "agent"
    body = [f"    return {'await ' if awaits else ''}{agent}.{name}(task.payload)"]
    if unwrapped_is(method, inspect.isasyncgenfunction):
        body = [f"    async for part in {agent}.{name}(task.payload):", "        progress(part)", "    return part"]
    lines = (
        f"{'async ' if awaits else ''}def run_agent(task):",
        *body,
        f"supervisor.register_worker({worker!r}, handler=run_agent, ...)",
    )
    return "\n\nFor an agent of another framework write:\n\n    " + "\n    ".join(lines)


def _handler_from_framework(adapter: str, obj: Any, worker: str, config: Config | None) -> Handler:
    try:
        module = import_module(adapter)
    except ModuleNotFoundError as error:  # of a framework in several distributions, such as AutoGen
        hint = f"the package {error.name!r} is not installed, which its adapter needs"
        raise InvalidHandler(worker=worker, type=_type_name(obj), hint=hint) from error
    handler: Handler = module.handler(obj, worker=worker, config=config)
    return handler


def _handler_from_hook(obj: Any, worker: str) -> Handler:
    handler = obj.__forebay_handler__()
    if not isinstance(handler, Handler):
        got = _type_name(handler)
        hint = f"its __forebay_handler__() returned a {got}, and must return a forebay.adapters.Handler"
        raise InvalidHandler(worker=worker, type=_type_name(obj), hint=hint)
    return handler


def _check_config(config: Config | None, worker: str) -> None:
    if config is None or isinstance(config, Mapping) or (callable(config) and not is_async(config)):
        return
    expected = "a mapping, or a plain callable of the Task that returns one"
    raise InvalidSetting(owner=f"worker {worker!r}", name="config", value=_type_name(config), expected=expected)


def _mistake(obj: Any) -> str | None:  # noqa: PLR0911 - one for each
    """Return what to do about an object that is often passed by mistake; None for any other. Some are callable."""
    if obj is None:
        return "pass handler=, or factory= to have one made for each task"
    if isinstance(obj, str):
        return advice_on_name(obj)
    if inspect.isclass(obj):
        return "it is a class: pass an instance of it, or factory= to have one made for each task"
    if inspect.iscoroutine(obj):
        obj.close()  # else Python would also warn that it was never awaited
        return "it is a call that has already begun: pass the function itself, without parentheses"
    if inspect.isawaitable(obj):
        return "it is the result of a call: pass the function that was called"
    if unwrapped_is(obj, inspect.isasyncgenfunction) or unwrapped_is(obj, inspect.isgeneratorfunction):
        return (
            "it is a generator, and none of its values is the result: pass each value on with progress(), and return"
            " the result"
        )
    return None


def advice_on_name(name: str) -> str:
    """Return what to pass instead of a name that is no import path."""
    module, _, attribute = name.rpartition(".")
    path = f"{module or 'package.module'}:{attribute or 'name'}"
    return f"it is a name: import what it names and pass that, or give its import path, with a colon, such as {path!r}"


def _check_no_method_of_agent(obj: Any, worker: str) -> None:
    """Check that `obj` is no method that an agent has from its framework: that takes no Task."""
    if not inspect.ismethod(obj) or _adapter_of(obj.__self__) is None:
        return
    package = str(getattr(obj, "__module__", None)).partition(".")[0]
    if package in FRAMEWORKS:
        hint = f"it is a method of an agent of {FRAMEWORKS[package].name}, which takes no Task: pass the agent itself"
        raise InvalidHandler(worker=worker, type=_type_name(obj), hint=hint)


def _check_takes_task(obj: Any, worker: str) -> None:
    """Check that `obj` can be called with the task; otherwise every task would fail at its start."""
    try:
        signature = inspect.signature(obj)
    except (TypeError, ValueError):  # some builtins have no signature
        return
    try:
        signature.bind(None)
    except TypeError as error:
        hint = f"it is called with one argument, the Task, and takes {signature} ({error})"
        raise InvalidHandler(worker=worker, type=_type_name(obj), hint=hint) from None


def _type_name(obj: Any) -> str:
    return obj.__name__ if inspect.isclass(obj) else type(obj).__name__
