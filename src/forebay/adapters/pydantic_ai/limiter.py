"""A concurrency limiter of pydantic-ai whose slots are calls of an upstream."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import Final, NamedTuple

from pydantic_ai import AbstractConcurrencyLimiter

from forebay._validate import check_instance, reject
from forebay.upstream import Upstream
from forebay.upstream.call import UpstreamCall

_MODEL: Final = "model:"  # what a source begins with whose slot is a model's; else it is an agent's
_OWNER: Final = "UpstreamLimiter"


class _Slot(NamedTuple):
    """A slot that is held.

    Attributes:
        call: the call of the upstream.
        handled: the exception that was being handled when it was acquired.
    """

    call: UpstreamCall
    handled: BaseException | None


_NONE: Final[tuple[_Slot, ...]] = ()
# Those acquired in this context. A release does not say of what: it is that of the newest.
_acquired: ContextVar[tuple[_Slot, ...]] = ContextVar("forebay_pydantic_ai_slots", default=_NONE)


class UpstreamLimiter(AbstractConcurrencyLimiter):  # type: ignore[misc]  # without its package it has no type
    """Lets a model or an agent of pydantic-ai wait in an upstream, where its client cannot be bound.

    Pass it where pydantic-ai takes a limiter: ``ConcurrencyLimitedModel(model, UpstreamLimiter(upstream))`` makes each
    request a call of the upstream; ``Agent(max_concurrency=UpstreamLimiter(upstream))`` each whole run. A call has the
    priority, deadline and tenant of its task. It counts as a request; tokens and dollars are not counted, since
    pydantic-ai does not tell a limiter of them. Bind the client instead where you can.

    A request that raises counts as what its exception reports, as in `Upstream.call`: 429 as throttled, for example.

    Args:
        upstream: the upstream.
        model: the model whose account its calls wait in; None for the model that makes a request, and no model for an
            agent.

    Raises:
        InvalidSetting: `upstream` is none, or has what a limiter cannot keep: a budget, a strict quota of tokens, or a
            fallback, to which the model would not send its request.
    """

    def __init__(self, upstream: Upstream, model: str | None = None) -> None:
        check_instance(_OWNER, "upstream", upstream, Upstream, example="Upstream('bedrock')")
        if upstream.fallbacks:
            expected = "an upstream without a fallback: the model of pydantic-ai sends its request to its own provider"
            reject(_OWNER, "upstream", upstream, expected)
        settings = upstream.core.settings
        quotas = (quota for quotas in (settings.quotas, *settings.models.values()) for quota in quotas)
        if upstream.core.budgets.has_budgets or any(quota.strict for quota in quotas):
            expected = "an upstream without a budget and a strict quota: a limiter is not told what a request uses"
            reject(_OWNER, "upstream", upstream, expected)
        self._upstream = upstream
        self._model = model
        self._held: list[_Slot] = []

    def __repr__(self) -> str:
        return f"UpstreamLimiter({self._upstream!r})"

    async def acquire(self, source: str) -> None:
        """Wait for a slot.

        Args:
            source: "model:" or "agent:" and a name.

        Raises:
            Overloaded: the upstream rejects the call.
        """
        handled = sys.exception()
        model = self._model
        if model is None:
            model = source.removeprefix(_MODEL) if source.startswith(_MODEL) else ""
        slot = _Slot(self._upstream.call(model), handled)
        await slot.call.__aenter__()
        self._held.append(slot)
        _acquired.set((*_acquired.get(), slot))

    def release(self) -> None:
        """Release the newest slot of this context, or, called in another one, the oldest.

        pydantic-ai calls it in a ``finally``, so the exception that is being handled is what the request ended with.
        """
        acquired = _acquired.get()
        slot = next((each for each in reversed(acquired) if each in self._held), self._held[0])
        self._held.remove(slot)
        _acquired.set(tuple(each for each in acquired if each is not slot))
        error = sys.exception()
        if error is slot.handled:
            error = None
        slot.call.__exit__(type(error) if error else None, error, None)
