"""The simulated provider inside an event loop, virtual or real: callers await, one timer waits for what is next."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from forebay.errors import ForebayError
from forebay.simulation.provider.billing import Bill, BilledUsage, ProviderStatistics
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
    """The simulated provider refused a call with status {status}, because of {reason}."""

    status: int
    headers: dict[str, str]
    body: bytes
    reason: RefusalReason
    retry_after: float | None  # seconds


class AnswerCut(ForebayError):
    """The simulated provider ended a call in the middle, after {output_tokens} tokens of output."""

    output_tokens: int
    usage: BilledUsage
    reported: bool  # told as an error; else the connection dropped


@dataclass(frozen=True, slots=True)
class CompletedCall:
    """A call that was answered whole; times in seconds, from the moment it was let in."""

    usage: BilledUsage
    headers: dict[str, str]
    ttft: float
    duration: float


class CallStream:
    """A call that was let in: an async iterator over what happens to it, and a context that hangs up when left.

    The last event is `Finished` or `CallCut`. One task reads it.
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

    def put(self, event: CallEvent) -> None:
        """For the provider: something has happened."""
        self._events.append(event)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        """Hang up, unless it is over; a second time does nothing."""
        self._events.clear()
        if not self._over:
            self._over = True
            self._provider.hang_up(self.call_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SimulatedProvider:
    """A provider that lives in the running event loop; its second 0 is the moment when it is made.

    Not for threads: everything happens on the loop. It holds no task, only a timer while something is due.
    """

    def __init__(self, config: ProviderConfig, seed: int = 0, *, epoch: float = EPOCH) -> None:
        """Begin now, in the running loop.

        Args:
            config: what the provider is like.
            seed: all that is left to chance comes from it.
            epoch: the wall time of this moment, in epoch seconds; by default 2026 begins.
        """
        self.config = config
        self._loop = asyncio.get_running_loop()
        self._origin = self._loop.time()
        self._provider = ProviderModel(config, seed=seed, epoch=epoch)
        self._streams: dict[int, CallStream] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf

    async def call(  # noqa: PLR0913 - a call has that many properties
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
        """Make one call and wait for its end; to be cancelled is to hang up.

        Raises:
            Refusal: the provider would not; status, headers and body as they go over the wire.
            Broken: it broke off in the middle.
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
        began = self._loop.time()
        first = began
        with await self.open(call) as answer:
            async for event in answer:
                match event:
                    case FirstToken():
                        first = self._loop.time()
                    case CallCompleted(usage=usage):
                        return CompletedCall(usage, answer.headers, first - began, self._loop.time() - began)
                    case CallCut(usage=usage, reported=reported):
                        raise AnswerCut(output_tokens=usage.output_tokens, usage=usage, reported=reported)
                    case TokensProduced():
                        pass
        raise AssertionError  # pragma: no cover - an answer ends with Finished or Cut

    async def open(self, call: SimulatedCall) -> CallStream:
        """Make one call and return when it is let in; the answer must be read to its end or closed.

        Raises:
            Refusal: the provider would not.
        """
        answer = self.try_open(call)
        if isinstance(answer, CallStream):
            return answer
        if self.config.refusal_delay:
            await asyncio.sleep(self.config.refusal_delay)
        raise ProviderRefusal(
            status=answer.status,
            headers=answer.headers,
            body=answer.body,
            reason=answer.reason,
            retry_after=answer.retry_after,
        )

    def try_open(self, call: SimulatedCall) -> CallStream | CallRefused:
        """The same without waiting and without an exception: the answer to read or close, or the refusal."""
        verdict = self._provider.arrive(self._now(), call)
        self._arm()
        if isinstance(verdict, CallRefused):
            return verdict
        answer = CallStream(self, verdict.call_id, verdict.request_id, verdict.headers)
        self._streams[verdict.call_id] = answer
        return answer

    def hang_up(self, call_id: int) -> None:
        """For an answer: its reader has left."""
        self._streams.pop(call_id, None)
        self._provider.hang_up(self._now(), call_id)
        self._arm()

    def statistics(self) -> ProviderStatistics:
        """A frozen snapshot of everything counted until now."""
        self._deliver(self._now())
        return self._provider.statistics()

    def bills(self) -> dict[str, Bill]:
        """Calls and tokens of each run that calls named."""
        return self._provider.bills()

    # --- the timer --------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return self._loop.time() - self._origin

    def _arm(self) -> None:
        """Have the timer fire when something is due. One that fires too early looks again, so it is not moved later."""
        due = self._provider.next_event()
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
        self._deliver(max(due, self._now()))  # a loop's timers may fire a clock's resolution early

    def _deliver(self, now: float) -> None:
        for event in self._provider.advance(now):
            over = isinstance(event, CallCompleted | CallCut)
            answer = self._streams.pop(event.call_id, None) if over else self._streams.get(event.call_id)
            if answer is not None:
                answer.put(event)
        self._arm()
