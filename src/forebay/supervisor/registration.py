"""Registration: checks the arguments of `register_worker` and makes a worker of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from forebay._text import is_unicode
from forebay._validate import (
    check_choice,
    check_instance,
    check_name,
    check_positive,
    check_whole,
    is_number,
    is_positive,
    reject,
)
from forebay.adapters import Config
from forebay.adapters.handler_spec import HandlerSpec
from forebay.breaker import WORKER_RULES, Breaker, BreakerRules
from forebay.engine import Engine, ProcessEngine, resolve_engine
from forebay.errors import InvalidTimeout
from forebay.retry import Retry
from forebay.supervisor.tree.restart_policy import RestartType
from forebay.supervisor.tree.worker_life import WorkerLife
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Task
from forebay.upstream import Upstream
from forebay.upstream.declared_upstream import DeclaredUpstream

_PAIR: Final = 2
_MAX_DOLLARS: Final = 1e12  # an int of any size passes for a number


def make_worker(  # noqa: PLR0913 - what register_worker takes
    name: str,
    *,
    handler: Any,
    factory: Callable[[], Any] | str | None,
    task_types: Sequence[str],
    max_concurrent: int,
    max_open: int | None,
    reserve: int,
    timeout: float,
    retry: Retry | None,
    cost: float | Mapping[str, float] | None,
    config: Config | None,
    engine: str | Engine | None,
    on_cancel: Callable[[Task], object] | None,
    reset_timeout: float | None,
    breaker: BreakerRules | None,
    upstreams: Any,
    restart: str,
    start: Callable[..., Any] | None,
    start_timeout: float | None,
    stop: Callable[[], Any] | None,
    stop_timeout: float,
    draw: Callable[[], float],
    on_revive: Callable[[WorkerAgent], None],
    on_resize: Callable[[WorkerAgent, int], None],
) -> WorkerAgent:
    """Return a worker with the arguments of `register_worker`.

    Raises:
        InvalidHandler, InvalidSetting, InvalidTimeout, NotImportable: an argument is invalid.
    """
    kinds = _check(name, task_types, max_concurrent, timeout)
    owner = f"worker {name!r}"
    none = "for twice max_concurrent"
    check_whole(owner, "max_open", max_open, minimum=max_concurrent, none=none)
    check_whole(owner, "reserve", reserve, minimum=0)
    if reserve > max_concurrent:
        reject(owner, "reserve", reserve, f"at most its slots, max_concurrent={max_concurrent}")
    cost = _check_cost(owner, cost, kinds)
    _check_hook(owner, "on_cancel", on_cancel, "a callable that takes the Task")
    check_instance(owner, "retry", retry, Retry, example="Retry(max_attempts=3)", optional=True)
    check_positive(owner, "reset_timeout", reset_timeout, unit="seconds", none="to stay FAILED until revive()")
    check_instance(owner, "breaker", breaker, BreakerRules, example="BreakerRules(reset_timeout=30)", optional=True)
    if breaker is not None and reset_timeout not in (WORKER_RULES.reset_timeout, breaker.reset_timeout):
        expected = "left out where breaker= is given: write breaker=BreakerRules(..., reset_timeout=...)"
        reject(owner, "reset_timeout", reset_timeout, expected)
    where = resolve_engine(engine)
    if where is None:
        expected = '"loop", "thread", "process", or an engine such as forebay.engine.ProcessEngine(grace=5)'
        reject(owner, "engine", engine, expected)
    declared = _declared_upstreams(owner, upstreams, where)
    check_choice(owner, "restart", restart, [kind.value for kind in RestartType])
    _check_hook(owner, "start", start, "a callable, such as an async function")
    _check_hook(owner, "stop", stop, "a callable, such as an async function")
    reports_start = start is not None and _takes_started(owner, start)
    check_positive(owner, "start_timeout", start_timeout, unit="seconds", none="for no limit")
    check_positive(owner, "stop_timeout", stop_timeout, unit="seconds")
    spec = HandlerSpec(worker=name, handler=handler, factory=factory, config=config, on_cancel=on_cancel)
    built = where.build_handler(spec, slots=max_concurrent)
    if start is not None and built.nested_supervisor is not None:
        reject(owner, "start", start, "left out where the handler is a supervisor: its life is that of the supervisor")
    life = WorkerLife(
        name,
        built,
        start=start,
        reports_start=reports_start,
        start_timeout=start_timeout,
        stop=stop,
        stop_timeout=float(stop_timeout),
        restart=RestartType(restart),
    )
    rules = _default_rules(reset_timeout, float(timeout)) if breaker is None else _with_time(breaker, float(timeout))
    return WorkerAgent(
        name,
        built,
        task_types=kinds,
        max_concurrent=max_concurrent,
        max_open=max_open,
        reserve=reserve,
        timeout=float(timeout),
        retry=retry,
        cost=cost,
        breaker=Breaker(rules, draw=draw),
        probes=rules.probes,
        declared=declared,
        life=life,
        on_revive=on_revive,
        on_resize=on_resize,
    )


@functools.lru_cache(maxsize=100)
def _default_rules(reset_timeout: float | None, timeout: float) -> BreakerRules:
    """Return the rules of a worker's breaker; equal workers share them, because there may be ten thousand."""
    longest = WORKER_RULES.max_reset_timeout
    if reset_timeout is not None:
        longest = max(longest, reset_timeout)
    return replace(WORKER_RULES, reset_timeout=reset_timeout, max_reset_timeout=longest, probe_timeout=2 * timeout)


def _with_time(rules: BreakerRules, timeout: float) -> BreakerRules:
    """Return rules by which a probe has time for a whole run: it is not overdue before its timeout, a fault anyway."""
    return rules if rules.probe_timeout >= 2 * timeout else replace(rules, probe_timeout=2 * timeout)


def _check_hook(owner: str, setting: str, hook: object, expected: str) -> None:
    """Check that a hook is None or can be called.

    Raises:
        InvalidSetting: it cannot; often because it was called already.
    """
    if hook is None or callable(hook):
        return
    if inspect.iscoroutine(hook):
        hook.close()  # else Python would also warn that it was never awaited
        expected = f"the function itself, without parentheses, {setting}={hook.__name__}: the supervisor calls it"
    reject(owner, setting, hook, expected)


def _check_cost(owner: str, cost: object, kinds: Sequence[str]) -> float | Mapping[str, float] | None:
    """Return the given dollars of a task, or those of each task type in a mapping of our own.

    Raises:
        InvalidSetting: they are not numbers of dollars of at least 0, or for a type that the worker does not take.
    """
    if cost is None:
        return None
    expected = "US dollars a task, a number from 0 to 1e12, or a mapping of them by task type; None to learn them"
    if isinstance(cost, Mapping):
        if unknown := [kind for kind in cost if kind not in kinds]:
            reject(owner, "cost", unknown[0], f"for task types that it takes: {', '.join(map(repr, kinds))}")
        return {kind: _dollars(owner, usd, expected) for kind, usd in cost.items()}
    return _dollars(owner, cost, expected)


def _dollars(owner: str, usd: object, expected: str) -> float:
    if not is_number(usd) or not 0 <= usd <= _MAX_DOLLARS:
        reject(owner, "cost", usd, expected)
    return float(usd)


def _declared_upstreams(owner: str, upstreams: Any, engine: Engine) -> tuple[DeclaredUpstream, ...]:
    """Return the upstreams that a worker's calls are declared to use.

    Raises:
        InvalidSetting: `upstreams` is not a list of upstreams, or the worker runs in another process.
    """
    expected = (
        'a list of the upstreams that its calls use, such as [search, (openai, "gpt-4o")], each an Upstream or a pair'
    )
    if isinstance(upstreams, str | Mapping) or not isinstance(upstreams, Iterable):
        reject(owner, "upstreams", upstreams, expected)
    found = []
    for entry in upstreams:
        upstream, model = entry if isinstance(entry, tuple) and len(entry) == _PAIR else (entry, None)
        if not isinstance(upstream, Upstream) or (model is not None and not (isinstance(model, str) and model)):
            reject(owner, "upstreams", entry, expected)
        found.append(upstream.declared(model or ""))
    if found and isinstance(engine, ProcessEngine):
        expected = (
            'left out with engine="process": the calls are made in another process, where only a gateway can count them'
        )
        reject(owner, "upstreams", upstreams, expected)
    return tuple(dict.fromkeys(found))


def _takes_started(owner: str, start: Callable[..., Any]) -> bool:
    """Return whether the `start` of a worker takes an argument: a function to be called once it has started.

    Raises:
        InvalidSetting: it takes more than that.
    """
    try:
        parameters = inspect.signature(start).parameters.values()
    except (TypeError, ValueError):  # as of some built-in functions
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [each for each in parameters if each.default is each.empty and each.kind in positional]
    if len(required) > 1:
        reject(
            owner, "start", start, "a callable without arguments, or with one: a function to call once it has started"
        )
    return bool(required)


def check_decorator_arguments(task_types: Sequence[object]) -> None:
    """Check that ``@supervisor.worker(...)`` was given task types, and not the function itself.

    Raises:
        InvalidSetting: it was given a callable.
    """
    if any(callable(task_type) for task_type in task_types):
        expected = 'written as @supervisor.worker("research"), with the task types that it takes'
        reject("supervisor.worker", "task_types", task_types, expected)


def _check(name: object, task_types: object, max_concurrent: object, timeout: object) -> tuple[str, ...]:
    """Check the arguments, and return the task types of a worker without duplicates.

    Raises:
        InvalidSetting, InvalidTimeout: one of the four is invalid.
    """
    owner = f"worker {name!r}"
    check_name("register_worker", "name", name)
    if isinstance(task_types, str) or not isinstance(task_types, Sequence | set | frozenset):
        reject(owner, "task_types", task_types, 'a list, such as ["research"]')
    if not task_types:
        expected = 'not empty: a list of the task types that it takes, such as ["research"]'
        reject(owner, "task_types", task_types, expected)
    if not all(isinstance(kind, str) and kind and is_unicode(kind) for kind in task_types):
        reject(owner, "task_types", task_types, "a list of non-empty strings of valid Unicode")
    check_whole(owner, "max_concurrent", max_concurrent)
    if not is_positive(timeout):
        raise InvalidTimeout(value=timeout)
    return tuple(dict.fromkeys(task_types))
