"""Cost selection: finds the cheapest worker that makes a task's deadline, in O(log workers) for each cost."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from typing import Final, Literal

from forebay.supervisor.worker import WorkerAgent
from forebay.supervisor.worker_costs import AVERAGE_GAIN
from forebay.supervisor.worker_selection import ScoreSource, WorkerSelector
from forebay.task import Priority

Eligible = Callable[[WorkerAgent], bool]  # says whether a worker counts

NO_COST: Final = math.inf  # the class of workers without a cost, or with recent failures
_SAME_COST: Final = 1.5  # learned costs that differ by no more than this factor count as equal: each run costs another
_SPREADS: Final = 2.5  # mean deviations above the average: 95 in a hundred end by then, even of exponential times
_FIRST_SPREAD: Final = 0.5  # of the first time, as the deviation while there is no other
_UNKNOWN: Final = 1.0 + _SPREADS * _FIRST_SPREAD  # times the average, while no deviation is known
_SAME_TIME: Final = 1.5  # times that differ by no more than this factor count as equal for who is in a hurry
_CUT_OFF: Final = 1.5  # a run that its deadline cut off is taken to need this many times its time
_RETRIAL: Final = 20.0  # seconds after which a class that is too slow by its times is tried again
_FEW: Final = 5  # successes that say little; workers to be tried that are looked at for a task
_MAX_RETRIAL: Final = 3600.0  # the longest such time, after it was too slow again and again


class RunTimes:
    """The times of the runs of one worker: an average, and the mean deviation from it.

    Source: V. Jacobson, "Congestion Avoidance and Control", 1988, which bounds round trips so.
    """

    __slots__ = ("average", "spread")

    def __init__(self, seconds: float) -> None:
        self.average = seconds
        self.spread = _FIRST_SPREAD * seconds

    def record(self, seconds: float) -> None:
        """Record that a run took `seconds`."""
        error = seconds - self.average
        self.average += AVERAGE_GAIN * error
        self.spread += AVERAGE_GAIN * (abs(error) - self.spread)

    @property
    def cautious(self) -> float:
        """The seconds that a run is expected to take at most."""
        return self.average + _SPREADS * self.spread


class _SpeedSelector(WorkerSelector):
    """The workers of one cost by the seconds that a run takes there at most, whatever runs there now."""

    __slots__ = ("_times",)

    def __init__(self, task_type: str, typical: Callable[[], float], times: dict[WorkerAgent, RunTimes]) -> None:
        super().__init__(task_type, typical)
        self._times = times

    def _key(self, worker: WorkerAgent, typical: float) -> float:
        times = self._times.get(worker)
        seconds = _UNKNOWN * worker.duration(self._task_type, typical) if times is None else times.cautious
        return seconds * worker.penalty

    def _score(self, worker: WorkerAgent) -> float:
        return self._key(worker, 1.0)

    def _heap_index(self, worker: WorkerAgent) -> int:
        return 0 if worker in self._times else super()._heap_index(worker)


class _Trial:
    """The trials of a worker whose cost is to be learned.

    It is tried with one task at a time, and less and less often if its successes cost nothing.

    Attributes:
        due: loop time of the next one.
    """

    __slots__ = ("_pause", "due")

    def __init__(self) -> None:
        self.due = -math.inf
        self._pause = _RETRIAL

    def cost_nothing(self, now: float) -> None:
        """Record a success that has taught no cost: it is tried less and less often."""
        self.due = now + self._pause
        self._pause = min(2 * self._pause, _MAX_RETRIAL)


class _CostClass:
    """The workers of one cost: by score, and by speed.

    Attributes:
        cost: dollars a task.
        by_score: them, by score.
        by_speed: them, by the seconds that a run takes at most.
        workers: them.
        times: of their successes; None before the first.
        slots: of them that are not reserved, when they were counted last; None if that may have changed.
        known_at: loop time of the latest evidence of its times, or of a trial; None before the first.
    """

    __slots__ = (
        "_fastest",
        "_retrial",
        "_successes",
        "by_score",
        "by_speed",
        "cost",
        "known_at",
        "slots",
        "times",
        "workers",
    )

    def __init__(self, cost: float, by_score: WorkerSelector, by_speed: WorkerSelector) -> None:
        self.cost = cost
        self.by_score = by_score
        self.by_speed = by_speed
        self.workers: set[WorkerAgent] = set()
        self.times: RunTimes | None = None
        self.slots: int | None = None
        self.known_at: float | None = None
        self._successes = 0
        self._fastest = math.inf  # seconds of its fastest success
        self._retrial = _RETRIAL

    def add(self, worker: WorkerAgent) -> None:
        """Add a worker. Its selectors are updated next."""
        self.workers.add(worker)
        self.slots = None

    def remove(self, worker: WorkerAgent) -> None:
        """Remove a worker."""
        self.by_score.forget(worker)
        self.by_speed.forget(worker)
        self.workers.discard(worker)
        self.slots = None

    def record(self, now: float, seconds: float) -> None:
        """Record a success."""
        if self.times is None:
            self.times = RunTimes(seconds)
        else:
            self.times.record(seconds)
        self._successes += 1
        self._fastest = min(self._fastest, seconds)
        self._retrial = _RETRIAL
        self.known_at = now

    def count_slots(self) -> int:
        """Return the slots of its workers that a NORMAL or LOW task may take."""
        if self.slots is None:
            self.slots = sum(min(worker.slots, worker.slots_for(Priority.NORMAL)) for worker in self.workers)
        return self.slots

    def record_cut_off(self, now: float) -> None:
        """Record that a run was cut off by its deadline."""
        self.known_at = now

    def try_again(self, now: float, within: float, average: float) -> bool:
        """Return whether a task tries one of its workers now that is too slow by its times; if so, count it as tried.

        A task without the time of its fastest success never does, once there have been a few: it would be lost.

        Args:
            now: loop time, in seconds.
            within: seconds that the task has.
            average: seconds of a success of the worker.
        """
        if self.known_at is None:
            self.known_at = now
        hopeful = _CUT_OFF * within >= average
        if within < self._fastest and not hopeful and self._successes >= _FEW:
            return False
        if now < self.known_at + (self._retrial if hopeful else _MAX_RETRIAL):
            return False
        self.known_at = now
        self._retrial = min(2 * self._retrial, _MAX_RETRIAL)
        return True


class CostSelector:
    """The workers of one task type whose costs differ: by cost, and those of one cost by score.

    It replaces the `WorkerSelector` of a pool once two of its workers differ in cost. A pick asks each cost in turn,
    the cheapest first: few, because given costs are compared by two digits, and learned ones join one close to theirs.
    Workers without a cost come last, and so do those that have failed a short while ago: for them nothing but the score
    counts.

    Args:
        task_type: the task type whose costs and durations count.
        median: returns the median seconds of the pool's tasks, or None before the first.
    """

    __slots__ = (
        "_classes",
        "_costs",
        "_expected",
        "_filed",
        "_median",
        "_slots_version",
        "_task_type",
        "_times",
        "_trials",
    )

    def __init__(self, task_type: str, median: Callable[[], float | None]) -> None:
        self._task_type = task_type
        self._median = median
        self._costs: list[float] = []  # of the classes, in order
        self._classes: dict[float, _CostClass] = {}
        self._filed: dict[WorkerAgent, float] = {}  # the class of each worker
        self._times: dict[WorkerAgent, RunTimes] = {}
        self._trials: dict[WorkerAgent, _Trial] = {}  # workers whose cost is to be learned
        self._slots_version = 0
        self._expected: dict[WorkerAgent, ScoreSource] = {}  # to be updated before the next pick

    # --- workers ---

    def update(self, worker: WorkerAgent) -> None:
        """Take `worker` into account again, because it is new, finished a task, or can accept tasks again."""
        cost = self._class_of(worker)
        if self._filed.get(worker) != cost:
            self._unfile(worker)
            self._filed[worker] = cost
            self._class(cost).add(worker)
        found = self._classes[cost]
        found.by_score.update(worker)
        found.by_speed.update(worker)
        if worker.cost(self._task_type) is not None:
            self._trials.pop(worker, None)
        elif worker not in self._trials:
            self._trials[worker] = _Trial()

    def expect(self, worker: WorkerAgent, source: ScoreSource) -> None:
        """Update `worker` before the next pick, and tell `source` then that its score is known."""
        self._expected[worker] = source

    def forget(self, worker: WorkerAgent) -> None:
        """Forget a worker that is gone."""
        self._expected.pop(worker, None)
        self._unfile(worker)
        self._times.pop(worker, None)
        self._trials.pop(worker, None)

    def record(self, now: float, worker: WorkerAgent, seconds: float) -> None:
        """Record that a run on `worker` succeeded after `seconds`."""
        self._record_time(worker, seconds)
        if (cost := self._filed.get(worker)) is not None:
            self._classes[cost].record(now, seconds)
        if (trial := self._trials.get(worker)) is not None:
            trial.cost_nothing(now)

    def record_cut_off(self, now: float, worker: WorkerAgent, seconds: float) -> None:
        """Record that a run on `worker` was cut off by its deadline after `seconds`: it needs longer.

        Otherwise a worker that is too slow would look as fast as its few short runs. One that was cut off early says
        nothing.
        """
        times = self._times.get(worker)
        if times is None or _CUT_OFF * seconds > times.average:
            self._record_time(worker, _CUT_OFF * seconds)
        if (cost := self._filed.get(worker)) is not None:
            self._classes[cost].record_cut_off(now)

    def _record_time(self, worker: WorkerAgent, seconds: float) -> None:
        times = self._times.get(worker)
        if times is None:
            self._times[worker] = RunTimes(seconds)
        else:
            times.record(seconds)

    # --- picks ---

    def pick(
        self,
        priority: Priority = Priority.CRITICAL,
        *,
        nested: bool = False,
        idle_first: bool = False,
        eligible: Eligible | None = None,
    ) -> WorkerAgent | None:
        """Return the worker that can accept a task and is expected to finish it first, whatever it costs.

        Among free slots the number of those of a worker says nothing about that. Of workers that are about as fast as
        the fastest, it is the one with the least score, or with `idle_first` an IDLE one before others.
        """
        self._update_expected()
        fastest, least = self._candidates("by_speed", priority, nested, eligible=eligible), math.inf
        if fastest:
            least = _SAME_TIME * min(map(self._seconds, fastest))
        best = self._candidates("by_score", priority, nested, eligible=eligible, idle_first=idle_first)
        best = [worker for worker in (*best, *fastest) if self._seconds(worker) <= least]
        if idle_first:
            best = [worker for worker in best if not worker.current_tasks] or best
        return self._least_score(best)

    def _candidates(
        self,
        selector: Literal["by_score", "by_speed"],
        priority: Priority,
        nested: bool,  # noqa: FBT001 - as for `pick`
        *,
        eligible: Eligible | None,
        idle_first: bool = False,
    ) -> list[WorkerAgent]:
        """Return the best worker of each cost."""
        found = []
        for each in self._classes.values():
            workers: WorkerSelector = getattr(each, selector)
            worker = workers.pick(priority, nested=nested, idle_first=idle_first)
            if worker is not None and eligible is not None and not eligible(worker):
                worker = workers.pick_among(eligible, priority, nested=nested)
            if worker is not None:
                found.append(worker)
        return found

    def _seconds(self, worker: WorkerAgent) -> float:
        """Return the seconds that a run on `worker` is expected to take at most, longer after recent failures."""
        return self.expected_time(worker) * worker.penalty

    def pick_cheapest(
        self, now: float, within: float, priority: Priority, *, nested: bool = False, eligible: Eligible | None = None
    ) -> WorkerAgent | None:
        """Return the cheapest worker that can accept a task and is expected to finish it within `within` seconds.

        Of those of one cost it is the one with the least score or, if that is too slow, the fastest one. If no worker
        with a cost makes it, it is the one that is expected to finish it first. Only `eligible` workers count.
        """
        self._update_expected()
        untried = None if eligible is not None else self._untried(now, priority, nested=nested)
        if untried is not None and self._makes_it(untried, within):
            return untried
        for cost in (*self._costs,):  # a class may be gone when its last worker has failed
            found = self._classes.get(cost)
            if found is None or cost == NO_COST:
                continue
            worker = self._best(found.by_score, priority, nested=nested, eligible=eligible)
            if worker is not None and not self._makes_it(worker, within):
                worker = self._best(found.by_speed, priority, nested=nested, eligible=eligible)
            if worker is None:
                continue
            if self._makes_it(worker, within) or found.try_again(now, within, self._average(worker)):
                return worker
        return self.pick(priority, nested=nested, eligible=eligible)

    def pick_among(self, eligible: Eligible, priority: Priority, *, nested: bool) -> WorkerAgent | None:
        """Return the `eligible` worker that can accept a task and is expected to finish it first, or None."""
        return self.pick(priority, nested=nested, eligible=eligible)

    def fastest(self) -> float | None:
        """Return the average seconds of a success at the cost where it is least, or None before the first."""
        return min((each.times.average for each in self._classes.values() if each.times is not None), default=None)

    def expected_time(self, worker: WorkerAgent) -> float:
        """Return the seconds that a run on `worker` is expected to take at most; 0 while nothing is known of any."""
        times = self._times.get(worker)
        return _UNKNOWN * self._average(worker) if times is None else times.cautious

    def _average(self, worker: WorkerAgent) -> float:
        times = self._times.get(worker)
        return worker.duration(self._task_type, self._median() or 0.0) if times is None else times.average

    # --- waiting for a cheaper worker ---

    def compared_cost_of(self, worker: WorkerAgent) -> float:
        """Return the cost of a worker as it is compared with others; infinity if it has none, or has failed lately."""
        return self._filed.get(worker, NO_COST)

    def wait_for_cheaper(  # noqa: PLR0913 - the facts about a task, and what waits before it
        self,
        worker: WorkerAgent,
        remaining: float,
        priority: Priority,
        *,
        size: float,
        ahead: int,
        max_wait: float,
        slots_version: int,
    ) -> float | None:
        """Return for how many seconds to wait for a worker that is cheaper than `worker`, which is free; None: not.

        A cheaper one must be expected to have a slot, after `ahead` other tasks, and then to make the deadline. It is
        waited for as long as it would make it if it had a slot then, and `worker` would, too.

        Args:
            worker: that could start the task now.
            remaining: seconds to the deadline of the task.
            priority: of the task.
            size: how many times as long as an average task it takes.
            ahead: how many tasks wait already.
            max_wait: seconds to wait at most.
            slots_version: changes whenever the slots of a worker do.
        """
        self._update_expected()
        own = self.compared_cost_of(worker)
        if own == NO_COST:
            return None
        if slots_version != self._slots_version:
            self._slots_version = slots_version
            for each in self._classes.values():
                each.slots = None
        rate, longest = 0.0, min(max_wait, remaining - size * self.expected_time(worker))
        for cost in self._costs:
            if cost >= own:
                break
            found = self._classes[cost]
            if found.times is None or found.by_score.pick(priority) is not None:
                continue  # nothing is known of it, or it has a slot now, and is too slow
            left = remaining - size * found.times.cautious
            if left > 0 and (slots := found.count_slots()):
                rate += slots / found.times.average
                longest = min(longest, left)
        return longest if rate and (ahead + 1) / rate <= longest else None

    def _makes_it(self, worker: WorkerAgent, within: float) -> bool:
        return within == math.inf or self.expected_time(worker) <= within

    def _best(
        self, workers: WorkerSelector, priority: Priority, *, nested: bool, eligible: Eligible | None
    ) -> WorkerAgent | None:
        """Return the first eligible one of the workers of one cost; move those to another one that have failed."""
        while (worker := workers.pick(priority, nested=nested)) is not None and worker.penalty > 1.0:
            self.update(worker)
        if worker is None or eligible is None or eligible(worker):
            return worker
        return workers.pick_among(lambda other: other.penalty == 1.0 and eligible(other), priority, nested=nested)

    def _untried(self, now: float, priority: Priority, *, nested: bool) -> WorkerAgent | None:
        """Return an idle worker whose cost is to be learned, and that is to be tried now.

        It is tried with one task at a time; again after a while if that has cost nothing, since the answer may have
        been in a cache. Otherwise, while a dear worker is fast, the cost of a cheap one might never be learned.
        """
        if not self._trials or len(self._costs) == 1:
            return None
        for _ in range(min(len(self._trials), _FEW)):
            worker, trial = next(iter(self._trials.items()))
            del self._trials[worker]
            self._trials[worker] = trial  # the others come first next time
            if worker.current_tasks or worker.penalty > 1.0 or now < trial.due or not worker.can_accept():
                continue
            if worker.may_begin(priority, nested=nested):
                return worker
        return None

    def _least_score(self, workers: list[WorkerAgent]) -> WorkerAgent | None:
        typical = self._typical()
        return min(workers, key=lambda worker: worker.score(self._task_type, typical), default=None)

    def _typical(self) -> float:
        return self._median() or 1.0

    # --- classes ---

    def _class_of(self, worker: WorkerAgent) -> float:
        """Return the class that a worker belongs to now."""
        cost = worker.cost(self._task_type)
        if cost is None or worker.penalty > 1.0:
            return NO_COST
        if worker.given_cost(self._task_type) is not None:
            return compared_cost(cost)
        present = self._filed.get(worker, NO_COST)
        if _is_close(cost, present):
            return present
        close = [known for known in self._costs if _is_close(cost, known)]
        return min(close, key=lambda known: abs(known - cost), default=compared_cost(cost))

    def _class(self, cost: float) -> _CostClass:
        found = self._classes.get(cost)
        if found is None:
            by_score = WorkerSelector(self._task_type, self._typical)
            by_speed = _SpeedSelector(self._task_type, lambda: self._median() or 0.0, self._times)
            found = self._classes[cost] = _CostClass(cost, by_score, by_speed)
            insort(self._costs, cost)
        return found

    def _unfile(self, worker: WorkerAgent) -> None:
        cost = self._filed.pop(worker, None)
        if cost is None:
            return
        found = self._classes[cost]
        found.remove(worker)
        if not found.workers:
            del self._classes[cost]
            self._costs.remove(cost)

    def _update_expected(self) -> None:
        if self._expected:
            expected, self._expected = self._expected, {}
            for worker, source in expected.items():
                self.update(worker)
                source.inform(worker, self)


def compared_cost(cost: float) -> float:
    """Return a cost as it is compared with others: by two digits, so that there are few."""
    return float(f"{cost:.2g}")


def _is_close(cost: float, other: float) -> bool:
    """Return whether a learned cost counts as equal to `other`."""
    return other != NO_COST and max(cost, other) <= _SAME_COST * min(cost, other)
