"""Carried context: trace context and registered context variables, which go with a task to another process.

In the process of its submitter a handler sees a copy of all context variables. What a store keeps, and what a worker
process receives, is plain data: the W3C trace context, if the program uses OpenTelemetry, and the values of the
variables that the program has registered with `carry`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final

from forebay._hooks import call_hook
from forebay._validate import check_name, reject

_TRACE: Final = "trace context"  # the key of the headers that OpenTelemetry's propagators write
_MAX_VARIABLES: Final = 100
_UNSET: Final = object()

_variables: dict[str, ContextVar[Any]] = {}


def carry(variable: ContextVar[Any], *, name: str | None = None) -> None:
    """Carry a context variable with stored tasks, and to the processes of ``engine="process"``.

    Handlers there see the value that it had where their task was submitted. Call this where the variable is defined, so
    that every process that imports the module knows it. Its values must be plain data: None, booleans, numbers,
    strings, bytes, and lists, tuples and dicts with string keys of these.

    Args:
        variable: the context variable.
        name: under which it is stored; by default its own name. Keep it while stored tasks have it.

    Raises:
        InvalidSetting: not a ContextVar, its name is taken by another one, or a hundred are registered already.
    """
    if not isinstance(variable, ContextVar):
        reject("carry", "variable", variable, "a contextvars.ContextVar")
    name = variable.name if name is None else name
    check_name("carry", "name", name)
    if name == _TRACE or _variables.get(name, variable) is not variable:
        reject("carry", "name", name, "a name that no other variable has: pass name=")
    if name not in _variables and len(_variables) >= _MAX_VARIABLES:
        reject("carry", "variable", name, f"one of at most {_MAX_VARIABLES} variables; one can hold a dict")
    _variables[name] = variable


def capture_context() -> dict[str, Any] | None:
    """Return what the present context has to carry, by name; None if there is nothing."""
    carried = {name: value for name, variable in _variables.items() if (value := variable.get(_UNSET)) is not _UNSET}
    if "opentelemetry.trace" in sys.modules and (headers := call_hook("OpenTelemetry's propagator", _trace_headers)):
        carried[_TRACE] = headers
    return carried or None


def restore_context(carried: Mapping[str, Any]) -> None:
    """Set the variables of the present context to what was carried; ignore those that are not registered here."""
    for name, value in carried.items():
        if name == _TRACE:
            call_hook("OpenTelemetry's propagator", _attach_trace, value)
        elif (variable := _variables.get(name)) is not None:
            variable.set(value)


def _trace_headers() -> dict[str, str]:
    from opentelemetry import propagate  # noqa: PLC0415 - only in programs that use it

    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


def _attach_trace(headers: Mapping[str, str]) -> None:
    from opentelemetry import context, propagate  # noqa: PLC0415 - as above

    context.attach(propagate.extract(headers))  # not detached: the context is the task's own
