"""The loop of an autoscaler: it reads, decides and asks its target, and outlives whatever these raise."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from forebay.errors import InvalidSetting
from forebay.events import Event, Scaled
from forebay.interfaces import Demand
from forebay.scale import Autoscaler, Replicas
from forebay.testing import now, virtual


class ScriptedSupervisor:
    """A supervisor whose demand is set by the test."""

    def __init__(self, demand: Demand) -> None:
        self.answer: Demand | BaseException | Callable[[], Demand] = demand
        self.events: list[Event] = []
        self.asked_for: Sequence[str] = ()
        self.readings: list[float] = []

    async def demand(self, task_types: Sequence[str]) -> Demand:
        """Return what the test has set."""
        self.asked_for = task_types
        self.readings.append(now())
        if callable(self.answer):
            return self.answer()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def emit(self, event: Event) -> None:
        """Remember an event."""
        self.events.append(event)

    @property
    def scaled(self) -> list[tuple[int, int]]:
        """The replicas before and after, of each event."""
        return [(event.before, event.after) for event in self.events if isinstance(event, Scaled)]


class ScriptedTarget:
    """A target that does as it is asked at once, unless the test has set an error for it."""

    name = "scripted"

    def __init__(self, current: int = 1, *, outside: bool = True) -> None:
        self.outside = outside
        self.current = current
        self.ready: int | None = None
        self.error: BaseException | None = None
        self.hangs = False
        self.asked: list[int] = []
        self.is_open = False
        self.limited_by: str | None = None
        self.service: float | None = None

    async def open(self) -> None:
        """Open it."""
        self.is_open = True

    async def close(self) -> None:
        """Close it."""
        self.is_open = False

    async def replicas(self) -> Replicas:
        """Return the replicas."""
        ready = self.current if self.ready is None else self.ready
        return Replicas(current=self.current, ready=ready, limited_by=self.limited_by, service=self.service)

    async def scale(self, replicas: int) -> None:
        """Do as asked."""
        self.asked.append(replicas)
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self.current = replicas


def autoscaler(supervisor: ScriptedSupervisor, target: Any, **settings: Any) -> Autoscaler:
    return Autoscaler(supervisor, target, **{"task_types": ["work"], "maximum": 20, "load": 0.5, **settings})


@virtual
async def test_a_reading_every_interval() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=1)), ScriptedTarget()
    async with autoscaler(supervisor, target, interval=5.0):
        await asyncio.sleep(21.0)
    assert [round(at) for at in supervisor.readings[1:]] == [0, 5, 10, 15, 20]  # the first is for the overflow
    assert supervisor.asked_for == ("work",)


@virtual
async def test_it_asks_its_target_and_reports_what_it_did() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    async with autoscaler(supervisor, target, stabilization=20.0) as scaler:
        await asyncio.sleep(1.0)
        assert (target.current, supervisor.scaled) == (8, [(1, 8)])
        statistics = scaler.statistics()
        assert (statistics.current, statistics.wanted, statistics.asked, statistics.load) == (8, 8, 4.0, 4.0)
        await asyncio.sleep(2.0)
        assert scaler.statistics().load == 0.5
        supervisor.answer = Demand(elsewhere=1, service=1.0)
        await asyncio.sleep(200.0)
        assert target.current == 2
        statistics = scaler.statistics()
        assert (statistics.scaled_up, statistics.reversals, statistics.panic) == (1, 1, False)
        assert statistics.scaled_down == len(supervisor.scaled) - 1
    event = supervisor.events[0]
    assert event.as_dict() == {
        "kind": "scaled",
        "time": event.time,
        "at": event.at,
        "target": "scripted",
        "before": 1,
        "after": 8,
        "asked": 4.0,
        "panic": True,
        "limited_by": None,
    }


@virtual
async def test_it_stops_when_it_is_left_and_closes_the_target() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4)), ScriptedTarget()
    scaler = autoscaler(supervisor, target)
    async with scaler:
        assert target.is_open
        await asyncio.sleep(5.0)
    assert not target.is_open
    readings = len(supervisor.readings)
    await asyncio.sleep(100.0)
    assert len(supervisor.readings) == readings
    async with scaler:  # and it may be entered again
        await asyncio.sleep(5.0)
        with pytest.raises(RuntimeError, match="once at a time"):
            await scaler.__aenter__()
    assert len(supervisor.readings) > readings


@virtual
async def test_a_target_that_fails_is_asked_again_later_and_later(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    target.error = OSError("the cluster is away")
    with caplog.at_level(logging.WARNING, "forebay"):
        async with autoscaler(supervisor, target) as scaler:
            await asyncio.sleep(600.0)
            failures = len(target.asked)
            assert 8 < failures < 60
            assert scaler.statistics().failures == failures
            assert supervisor.scaled == []
            target.error = None
            await asyncio.sleep(60.0)
            assert (target.current, len(supervisor.scaled)) == (8, 1)
            assert scaler.statistics().failures == failures
    assert "the cluster is away" in caplog.text
    assert "scaling scripted failed" in caplog.text


@virtual
async def test_a_target_that_hangs_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    target.hangs = True
    with caplog.at_level(logging.WARNING, "forebay"):
        async with autoscaler(supervisor, target):
            await asyncio.sleep(29.0)
            assert target.asked == [8]
            await asyncio.sleep(60.0)
            assert len(target.asked) > 1
            target.hangs = False
            await asyncio.sleep(60.0)
            assert target.current == 8
    assert "did not answer within 30 s" in caplog.text


@virtual
async def test_a_supervisor_that_cannot_be_read_changes_nothing() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(5.0)
        supervisor.answer = OSError("the overflow is away")
        await asyncio.sleep(1000.0)
        assert (target.current, target.asked) == (8, [8])
        assert scaler.statistics().failures > 10


@virtual
async def test_a_target_that_does_not_follow_is_asked_again_and_reported_once() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()

    async def scale(replicas: int) -> None:
        target.asked.append(replicas)

    target.scale = scale  # type: ignore[method-assign]
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(21.0)
        assert target.asked == [8] * 11
        assert supervisor.scaled == [(1, 8)]
        assert scaler.statistics().scaled_up == 1


@virtual
async def test_refused_tasks_ask_for_slots() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=1, refused=1000, service=2.0)), ScriptedTarget(2)
    async with autoscaler(supervisor, target):
        await asyncio.sleep(3.0)
        assert target.current == 2  # those of before do not count
        supervisor.answer = Demand(elsewhere=1, refused=1010, service=2.0)
        await asyncio.sleep(1.5)
        assert target.current > 2


@pytest.mark.parametrize("outside", [True, False])
def test_whose_service_time_counts(outside: bool) -> None:  # noqa: FBT001 - a row
    @virtual
    async def scene() -> None:
        demand = Demand(elsewhere=0, spilled=15, service=1.0, running=0)
        supervisor, target = ScriptedSupervisor(demand), ScriptedTarget(outside=outside)
        target.service = 15.0
        async with autoscaler(supervisor, target, service=30.0):
            await asyncio.sleep(1.0)
            assert target.current == (15 if outside else 1)  # 15 tasks of 15 s, or of 1 s, within 30 s
        target.service, supervisor.answer = None, Demand(elsewhere=0, spilled=5)
        async with autoscaler(supervisor, target, service=30.0):
            await asyncio.sleep(1.0)
            assert target.current == (15 if outside else 10)

    scene()


@virtual
async def test_no_replica_is_added_while_the_replicas_or_the_supervisor_are_short_of_something_else() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0, limited_by="key:budget")), ScriptedTarget()
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(60.0)
        assert (target.asked, scaler.statistics().limited_by) == ([], "key:budget")
        supervisor.answer, target.limited_by = Demand(elsewhere=4, service=1.0), "key:requests"
        await asyncio.sleep(60.0)
        statistics = scaler.statistics()
        assert (target.asked, statistics.limited_by, statistics.wanted) == ([], "key:requests", 8)
        assert statistics.replica_seconds == pytest.approx(120.0, abs=3.0)
        assert statistics.unbought_seconds == pytest.approx(7 * 120.0, abs=30.0)
        target.limited_by = None
        await asyncio.sleep(10.0)
        assert target.current == 8


@virtual
async def test_slots_are_not_added_to_a_loop_that_does_not_keep_up() -> None:
    demand = Demand(running=4, slots=1, service=1.0, host=1.2)
    supervisor, target = ScriptedSupervisor(demand), ScriptedTarget(outside=False)
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(60.0)
        assert (target.asked, scaler.statistics().limited_by) == ([], "host")


@virtual
async def test_other_workers_of_the_types_keep_their_share() -> None:
    supervisor, target = ScriptedSupervisor(Demand()), ScriptedTarget(4, outside=False)
    supervisor.answer = lambda: Demand(running=10, slots=10 + target.current, service=1.0)
    async with autoscaler(supervisor, target):
        await asyncio.sleep(60.0)
        assert target.current == 10  # (10 - 0.5 * 10) / 0.5


@virtual
async def test_replicas_outside_need_an_overflow() -> None:
    supervisor, target = ScriptedSupervisor(Demand()), ScriptedTarget()
    with pytest.raises(InvalidSetting, match="the replicas of scripted take tasks from there"):
        await autoscaler(supervisor, target).__aenter__()
    assert not target.is_open


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_types": "work"}, "a list of task types"),
        ({"task_types": []}, "a list of task types"),
        ({"interval": 0}, "interval"),
        ({"service": -1}, "service"),
        ({"maximum": 0}, "maximum"),
        ({"seats": 2, "outside": False}, "1, because a replica of scripted is one slot"),
        ({"minimum": 0, "outside": False}, "at least 1, because scripted keeps one slot"),
        ({"target": object()}, "such as WorkerTarget"),
        ({"target": ScriptedTarget}, "such as WorkerTarget"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    target = settings.pop("target", None) or ScriptedTarget(outside=settings.pop("outside", True))
    with pytest.raises(InvalidSetting, match=message):
        autoscaler(ScriptedSupervisor(Demand()), target, **settings)
