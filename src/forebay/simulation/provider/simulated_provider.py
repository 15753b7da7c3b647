"""The simulated provider in an event loop, virtual or real: callers await, and one timer waits for the next event."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from forebay.errors import ForebayError
from forebay.simulation.provider.billing import Bill, ProviderStatistics, SimulatedUsage
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import ProviderConfig
from forebay.simulation.provider.provider_model import EPOCH, ProviderModel
from forebay.simulation.provider.simulated_call import (
    CallCompleted,
    CallCut,
    CallEvent,
    CallRefused,
    FirstToken,
    SimulatedCall,
    TokensProduced,
)


class ProviderRefusal(ForebayError):
    """The simulated provider refused a call with status {status} ({reason})."""

    status: int
    headers: dict[str, str]
    body: bytes
    reason: RefusalReason
    retry_after: float | None  # seconds


class AnswerCut(ForebayError):
    """The simulated provider ended a call early, after {output_tokens} output tokens."""

    output_tokens: int
    usage: SimulatedUsage
    reported: bool  # as an error; otherwise the connection dropped


@dataclass(frozen=True, slots=True)
class CompletedCall:
    """The result of a call with a complete answer; times are in seconds since the call was accepted."""

    usage: SimulatedUsage
    headers: dict[str, str]
    ttft: float
    duration: float


class CallStream:
    """An accepted call: an async iterator over its events, and a context manager that hangs up on exit.

    The last event is `CallCompleted` or `CallCut`. One task reads it.
    """

    def __init__(self, provider: SimulatedProvider, call_id: int, request_id: str, headers: dict[str, str]) -> None:
        self.call_id = call_id
        self.request_id = request_id
        self.headers = headers
        self._provider = provider
        self._events: deque[CallEvent] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> CallEvent:
        while not self._events:
            if self._over:
                raise StopAsyncIteration
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        event = self._events.popleft()
        self._over = self._over or isinstance(event, CallCompleted | CallCut)
        return event

    def _put(self, event: CallEvent) -> None:
        """Add an event; called by the provider."""
        self._events.append(event)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        """Hang up, unless the call is over; calling it again does nothing."""
        self._events.clear()
        if not self._over:
            self._over = True
            self._provider._hang_up(self.call_id)  # noqa: SLF001 - the provider that made this stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SimulatedProvider:
    """A simulated LLM provider in the running event loop; its second 0 is the time at which it is created.

    Not thread-safe: use it on its loop only. It holds no task, only a timer while an event is due.

    Args:
        config: its capacity, limits and faults.
        seed: seeds all randomness.
        epoch: wall time of second 0, in epoch seconds; by default 2026-01-01T00:00:00Z.
    """

    def __init__(self, config: ProviderConfig, seed: int = 0, *, epoch: float = EPOCH) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        self._origin = self._loop.time()
        self._model = ProviderModel(config, seed=seed, epoch=epoch)
        self._streams: dict[int, CallStream] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf

    async def call(  # noqa: PLR0913 - a call has that many fields
        self,
        *,
        model: str,
        input_tokens: int,
        output_tokens: int,
        max_tokens: int | None = None,
        stream: bool = False,
        key: str = "",
        run: str | None = None,
    ) -> CompletedCall:
        """Make one call and wait for its end; a cancellation hangs up. The arguments are the fields of `SimulatedCall`.

        Raises:
            ProviderRefusal: the provider refused the call; it has the status, headers and body of the HTTP response.
            AnswerCut: the provider ended the answer early.
        """
        call = SimulatedCall(
            model=model,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            max_tokens=max_tokens,
            stream=stream,
            key=key,
            run=run,
        )
        start = self._loop.time()
        first_token = start
        with await self.open(call) as answer:
            async for event in answer:
                match event:
                    case FirstToken():
                        first_token = self._loop.time()
                    case CallCompleted(usage=usage):
                        return CompletedCall(usage, answer.headers, first_token - start, self._loop.time() - start)
                    case CallCut(usage=usage, reported=reported):
                        raise AnswerCut(output_tokens=usage.output_tokens, usage=usage, reported=reported)
                    case TokensProduced():
                        pass
        raise AssertionError  # pragma: no cover - a stream ends with CallCompleted or CallCut

    async def open(self, call: SimulatedCall) -> CallStream:
        """Make one call and return once it is accepted; read the stream to its end or close it.

        Raises:
            ProviderRefusal: the provider refused the call.
        """
        outcome = self.try_open(call)
        if isinstance(outcome, CallStream):
            return outcome
        if self.config.refusal_delay:
            await asyncio.sleep(self.config.refusal_delay)
        raise ProviderRefusal(
            status=outcome.status,
            headers=outcome.headers,
            body=outcome.body,
            reason=outcome.reason,
            retry_after=outcome.retry_after,
        )

    def try_open(self, call: SimulatedCall) -> CallStream | CallRefused:
        """Make one call without waiting; return the stream to read or close, or the refusal."""
        outcome = self._model.arrive(self._now(), call)
        self._set_timer()
        if isinstance(outcome, CallRefused):
            return outcome
        stream = CallStream(self, outcome.call_id, outcome.request_id, outcome.headers)
        self._streams[outcome.call_id] = stream
        return stream

    def _hang_up(self, call_id: int) -> None:
        """End a call whose reader closed its stream."""
        self._streams.pop(call_id, None)
        self._model.hang_up(self._now(), call_id)
        self._set_timer()

    def statistics(self) -> ProviderStatistics:
        """Return a snapshot of the counts until now."""
        self._deliver(self._now())
        return self._model.statistics()

    def bills(self) -> dict[str, Bill]:
        """Return the bill of each run that calls named."""
        return self._model.bills()

    # --- the timer --------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._loop.time() - self._origin

    def _set_timer(self) -> None:
        """Set the timer for the next event. A timer that is due too early stays: it fires and is set again."""
        due = self._model.next_event()
        if self._timer is not None:
            if self._due <= due < math.inf:
                return
            self._timer.cancel()
            self._timer = None
        if due < math.inf:
            self._due = due
            self._timer = self._loop.call_at(self._origin + due, self._on_timer)

    def _on_timer(self) -> None:
        due, self._timer = self._due, None
        self._deliver(max(due, self._now()))  # a loop may fire timers early by its clock's resolution

    def _deliver(self, now: float) -> None:
        for event in self._model.advance(now):
            over = isinstance(event, CallCompleted | CallCut)
            stream = self._streams.pop(event.call_id, None) if over else self._streams.get(event.call_id)
            if stream is not None:
                stream._put(event)  # noqa: SLF001 - a stream that this provider made
        self._set_timer()
