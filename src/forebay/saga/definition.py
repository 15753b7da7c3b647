"""The definition of a saga: the function that asks for its steps, and its name."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forebay._validate import check_instance, check_name
from forebay.adapters import Handler
from forebay.errors import InvalidSaga
from forebay.retry import Retry
from forebay.task import Task

if TYPE_CHECKING:
    from forebay.saga.run import SagaRun

# Of any error: whatever a compensation raises, the effect is not undone.
_UNDO_RETRY = Retry(max_attempts=10, base_delay=0.5, max_delay=30.0, max_total_delay=600.0, on=BaseException)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Saga:
    """A saga, as `saga` makes it of a function: register it as the handler of a worker.

    Attributes:
        name: unique among the sagas of a log.
        function: asks for the steps, and returns the result.
        version: of the function. A saga that began under another one is parked instead of being driven by this one.
        undo_retry: how a compensation that raises is tried again before the saga is parked. One that raises what its
            `on` does not cover is not, and parks the saga at once.
    """

    name: str
    function: Callable[[SagaRun, Any], Awaitable[Any]]
    version: str = ""
    undo_retry: Retry = _UNDO_RETRY

    def __forebay_handler__(self) -> Handler:
        """Return the handler that a supervisor with a saga log replaces by one that drives this saga."""
        return Handler(call=self._without_log, saga=self)

    def _without_log(self, task: Task) -> Any:  # noqa: ARG002 - as a handler is called
        raise InvalidSaga(
            name=self.name, why="it runs on a worker of a supervisor, in its event loop, and not by itself"
        )


def saga(
    name: str, *, version: str = "", undo_retry: Retry | None = None
) -> Callable[[Callable[[SagaRun, Any], Awaitable[Any]]], Saga]:
    """Make a saga of an async function ``(run, payload)`` that does all its work in ``await run.step(...)``.

    The function must ask for the same steps again if its payload and their outputs are the same: a saga that goes on in
    another process calls it from its beginning, and gets the outputs of its finished steps from the log. So time,
    random numbers and everything else from outside belong into steps.

    Args:
        name: unique among the sagas of a log.
        version: change it with the function if unfinished sagas must not go on under the new one: they are parked.
        undo_retry: how a compensation that raises is tried again; by default for ten attempts within ten minutes. Each
            process counts its own attempts. An error that its `on` does not cover parks the saga at once.

    Raises:
        InvalidSaga: the function cannot be a saga.
        InvalidSetting: another argument is invalid.
    """
    if callable(name):
        raise InvalidSaga(name=getattr(name, "__name__", "?"), why='write @saga("publish"), with a name')
    check_name("saga", "name", name)
    check_instance("saga", "version", version, str, example='"2"')
    check_instance("saga", "undo_retry", undo_retry, Retry, example="Retry(max_attempts=3)", optional=True)

    def make(function: Callable[[SagaRun, Any], Awaitable[Any]]) -> Saga:
        if not inspect.iscoroutinefunction(function):
            raise InvalidSaga(name=name, why="it must be an async function: async def publish(run, payload)")
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            why = f"it takes {inspect.signature(function)}, and is called with (run, payload)"
            raise InvalidSaga(name=name, why=why) from None
        return Saga(name=name, function=function, version=version, undo_retry=undo_retry or _UNDO_RETRY)

    return make
