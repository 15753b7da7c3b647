"""The start gate: a run starts only while the calls that it will make would not wait long."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Final

from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.run import Run
    from forebay.supervisor.worker import WorkerAgent
    from forebay.typing import Source
    from forebay.upstream.foretold import Foretold

_LOOK: Final = 0.25  # seconds, at least, to another look at a source that lets nobody through


class StartGate:
    """Holds runs in the line while what they draw on is pressed, so that those that have begun can end.

    Runs that all begin and then wait for each other's calls end late, or never: the calls of a run must all be made
    before any of it counts. But an estimate must not lock the gate: while no call of its rung or a better one stands in
    the line, one run of each rung starts in every typical call's time, whatever wait is expected. Started past calls
    that do wait, runs of more calls than there are slots would begin faster than they end, until none is in time.
    """

    def __init__(self, house: Dispatcher) -> None:
        self._house = house
        # Who has free slots, for whose sake they stay free, and which rung waits.
        self._held: dict[WorkerAgent, tuple[Source, Priority]] = {}
        self._last: dict[tuple[Source, Priority], float] = {}  # when a run of that rung last started

    def watch(self, worker: WorkerAgent, source: Source) -> None:
        """`worker` draws on `source`: serve it whenever that is relieved."""
        source.on_relief(worker, partial(self._relieved, worker))

    def met(self, run: Run, source: Source) -> None:
        """`run` is the first of its worker that draws on `source`, which may have been foretold."""
        worker = run.worker
        self.watch(worker, source)
        self._last.setdefault((source, run.task.priority), run.began_at)
        for foretold in [foretold for foretold in worker.foretold if foretold.covers(source)]:
            self._came_true(run, foretold, source)

    def _came_true(self, run: Run, foretold: Foretold, source: Source) -> None:
        """What was foretold of a worker is `source`: it takes its place."""
        worker = run.worker
        for priority in Priority:
            if (last := self._last.get((foretold, priority))) is not None:
                self._last[source, priority] = max(last, self._last.get((source, priority), last))
        for other in worker.runs:
            if other.expected is not None and foretold in other.expected:
                other.called(foretold)
                if other is not run and source not in other.expected:  # it may be what was foretold twice over
                    other.expected[source] = None
                    source.coming(1)
        if (held := self._held.get(worker)) is not None and held[0] is foretold:
            self._let_go(worker)
        foretold.forget(worker)
        worker.foretold.remove(foretold)
        del worker.sources[foretold]
        self._house.loop.call_soon(self._house.serve, worker)  # not now: a handler is amid a step

    def opens(self, worker: WorkerAgent, pool: Pool | None) -> bool:
        """Whether the head of `pool`, if any, may start on `worker` now. If not, it is served again when it may."""
        head = None if pool is None else pool.line.head()
        if head is None or pool is None:
            self._let_go(worker)
            return True
        return self.lets(worker, head[3], waiting=len(pool.line))

    def pick(self, pool: Pool, rung: Priority, *, idle_first: bool = False) -> WorkerAgent | None:
        """The worker on which a run of `rung` may start now, if there is one."""
        worker = pool.router.pick(idle_first=idle_first)
        if worker is None or not worker.sources or self.lets(worker, rung, waiting=1):
            return worker
        return None

    def lets(self, worker: WorkerAgent, rung: Priority, *, waiting: int) -> bool:
        """Whether a run of `rung` may start on `worker` now; `waiting` are in the line, for whom it is asked."""
        now = self._house.loop.time()
        for source in worker.sources:
            last = self._last.get((source, rung))
            again = now if last is None else last + source.typical()
            if source.may_start(rung) or (now >= again and not source.shuts_out(rung)):
                continue
            if again <= now:  # who frees a slot will serve this worker; if nobody does, look again
                again = now + max(_LOOK, source.typical())
            self._held[worker] = source, rung
            for pool in worker.pools:
                pool.held[worker] = None
            source.hold_back(worker, _held(worker, waiting), rung)
            if worker.start_again is not None:
                self._house.timers.cancel(worker.start_again)
            worker.start_again = self._house.timers.at(again, self._house.serve, worker)
            return False
        for source in worker.sources:
            self._last[source, rung] = now
        self._let_go(worker)
        return True

    def _let_go(self, worker: WorkerAgent) -> None:
        if (held := self._held.pop(worker, None)) is not None:
            held[0].hold_back(worker, 0)
            for pool in worker.pools:
                pool.held.pop(worker, None)

    def started(self, run: Run) -> None:
        """`run` has its slot: its first calls are to be expected."""
        run.expected = dict(run.worker.sources)
        for source in run.expected:
            source.coming(1)

    def ended(self, run: Run) -> None:
        """`run` has ended: a call that was expected of it and never came makes room for another run."""
        for source in tuple(run.expected or ()):
            run.called(source)
            for worker, (other, _) in self._held.items():
                if other is source or set(other.parts) & set(source.parts):
                    self._house.loop.call_soon(self._house.serve, worker)  # later: this run is amid its end

    def longer(self, pool: Pool) -> None:
        """The line of `pool` has grown, and perhaps what is held back with it."""
        for worker, (source, rung) in self._held.items():
            if worker in pool.workers:
                source.hold_back(worker, _held(worker, len(pool.line)), rung)

    def close(self) -> None:
        """Let go of what was watched."""
        for worker in self._house.workers.values():
            for source in worker.sources:
                source.forget(worker)

    def _relieved(self, worker: WorkerAgent) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._house.loop.call_soon_threadsafe(self._house.serve, worker)


def _held(worker: WorkerAgent, waiting: int) -> int:
    return min(waiting, worker.max_concurrent - worker.current_tasks)
