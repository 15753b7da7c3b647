"""Timers: one armed handle for all of them, and each fires when it is due."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import cast

import hypothesis.strategies as st
from hypothesis import given
from tests.support.task_plane import TIMER_JITTER, approximately, now, run_ready, virtual

from forebay.simulation import simulate, virtual_loop
from forebay.supervisor.runs.timers import Timer, Timers


class Handle:
    """A timer handle of the loop."""

    def __init__(self, loop: Clockwork, when: float, callback: Callable[[], object]) -> None:
        self.loop = loop
        self.when = when
        self.callback = callback

    def cancel(self) -> None:
        if self in self.loop.handles:
            self.loop.handles.remove(self)


class Clockwork:
    """As much of an event loop as timers use; the test says when it runs what it was asked to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.handles: list[Handle] = []
        self.ready: list[Callable[[], object]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object], *, context: Context) -> Handle:
        del context
        self.handles.append(Handle(self, when, callback))
        return self.handles[-1]

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.ready.append(callback)

    @property
    def armed(self) -> list[float]:
        return [handle.when for handle in self.handles]

    def pass_to(self, when: float) -> None:
        """Jump to `when`, as a loop does that was blocked, and call what is due."""
        self.now = when
        for handle in [handle for handle in self.handles if handle.when <= when]:
            handle.cancel()
            handle.callback()

    def turn(self) -> None:
        ready, self.ready = self.ready, []
        for callback in ready:
            callback()


def timers_of(loop: Clockwork) -> Timers:
    return Timers(cast("asyncio.AbstractEventLoop", loop))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60))
def test_each_timer_fires_when_it_is_due_and_not_before(dues: list[float]) -> None:
    fired: list[tuple[float, float]] = []

    async def main() -> None:
        timers = Timers(asyncio.get_running_loop())
        for due in dues:
            timers.at(due, lambda due=due: fired.append((due, now())))  # type: ignore[misc]
        await asyncio.sleep(101.0)

    simulate(main)
    assert [due for due, _ in fired] == sorted(dues)
    assert all(due <= at <= due + TIMER_JITTER for due, at in fired)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=30))
def test_timers_set_by_timers_fire_when_they_are_due_and_delay_no_others(pairs: list[tuple[float, float]]) -> None:
    fired: list[tuple[float, float]] = []

    async def main() -> None:
        timers = Timers(asyncio.get_running_loop())

        def first(due: float, later: float) -> None:
            fired.append((due, now()))
            at = now() + later
            timers.at(at, lambda: fired.append((at, now())))

        for due, later in pairs:
            timers.at(due, lambda due=due, later=later: first(due, later))  # type: ignore[misc]
        await asyncio.sleep(30.0)

    simulate(main)
    assert len(fired) == 2 * len(pairs)
    assert all(due <= at <= due + TIMER_JITTER for due, at in fired)


def test_a_timer_set_by_a_timer_does_not_delay_the_next_one() -> None:
    loop = Clockwork()
    timers = timers_of(loop)
    fired: list[str] = []

    def first() -> None:
        timers.at(9.0, lambda: fired.append("ninth"))

    timers.at(1.0, first)
    timers.at(2.0, lambda: fired.append("second"))
    loop.pass_to(1.0)
    assert loop.armed == [2.0]


@virtual
async def test_a_cancelled_timer_does_not_fire() -> None:
    timers = Timers(asyncio.get_running_loop())
    fired: list[float] = []
    first = timers.at(1.0, lambda: fired.append(1.0))
    timers.at(2.0, lambda: fired.append(2.0))
    timers.cancel(first)
    timers.cancel(first)
    await asyncio.sleep(3.0)
    assert fired == [2.0]
    timers.cancel(first)


@virtual
async def test_a_timer_may_cancel_another_that_is_due_with_it() -> None:
    timers = Timers(asyncio.get_running_loop())
    fired: list[str] = []
    others: list[Timer] = []
    timers.at(1.0, lambda: timers.cancel(others[0]))
    others.append(timers.at(1.0, lambda: fired.append("other")))
    timers.at(1.0, lambda: fired.append("third"))
    await asyncio.sleep(2.0)
    assert fired == ["third"]


@virtual
async def test_many_cancelled_timers_are_removed_even_while_others_fire() -> None:
    timers = Timers(asyncio.get_running_loop())
    fired: list[int] = []
    doomed = [timers.at(50.0, lambda: fired.append(-1)) for _ in range(1000)]
    for number in range(10):
        timers.at(1.0 + number, lambda number=number: fired.append(number))  # type: ignore[misc]

    def cancel_all() -> None:
        for timer in doomed:
            timers.cancel(timer)

    timers.at(5.0, cancel_all)
    await asyncio.sleep(5.5)
    assert len(timers._heap) < 100
    await asyncio.sleep(60.0)
    assert fired == list(range(10))


def test_one_handle_of_the_loop_is_armed_and_for_the_soonest() -> None:
    loop = Clockwork()
    timers = timers_of(loop)
    for due in (5.0, 3.0, 8.0, 1.0, 4.0):
        timers.at(due, lambda: None)
        assert len(loop.armed) == 1
    assert loop.armed == [1.0]
    loop.pass_to(1.0)
    assert loop.armed == [3.0]


def test_a_timer_that_is_on_time_fires_at_once() -> None:
    loop = Clockwork()
    fired: list[str] = []
    timers_of(loop).at(1.0, lambda: fired.append("now"))
    loop.pass_to(1.05)
    assert fired == ["now"]


def test_timers_that_fell_due_while_the_loop_was_blocked_give_it_one_turn() -> None:
    loop = Clockwork()
    timers = timers_of(loop)
    fired: list[str] = []
    timers.at(1.0, lambda: fired.append("first"))
    second = timers.at(1.5, lambda: fired.append("second"))
    timers.at(9.0, lambda: fired.append("last"))
    loop.pass_to(4.0)
    assert fired == []
    timers.cancel(second)  # the run that it was to end has finished in that turn
    loop.turn()
    assert fired == ["first"]
    assert loop.armed == [9.0]


@virtual
async def test_a_timer_that_fails_is_reported_and_keeps_no_other_from_firing() -> None:
    timers = Timers(asyncio.get_running_loop())
    fired: list[str] = []
    timers.at(1.0, lambda: fired.append(f"{1 / 0}"))
    timers.at(1.0, lambda: fired.append("beside it"))
    timers.at(2.0, lambda: fired.append("after it"))
    await asyncio.sleep(3.0)
    assert fired == ["beside it", "after it"]
    (lost,) = virtual_loop().errors
    assert isinstance(lost.exception, ZeroDivisionError)
    virtual_loop().errors.clear()


@virtual
async def test_closed_timers_do_not_fire() -> None:
    timers = Timers(asyncio.get_running_loop())
    fired: list[str] = []
    timers.at(1.0, lambda: fired.append("first"))
    timers.close()
    timers.at(1.0, lambda: fired.append("set after the close"))
    assert not timers.armed
    await asyncio.sleep(2.0)
    await run_ready()
    assert fired == []
    assert now() == approximately(2.0)
