"""The leases that this supervisor holds: timed rights to stored tasks, and the heartbeat that renews them."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from forebay import clock
from forebay.events import log
from forebay.interfaces import Lease, TaskStore
from forebay.supervisor.failure_log import FailureLog


class _HeldLease:
    """A lease and its end, in one object because the heartbeat's thread writes the end and the loop reads it.

    The end is by `clock.now`: the wall clock, by which the store has it, may be set.
    """

    __slots__ = ("lease", "until")

    def __init__(self, lease: Lease, until: float) -> None:
        self.lease = lease
        self.until = until

    def extend(self, until: float) -> None:
        """Make it last until `until`."""
        self.until = until

    def replace(self, lease: Lease) -> None:
        """Go on with a lease of the same fence."""
        self.lease = lease

    def lose(self) -> bool:
        """End it, because another process has the task; return whether it had not been lost before."""
        had, self.until = self.until, -math.inf
        return had > self.until


class HeldLeases:
    """Leases by task id. Only `renew` may be called outside the loop's thread.

    Args:
        duration: seconds that a lease lasts unless renewed.
    """

    def __init__(self, duration: float) -> None:
        self._duration = duration
        self._held: dict[str, _HeldLease] = {}

    def hold(self, lease: Lease) -> None:
        """Keep a lease and renew it from now on."""
        seconds = min(self._duration, lease.until - clock.wall_time())
        self._held[lease.record.task_id] = _HeldLease(lease, clock.now() + seconds)

    def drop(self, task_id: str) -> Lease | None:
        """Forget a lease, and return it if there was one."""
        held = self._held.pop(task_id, None)
        return None if held is None else held.lease

    def update(self, lease: Lease) -> None:
        """Go on with `lease` in place of that of the same fence, if it is held."""
        held = self._held.get(lease.record.task_id)
        if held is not None and held.lease.fence == lease.fence:
            held.replace(lease)

    def is_valid(self, task_id: str) -> bool:
        """Return whether the lease on a task has neither lapsed nor been lost."""
        held = self._held.get(task_id)
        return held is not None and clock.now() < held.until

    def held(self) -> Sequence[Lease]:
        """Return every lease."""
        return [each.lease for each in self._held.values()]

    def holds(self, lease: Lease) -> bool:
        """Return whether a lease is held, though it may have lapsed."""
        held = self._held.get(lease.record.task_id)
        return held is not None and held.lease.fence == lease.fence

    def extend(self, lease: Lease, until: float) -> bool:
        """Make a lease last until `until`, in epoch seconds, though it was lost; return whether it is held."""
        held = self._held.get(lease.record.task_id)
        if held is None or held.lease.fence != lease.fence:
            return False
        held.extend(clock.now() + until - clock.wall_time())
        return True

    def take(self, task_ids: Iterable[str]) -> Sequence[Lease]:
        """Return the leases on tasks, and forget them."""
        held = [self._held.pop(task_id, None) for task_id in task_ids]
        return [each.lease for each in held if each is not None]

    def conversations(self) -> Mapping[str, int]:
        """Return how many leases are held on tasks of each conversation."""
        threads = (held.lease.record.thread_id for held in self._held.values())
        return Counter(thread_id for thread_id in threads if thread_id is not None)

    def take_all(self) -> Sequence[Lease]:
        """Return every lease, and forget them."""
        return self.take(list(self._held))

    def renew(self, store: TaskStore) -> None:
        """Extend every lease to its whole duration from now. It blocks, and may be called from any thread."""
        held, until = list(self._held.values()), clock.now() + self._duration
        lost = {
            lease.fence
            for lease in store.renew([each.lease for each in held], until=clock.wall_time() + self._duration)
        }
        for each in held:
            if each.lease.fence not in lost:
                each.extend(until)
            elif self._held.get(each.lease.record.task_id) is each and each.lose():  # else it was dropped meanwhile
                task_id = each.lease.record.task_id
                log.warning("the lease on task %r was lost: the result of its handler will not be stored", task_id)


class Heartbeat:
    """Calls `beat` every `interval` seconds in a thread of its own, and then `after_beat` in the loop.

    A handler that blocks the loop delays `after_beat`, but no beat. In virtual time, the loop itself schedules beats.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        interval: float,
        beat: Callable[[], None],
        after_beat: Callable[[], None],
        failures: FailureLog,
    ) -> None:
        self._loop = loop
        self._interval = interval
        self._beat = beat
        self._after_beat = after_beat
        self._failures = failures
        self._stopped = threading.Event()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start beating."""
        if clock.is_virtual(self._loop):
            self._arm()
        else:
            threading.Thread(target=self._run, name="forebay-heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Stop beating. Does not wait for a beat that is running."""
        self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            if self._loop.is_closed():  # nothing runs any more whose leases matter
                return
            self._try_beat()
            try:
                self._loop.call_soon_threadsafe(self._beat_done)
            except RuntimeError:  # the loop is closed
                return

    def _arm(self) -> None:
        self._timer = self._loop.call_later(self._interval, self._beat_in_loop)

    def _beat_in_loop(self) -> None:
        self._loop.run_in_executor(None, self._try_beat).add_done_callback(lambda _: self._beat_done())
        self._arm()

    def _try_beat(self) -> None:
        try:
            self._beat()
        except Exception as error:  # noqa: BLE001 - the next beat may succeed; until then leases are lost at worst
            if not self._stopped.is_set():
                self._failures.report("leases on stored tasks could not be renewed", error=error)

    def _beat_done(self) -> None:
        if not self._stopped.is_set():
            self._after_beat()
