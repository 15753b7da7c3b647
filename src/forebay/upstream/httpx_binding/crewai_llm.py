"""LLMs of CrewAI over the clients of an SDK: copies with other clients, which repeat no throttled call of their own."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

_BASE: Final = ("crewai.llms.base_llm", "BaseLLM")
_MAKERS: Final = {"_client": "_get_sync_client", "_async_client": "_get_async_client"}


def is_crewai_llm(client: Any) -> bool:
    """Return whether this is an LLM of CrewAI, of any provider."""
    return any((base.__module__, base.__name__) == _BASE for base in type(client).__mro__)


def is_bound(llm: Any) -> bool:
    """Return whether this is an LLM of CrewAI that is bound to an upstream."""
    return getattr(type(llm), "forebay_is_bound", False)


def make_clients(llm: Any) -> None:
    """Make the clients of an LLM that had no API key when it was made; leave it as it is if it still has none."""
    for name, maker in _MAKERS.items():
        if getattr(llm, name, llm) is None and hasattr(llm, maker):
            with contextlib.suppress(ValueError):
                getattr(llm, maker)()


def without_retries(llm: Any, clients: Mapping[str, Any]) -> Any:
    """Return a copy of an LLM with other clients, whose usage starts at zero, and whose calls are not repeated.

    CrewAI (1.15) makes each throttled call three times, whatever its client does.
    """
    copied = llm.model_copy()
    for name, client in clients.items():
        setattr(copied, name, client)
    copied._token_usage = dict.fromkeys(llm._token_usage, 0)  # noqa: SLF001 - the copy would count for both
    kind: Any = type(llm)
    object.__setattr__(copied, "__class__", _calling_once(kind))
    return copied


@functools.cache
def _calling_once(kind: Any) -> Any:
    """Return a class of LLMs that calls within a retry of CrewAI's, so that it begins none."""
    retrying = getattr(sys.modules.get("crewai.llms.retry"), "_active_llm_rate_limit_retry", None)

    def call(self: Any, *args: Any, **how: Any) -> Any:
        with _set(retrying):
            return kind.call(self, *args, **how)

    async def acall(self: Any, *args: Any, **how: Any) -> Any:
        with _set(retrying):
            return await kind.acall(self, *args, **how)

    methods: tuple[Any, ...] = call, acall
    for method in methods:
        method._crewai_rate_limit_wrapped = True  # noqa: SLF001 - as CrewAI marks its own
    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "call": call, "acall": acall}
    bound = type(kind)(kind.__name__, (kind,), members)
    bound.forebay_is_bound = True  # in its members it would be a field
    return bound


@contextlib.contextmanager
def _set(variable: ContextVar[bool] | None) -> Iterator[None]:
    """Set a variable while the block runs; a version of CrewAI without such retries has none."""
    token = None if variable is None else variable.set(True)
    try:
        yield
    finally:
        if variable is not None and token is not None:
            variable.reset(token)
