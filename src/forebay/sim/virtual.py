"""The simulated provider inside an event loop, virtual or real: callers await, one timer waits for what is next."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from forebay.errors import ForebayError
from forebay.sim.calls import Call, Cut, Event, Finished, FirstToken, Progress, Refused
from forebay.sim.config import ProviderConfig
from forebay.sim.faults import Reason
from forebay.sim.ledger import Bill, Statistics, Usage
from forebay.sim.provider import EPOCH, Provider


class Refusal(ForebayError):
    """The simulated provider refused a call with status {status}, because of {reason}."""

    status: int
    headers: dict[str, str]
    body: bytes
    reason: Reason
    retry_after: float | None  # seconds


class Broken(ForebayError):
    """The simulated provider ended a call in the middle, after {output_tokens} tokens of output."""

    output_tokens: int
    usage: Usage
    reported: bool  # told as an error; else the connection dropped


@dataclass(frozen=True, slots=True)
class Completion:
    """A call that was answered whole; times in seconds, from the moment it was let in."""

    usage: Usage
    headers: dict[str, str]
    ttft: float
    duration: float


class Answer:
    """A call that was let in: an async iterator over what happens to it, and a context that hangs up when left.

    The last event is `Finished` or `Cut`. One task reads it.
    """

    def __init__(self, provider: SimulatedProvider, call_id: int, request_id: str, headers: dict[str, str]) -> None:
        self.call_id = call_id
        self.request_id = request_id
        self.headers = headers
        self._provider = provider
        self._events: deque[Event] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._over:
                raise StopAsyncIteration
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        event = self._events.popleft()
        self._over = self._over or isinstance(event, Finished | Cut)
        return event

    def put(self, event: Event) -> None:
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
        self._provider = Provider(config, seed=seed, epoch=epoch)
        self._answers: dict[int, Answer] = {}
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
    ) -> Completion:
        """Make one call and wait for its end; to be cancelled is to hang up.

        Raises:
            Refusal: the provider would not; status, headers and body as they go over the wire.
            Broken: it broke off in the middle.
        """
        call = Call(
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
                    case Finished(usage=usage):
                        return Completion(usage, answer.headers, first - began, self._loop.time() - began)
                    case Cut(usage=usage, reported=reported):
                        raise Broken(output_tokens=usage.output_tokens, usage=usage, reported=reported)
                    case Progress():
                        pass
        raise AssertionError  # pragma: no cover - an answer ends with Finished or Cut

    async def open(self, call: Call) -> Answer:
        """Make one call and return when it is let in; the answer must be read to its end or closed.

        Raises:
            Refusal: the provider would not.
        """
        answer = self.knock(call)
        if isinstance(answer, Answer):
            return answer
        if self.config.refuse_after:
            await asyncio.sleep(self.config.refuse_after)
        raise Refusal(
            status=answer.status,
            headers=answer.headers,
            body=answer.body,
            reason=answer.reason,
            retry_after=answer.retry_after,
        )

    def knock(self, call: Call) -> Answer | Refused:
        """The same without waiting and without an exception: the answer to read or close, or the refusal."""
        verdict = self._provider.arrive(self._now(), call)
        self._arm()
        if isinstance(verdict, Refused):
            return verdict
        answer = Answer(self, verdict.call_id, verdict.request_id, verdict.headers)
        self._answers[verdict.call_id] = answer
        return answer

    def hang_up(self, call_id: int) -> None:
        """For an answer: its reader has left."""
        self._answers.pop(call_id, None)
        self._provider.hang_up(self._now(), call_id)
        self._arm()

    def statistics(self) -> Statistics:
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
            self._timer = self._loop.call_at(self._origin + due, self._ring)

    def _ring(self) -> None:
        due, self._timer = self._due, None
        self._deliver(max(due, self._now()))  # a loop's timers may fire a clock's resolution early

    def _deliver(self, now: float) -> None:
        for event in self._provider.advance(now):
            over = isinstance(event, Finished | Cut)
            answer = self._answers.pop(event.call_id, None) if over else self._answers.get(event.call_id)
            if answer is not None:
                answer.put(event)
        self._arm()
