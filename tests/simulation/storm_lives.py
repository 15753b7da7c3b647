"""The lives of the workers of a task storm, drawn from a seed: they crash, start late or not at all, and hang.

Only so many things go wrong in a storm, so that it ends: then every start succeeds, and every life goes on.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from forebay.simulation import virtual_loop

AT_ONCE: Final = 1e-3  # seconds of the virtual clock, which goes on a little at each turn of the loop
MAX_TROUBLE: Final = 40  # things that go wrong with the lives of one storm
CHANGES: Final = ("unregister", "unregister", "pause", "revive")
Restart = Literal["permanent", "transient", "temporary"]
Strategy = Literal["one_for_one", "one_for_all", "rest_for_one"]


@dataclass(frozen=True)
class LifePlan:
    """The lives of one worker.

    Attributes:
        reports_start: its life says itself when it has started.
        start_timeout: seconds; None: none of its starts hangs.
        start_fails: probability.
        ends: probability that a life ends by itself.
        lasts: seconds of a life that ends by itself, on average.
        stop: what its `stop` does, if it has one: it ends the life, asks it to end, does nothing, or hangs.
        outlives: seconds that a life goes on after it was cancelled.
        nested: the worker is a supervisor, and has the life inside.
    """

    restart: Restart
    reports_start: bool
    start_timeout: float | None
    start_fails: float
    ends: float
    lasts: float
    stop: Literal["ends", "asks", "nothing", "hangs"] | None
    stop_timeout: float
    outlives: float
    nested: bool

    @classmethod
    def draw(cls, rng: random.Random, restart: Restart, lasts: float) -> LifePlan:
        """Draw the lives of a worker, each of which lasts so many seconds."""
        reports_start, nested = rng.random() < 0.6, rng.random() < 0.25
        if rng.random() < 0.3:
            restart = rng.choice(("permanent", "transient", "temporary"))
        return cls(
            restart="permanent" if nested and restart == "temporary" else restart,  # nobody would register it again
            reports_start=reports_start,
            start_timeout=rng.choice((None, 1.0)) if reports_start else None,
            start_fails=rng.choice((0.0, 0.0, 0.3)),
            ends=rng.choice((0.0, 0.7, 1.0, 1.0)),
            lasts=lasts,
            stop=rng.choice((None, None, "ends", "asks", "nothing", "hangs")),
            stop_timeout=rng.choice((0.1, 1.0)),
            outlives=rng.choice((0.0, 0.0, 0.05, 3.0)),
            nested=nested,
        )


@dataclass(frozen=True)
class LivesScript:
    """The supervision of a storm: its settings, the lives of its workers, and what is changed meanwhile.

    Attributes:
        restores_after: seconds, at most, after which workers that are FAILED for good are revived, those that have gone
            are registered again, and types that are paused are resumed.
        changes_every: seconds, on average, between two of CHANGES in one process; None: there are none.
        revived_by_sink: workers that are FAILED for good are revived by an event sink, at once.
    """

    strategy: Strategy
    max_restarts: int
    within: float
    workers: Mapping[str, LifePlan]
    restores_after: float
    changes_every: float | None
    revived_by_sink: bool

    @classmethod
    def draw(cls, rng: random.Random, workers: list[str]) -> LivesScript | None:
        """Draw the lives of workers, in four of ten storms."""
        if rng.random() < 0.6:
            return None
        restart: Restart = rng.choice(("permanent", "permanent", "transient", "temporary"))
        lasts = rng.choice((0.3, 2.0, 10.0))
        return cls(
            strategy=rng.choice(("one_for_one", "one_for_one", "one_for_all", "rest_for_one")),
            max_restarts=rng.choice((0, 1, 3, 100)),
            within=rng.choice((1.0, 5.0)),
            workers={name: LifePlan.draw(rng, restart, lasts) for name in workers},
            restores_after=rng.choice((0.5, 5.0, 5.0)),
            changes_every=rng.choice((None, 1.0, 5.0)),
            revived_by_sink=rng.random() < 0.2,
        )


class Trouble:
    """How much may still go wrong in a storm.

    Args:
        rng: draws it.
        happened: counts what went wrong.
    """

    def __init__(self, rng: random.Random, happened: Counter[str]) -> None:
        self.rng = rng
        self._happened = happened
        self._left = MAX_TROUBLE

    def draw(self, what: str, probability: float) -> bool:
        """Return whether a thing goes wrong that does so with a probability, and count it."""
        if not self._left or self.rng.random() >= probability:
            return False
        self._left -= 1
        self._happened[what] += 1
        return True

    def end(self) -> None:
        """Let nothing go wrong any more."""
        self._left = 0


class WorkerLives:
    """The lives of one worker of one process, one after the other.

    Attributes:
        number: of the present life, or of the last one.
    """

    def __init__(self, name: str, plan: LifePlan, trouble: Trouble, errors: tuple[type[BaseException], ...]) -> None:
        self.number = 0
        self._name = name
        self._plan = plan
        self._trouble = trouble
        self._errors = errors
        self._end: asyncio.Future[None] | None = None
        self._down_since = 0.0

    @property
    def up(self) -> bool:
        """True from the end of its start until its life ends or is cancelled."""
        return self._end is not None and not self._end.done()

    @property
    def is_down(self) -> bool:
        """True if it is not up, and has not been for so long that its supervisor must know."""
        return not self.up and self._down_since + AT_ONCE < virtual_loop().time()

    def options(self, start_time: float) -> dict[str, Any]:
        """Return the arguments of `register_worker`, for a handler that takes `start_time` seconds to start."""
        plan = self._plan
        return {
            "start": self._start_and_report if plan.reports_start else self._start,
            "start_timeout": None if plan.start_timeout is None else plan.start_timeout + start_time,
            "stop": self._stop(),
            "stop_timeout": plan.stop_timeout,
            "restart": plan.restart,
        }

    # --- its start ---

    def _start(self) -> Coroutine[Any, Any, None]:
        self._fail_perhaps()
        return self._live(self._begin())

    async def _start_and_report(self, started: Callable[[], None]) -> None:
        hangs = self._plan.start_timeout is not None and self._trouble.draw("start hangs", 0.2)
        await asyncio.sleep(1000.0 if hangs else self._trouble.rng.choice((0.0, 0.0, 0.3, 0.7)))
        self._fail_perhaps()
        end = self._begin()
        started()
        await self._live(end)

    def _fail_perhaps(self) -> None:
        if self._trouble.draw("start fails", self._plan.start_fails):
            message = f"{self._name} cannot start"
            raise OSError(message)

    def _begin(self) -> asyncio.Future[None]:
        loop, rng = virtual_loop(), self._trouble.rng
        end = self._end = loop.create_future()
        end.add_done_callback(self._went_down)
        self.number += 1
        if self._trouble.draw("life ends", self._plan.ends):
            lasts = rng.choice((0.0, *(rng.expovariate(1 / self._plan.lasts) for _ in range(4))))
            how = rng.choice(("returns", "is cancelled", "raises", "raises"))
            loop.call_later(lasts, self._end_by_itself, end, how)
        return end

    def _went_down(self, end: asyncio.Future[None]) -> None:
        if end is self._end:
            self._down_since = virtual_loop().time()

    # --- its end ---

    async def _live(self, end: asyncio.Future[None]) -> None:
        try:
            await end
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if me is not None and me.cancelling():  # by its supervisor
                await asyncio.sleep(self._plan.outlives)
            raise

    def _end_by_itself(self, end: asyncio.Future[None], how: str) -> None:
        if end.done():
            return
        match how:
            case "returns":
                end.set_result(None)
            case "is cancelled":
                end.cancel()
            case _:
                end.set_exception(self._trouble.rng.choice(self._errors)("the life has crashed"))

    def _stop(self) -> Callable[[], Any] | None:
        def end() -> None:
            if self._end is not None:
                self._end_by_itself(self._end, "returns")

        async def ask() -> None:
            await asyncio.sleep(0.3)
            end()

        async def hang() -> None:
            await asyncio.sleep(1000.0)

        return {"ends": end, "asks": ask, "nothing": lambda: None, "hangs": hang}.get(self._plan.stop or "")
