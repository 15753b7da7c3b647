"""A storm of hooks drawn from a seed: user code that raises anything and calls the supervisor back at any time.

Handlers await tasks of their own under nested timeouts, callers cancel and leave, and every hook of the supervisor
raises, submits, cancels, revives, drains or closes. Everything runs in virtual time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forebay import BackpressureSupervisor, Deadline, ForebayError, Priority, Task, Ticket
from forebay.adapters import Handler
from forebay.simulation import simulate

MAX_ACTIONS = 400  # of all hooks of one storm
TYPES = "ab"


class StrangeError(BaseException):
    """Derived from nothing that code usually catches."""


ERRORS: tuple[type[BaseException], ...] = (
    ValueError, SystemExit, GeneratorExit, asyncio.CancelledError, RecursionError, StopIteration, MemoryError,
    StrangeError,
)  # fmt: skip


class UnprintableError(Exception):
    """An exception whose message is a hook."""

    def __init__(self, hook: Callable[[], object]) -> None:
        super().__init__()
        self._hook = hook

    def __str__(self) -> str:
        self._hook()
        return "described"


class HookedAgent:
    """An agent with the hooks of a Handler."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def __forebay_handler__(self) -> Handler:
        return self._handler


class HookStorm:
    """One storm.

    Attributes:
        happened: how often each kind of action of a hook was taken.
    """

    def __init__(self, seed: int, directory: Path) -> None:
        self._rng = random.Random(seed)
        self.happened = Counter[str]()
        self._tickets: list[Ticket] = []
        self._at_work = Counter[str]()
        self._peak = Counter[str]()
        choice = self._rng.choice
        self._slots = choice([1, 2, 3])
        overflow = choice([None, "memory://?bound=50", f"sqlite:///{directory}/{seed}.db?fsync=no"])
        self._supervisor = BackpressureSupervisor(
            on_event=choice([[], [self._hook]]),
            overflow=overflow,
            max_queue_size=choice([0, 3, 20]),
            zombie_grace=choice([0.1, 2.0]),
            keep_results=choice([0, 5, 1000]),
        )
        for kind in TYPES:
            handler = Handler(
                call=self._work,
                on_end=choice([None, self._hook]),
                on_cancel=choice([None, self._hook, self._async_hook]),
                stop=choice([None, self._async_hook]),
            )
            self._supervisor.register_worker(
                kind,
                handler=HookedAgent(handler),
                task_types=[kind],
                max_concurrent=self._slots,
                timeout=choice([2.0, 5.0]),
                reset_timeout=choice([1.0, 10.0]),
            )

    # --- hooks ---

    def _hook(self, *_: object) -> Any:
        if self.happened.total() >= MAX_ACTIONS:
            return
        action = self._rng.choices(
            (self._raise, self._submit, self._cancel, self._revive, self._drain, self._close, self._nothing),
            (25, 25, 15, 3, 0.5, 0.5, 31),
        )[0]
        self.happened[action.__name__] += 1
        action()

    async def _async_hook(self, *_: object) -> None:
        await asyncio.sleep(0.1)
        self._hook()

    def _raise(self) -> None:
        raise self._rng.choice(ERRORS)

    def _submit(self) -> None:
        with contextlib.suppress(ForebayError):
            self._tickets.append(self._supervisor.submit_nowait(self._new_task()))

    def _cancel(self) -> None:
        if self._tickets:
            self._rng.choice(self._tickets).cancel()

    def _revive(self) -> None:
        self._rng.choice(list(self._supervisor.workers.values())).revive()

    def _drain(self) -> None:
        _forget(asyncio.ensure_future(self._supervisor.drain(self._rng.choice([0.0, 1.0, None]))))

    def _close(self) -> None:
        _forget(asyncio.ensure_future(self._supervisor.close()))

    def _nothing(self) -> None:
        """Do nothing."""

    # --- tasks, handlers and callers ---

    def _new_task(self) -> Task:
        rng = self._rng
        return Task(
            rng.choice(TYPES),
            priority=rng.choice(list(Priority)),
            timeout=rng.choice([None, None, 0.5, 3.0]),
            thread_id=rng.choice([None, None, "first", "second"]),
            key=rng.choice([None, None, None, f"key {rng.randrange(5)}"]),
            spill=rng.random() < 0.8,
            deadline=None if rng.random() < 0.8 else Deadline.within(rng.uniform(0.5, 8.0)),
        )

    @contextlib.contextmanager
    def _working(self, kind: str) -> Any:
        self._at_work[kind] += 1
        self._peak[kind] = max(self._peak[kind], self._at_work[kind])
        try:
            yield
        finally:
            self._at_work[kind] -= 1

    async def _work(self, task: Task) -> int:
        rng = self._rng
        for _ in range(rng.randrange(3)):
            with self._working(task.task_type):
                await asyncio.sleep(rng.uniform(0.0, 1.5))
                draw = rng.random()
                if draw < 0.1:
                    self._hook()
                elif draw < 0.2:
                    raise UnprintableError(self._hook)
            if draw > 0.7:
                with contextlib.suppress(ForebayError, TimeoutError):
                    async with asyncio.timeout(rng.uniform(0.1, 2.0)), asyncio.timeout(rng.uniform(0.1, 2.0)):
                        await self._supervisor.run(self._new_task())
        return 1

    async def _call(self) -> None:
        rng, supervisor = self._rng, self._supervisor
        for _ in range(rng.randrange(10)):
            await asyncio.sleep(rng.uniform(0.0, 1.0))
            with contextlib.suppress(ForebayError, TimeoutError):
                match rng.randrange(4):
                    case 0:
                        self._tickets.append(await supervisor.submit(self._new_task()))
                    case 1:
                        async with asyncio.timeout(rng.uniform(0.1, 5.0)):
                            await supervisor.run(self._new_task())
                    case 2:
                        async with supervisor.slot(rng.choice(TYPES)) as slot:
                            with self._working(slot.worker.name):
                                await asyncio.sleep(rng.uniform(0.0, 1.0))
                    case _:
                        self._tickets.append(supervisor.submit_nowait(self._new_task()))

    async def run(self) -> None:
        """Run the storm, close the supervisor, and check that nothing is left."""
        await self._supervisor.start()
        await asyncio.gather(*(self._call() for _ in range(6)))
        await asyncio.sleep(self._rng.uniform(0.0, 30.0))
        async with asyncio.timeout(300.0):
            await self._supervisor.close()
        assert max(self._peak.values(), default=0) <= self._slots, f"above the limit of {self._slots}: {self._peak}"
        assert not [ticket for ticket in self._tickets if not ticket.done()]
        for worker in self._supervisor.workers.values():
            assert (worker.current_tasks, worker.zombies, worker.pending_claims) == (0, 0, 0), worker
        statistics = self._supervisor.statistics()
        assert (statistics.running, statistics.waiting) == (0, 0)


def _forget(work: asyncio.Future[Any]) -> None:
    work.add_done_callback(lambda done: done.cancelled() or done.exception())


def run(seed: int) -> HookStorm:
    """Run the storm of a seed."""
    with tempfile.TemporaryDirectory() as directory:
        storms: list[HookStorm] = []

        async def main() -> None:
            storms.append(HookStorm(seed, Path(directory)))
            await storms[0].run()

        simulate(main, seed=seed)
        return storms[0]


if __name__ == "__main__":
    logging.disable()  # of what the hooks raise
    for number in range(*map(int, sys.argv[1:3])):
        try:
            run(number)
        except BaseException as failure:
            failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.hook_storm {number} {number + 1}")
            raise
