"""One run of short and long agents on a token quota, with a start gate that reads their estimates or does not."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from unittest.mock import patch

from forebay import BackpressureSupervisor, Deadline, Estimate, Priority, Task, Upstream
from forebay.admission import QueueEntry
from forebay.interfaces import Charge
from forebay.quota import Quota
from forebay.simulation import simulate
from forebay.supervisor.admission_controller import AdmissionController
from forebay.supervisor.pool import Pool
from forebay.supervisor.start_gate import StartGate
from forebay.supervisor.ticket import Ticket
from forebay.supervisor.worker import WorkerAgent
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount

MINUTES: Final = 13.0
FROM: Final = 3.0  # minutes
RUNS: Final = 20  # mean runs a minute that the quota serves
WITHIN: Final = 120.0  # seconds to the deadline of a run
_CALLS, _SMALL, _SHARE_LARGE = 3, 1000, 0.2  # calls of a run; tokens of a small call; share of large runs
_may_start_next: Final = StartGate.may_start_next
_free_worker: Final = AdmissionController._free_worker  # noqa: SLF001 - what is compared is inside
_may_start: Final = ThreadSafeAccount.may_start


@dataclass(frozen=True)
class GateCase:
    """The runs that are offered, and by which call the gate judges them: their own first one, or a typical one."""

    reads: bool
    load: float  # times what the quota serves
    large: int  # tokens of a call of a large run
    seed: int = 0


class _Reading:
    """A start gate that judges the next run by the tokens of its own calls."""

    def __init__(self) -> None:
        self._next: Estimate | None = None

    def may_start_next(
        self, gate: StartGate, worker: WorkerAgent, pool: Pool | None, entry: QueueEntry | None = None
    ) -> bool:
        """Judge the head of the queue."""
        head = entry or (None if pool is None else pool.queue.head())
        self._next = None if head is None else head[2].task.estimate
        try:
            return _may_start_next(gate, worker, pool, entry)
        finally:
            self._next = None

    def free_worker(self, admission: AdmissionController, ticket: Ticket, pool: Pool) -> WorkerAgent | None:
        """Judge a task that may start at once."""
        self._next = ticket.task.estimate
        try:
            return _free_worker(admission, ticket, pool)
        finally:
            self._next = None

    def may_start(self, account: ThreadSafeAccount, priority: Priority) -> bool:
        """Ask the account with the run's own call as the typical one."""
        if self._next is None:
            return _may_start(account, priority)
        tokens = self._next.input_tokens // self._next.calls
        typical = account._typical.charge  # noqa: SLF001
        account._typical.charge = Charge(input_tokens=tokens, tokens=tokens)  # noqa: SLF001
        try:
            return _may_start(account, priority)
        finally:
            account._typical.charge = typical  # noqa: SLF001


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    reading = _Reading()

    def may_start_next(
        gate: StartGate, worker: WorkerAgent, pool: Pool | None, entry: QueueEntry | None = None
    ) -> bool:
        return reading.may_start_next(gate, worker, pool, entry)

    def free_worker(admission: AdmissionController, ticket: Ticket, pool: Pool) -> WorkerAgent | None:
        return reading.free_worker(admission, ticket, pool)

    def may_start(account: ThreadSafeAccount, priority: Priority) -> bool:
        return reading.may_start(account, priority)

    with (
        patch.object(StartGate, "may_start_next", may_start_next),
        patch.object(AdmissionController, "_free_worker", free_worker),
        patch.object(ThreadSafeAccount, "may_start", may_start),
    ):
        yield


def runs_in_time(case: GateCase) -> tuple[float, float]:
    """Simulate a run; return the runs that ended in time over those that the quota serves, and the same of tokens."""
    with _reading() if case.reads else contextlib.nullcontext():
        return simulate(lambda: _run(case), seed=case.seed)


async def _run(case: GateCase) -> tuple[float, float]:
    loop, draws = asyncio.get_running_loop(), random.Random(case.seed)
    in_time: list[int] = []  # tokens of a call
    quota = round(RUNS * _CALLS * ((1 - _SHARE_LARGE) * _SMALL + _SHARE_LARGE * case.large))
    key = Upstream("key", quotas=[Quota(tokens=quota, per="minute")], max_concurrent=100)

    async def handler(task: Task) -> None:
        for _ in range(_CALLS):
            async with key.call(input_tokens=task.payload):
                await asyncio.sleep(1.0 + task.payload / 10_000)

    async def caller() -> None:
        tokens = case.large if draws.random() < _SHARE_LARGE else _SMALL
        estimate = Estimate(calls=_CALLS, input_tokens=_CALLS * tokens)
        ticket = await supervisor.submit(Task("run", tokens, deadline=Deadline.within(WITHIN), estimate=estimate))
        if ticket and (await ticket).success and 60 * FROM <= loop.time() - started < 60 * MINUTES:
            in_time.append(tokens)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["run"], max_concurrent=40, upstreams=[key])
        started = loop.time()
        async with asyncio.TaskGroup() as group:
            while loop.time() - started < 60 * MINUTES:
                group.create_task(caller())
                await asyncio.sleep(draws.expovariate(case.load * RUNS / 60))
    return len(in_time) / (MINUTES - FROM) / RUNS, _CALLS * sum(in_time) / (MINUTES - FROM) / quota
