"""WorkerAgent: a registered handler, its slots, its pace and its breaker."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from forebay.adapters import Handler
from forebay.breaker import Breaker, BreakerState
from forebay.interfaces import LoadSource, WorkerState

if TYPE_CHECKING:
    import asyncio

    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.run import Run
    from forebay.supervisor.runs.timers import Timer
    from forebay.upstream.declared_upstream import DeclaredUpstream

_DURATION_GAIN = 0.2  # weight of the newest success in the average duration
_PENALTY = 1.5  # a failure raises the score by half
_WORST_PENALTY = _PENALTY**5


class WorkerAgent:
    """One registered handler with its own concurrency.

    Its state: FAILED while its breaker is open, else OVERLOADED with every slot taken, BUSY with some, IDLE with none.
    Made by ``supervisor.register_worker``; read it, and `revive` it.
    """

    def __init__(  # noqa: PLR0913 - what register_worker takes, already checked there
        self,
        name: str,
        handler: Handler,
        *,
        task_types: Sequence[str],
        max_concurrent: int,
        timeout: float,
        breaker: Breaker,
        probes: int,
        declared: Sequence[DeclaredUpstream] = (),
        on_revive: Callable[[WorkerAgent], None],
    ) -> None:
        self.name = name
        self.handler = handler
        self.task_types = tuple(task_types)
        self.max_concurrent = max_concurrent
        self.timeout = timeout
        self.breaker = breaker
        self.current_tasks = 0  # slots taken, zombies included
        self.zombies = 0
        self.stuck = False  # FAILED because zombies hold every slot
        self.failed = False  # the breaker is open; kept here because every decision asks
        self.probing = False  # half-open: only as many slots as the breaker has probes
        self.probes = min(probes, max_concurrent)
        self.breaker_phase = 0  # grows with each change of the two: which runs are probes
        self.timeout_timer: Timer | None = None  # when the first of its runs is out of time; late if that one has ended
        self.recheck_timer: Timer | None = None  # when a run that is held back may start whatever the pressure
        self.breaker_timer: Timer | None = None  # when time alone changes its breaker
        self.counted_slots = 0  # slots that its pools were told of
        self.pools: list[Pool] = []
        self.sources: dict[LoadSource, None] = dict.fromkeys(declared)  # what the calls of its runs draw on
        self.declared = list(declared)  # those of them that no call has shown yet
        self.runs: dict[Run, None] = {}  # in the order in which they began
        self.slot_claims: deque[tuple[Run, asyncio.Future[None]]] = (
            deque()
        )  # runs that lent their slot and want it back
        self.penalty = 1.0
        self._durations: dict[str, float] = {}  # seconds a success takes, by task type
        self._on_revive = on_revive

    def __repr__(self) -> str:
        return f"WorkerAgent({self.name!r}, {self.state.name}, {self.current_tasks}/{self.max_concurrent})"

    @property
    def state(self) -> WorkerState:
        """IDLE, BUSY, OVERLOADED or FAILED."""
        if self.failed:
            return WorkerState.FAILED
        if self.current_tasks >= self.max_concurrent:
            return WorkerState.OVERLOADED
        return WorkerState.BUSY if self.current_tasks else WorkerState.IDLE

    @property
    def load_factor(self) -> float:
        """``current_tasks / max_concurrent``."""
        return self.current_tasks / self.max_concurrent

    @property
    def slots(self) -> int:
        """How many tasks it may run now: none while FAILED, its probes while it is being tried again."""
        if self.failed:
            return 0
        return self.probes if self.probing else self.max_concurrent

    @property
    def avg_duration_ms(self) -> float:
        """Milliseconds that a successful task takes lately, over its task types; 0.0 before the first."""
        paces = self._durations.values()
        return 1000 * sum(paces) / len(paces) if paces else 0.0

    def can_accept(self) -> bool:
        """Whether a task could start on it now."""
        if self.failed or self.slot_claims or self.current_tasks >= self.max_concurrent:
            return False
        return not self.probing or self._probes_in_flight() < self.probes

    def revive(self) -> None:
        """Close its breaker now, whatever made it FAILED."""
        self._on_revive(self)

    # --- what the dispatcher tells it and asks it ---

    def _probes_in_flight(self) -> int:
        """Probes that hold their slot: what one of them waits for is part of it, and must not wait for its end."""
        return sum(
            run.breaker_phase == self.breaker_phase and run.holds_slot and run.abandoned_at is None for run in self.runs
        )

    def has_free_slot(self) -> bool:
        """Whether a slot is free for a run that has already begun, which a breaker does not stop."""
        return self.current_tasks < self.max_concurrent

    def score(self, task_type: str, typical: float) -> float:
        """Expected finish of one more task, in seconds; `typical` stands in for a pace not yet known.

        ``(current_tasks + 1) * avg_duration / max_concurrent``, raised by half for each recent failure: otherwise a
        worker that fails in ten milliseconds draws all the work.
        """
        pace = self._durations.get(task_type, typical)
        return (self.current_tasks + 1) * pace / self.max_concurrent * self.penalty

    def has_duration(self, task_type: str) -> bool:
        """Whether it has finished a task of that type."""
        return task_type in self._durations

    def record_success(self, task_type: str, seconds: float) -> None:
        """Note how long a success took."""
        pace = self._durations.get(task_type)
        self._durations[task_type] = seconds if pace is None else pace + _DURATION_GAIN * (seconds - pace)

    def raise_penalty(self) -> None:
        """Raise its score by half, up to a bound."""
        self.penalty = min(self.penalty * _PENALTY, _WORST_PENALTY)

    def lower_penalty(self) -> bool:
        """Take one failure off its score. True if there are more."""
        self.penalty = max(1.0, self.penalty / _PENALTY)
        if math.isclose(self.penalty, 1.0):
            self.penalty = 1.0
        return self.penalty > 1.0

    def update_from_breaker(self, now: float) -> bool:
        """Bring `failed` and `probing` up to date with the breaker. True if either changed."""
        state = self.breaker.state(now)
        before = (self.failed, self.probing)
        self.failed = state is BreakerState.OPEN
        self.probing = state is BreakerState.HALF_OPEN
        return (self.failed, self.probing) != before
