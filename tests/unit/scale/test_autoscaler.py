"""The loop of an autoscaler: it reads, decides and asks its target, and outlives whatever these raise."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from forebay.errors import InvalidSetting, ScalingFailed
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
        self.replicas_error: BaseException | None = None
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
        if self.replicas_error is not None:
            raise self.replicas_error
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
@pytest.mark.parametrize("away", ["target", "overflow"])
async def test_the_first_reading_after_an_outage_removes_nothing(away: str) -> None:
    demand = Demand(elsewhere=10, service=1.0)
    supervisor, target = ScriptedSupervisor(demand), ScriptedTarget(20)
    async with autoscaler(supervisor, target, minimum=0):
        await asyncio.sleep(400.0)
        if away == "target":
            target.replicas_error = OSError("the cluster is away")
        else:
            supervisor.answer = OSError("the overflow is away")
        await asyncio.sleep(3600.0)
        target.replicas_error, supervisor.answer = None, Demand(elsewhere=0, service=1.0)
        await asyncio.sleep(280.0)
        assert target.current == 20
        await asyncio.sleep(100.0)
        assert target.current == 0


@virtual
async def test_readings_that_are_far_apart_are_no_outage() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=0, service=1.0)), ScriptedTarget(20)
    async with autoscaler(supervisor, target, interval=100.0):
        await asyncio.sleep(500.0)
        assert target.current == 1


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
async def test_a_call_that_is_cancelled_by_itself_is_a_failure_like_others(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    target.error = asyncio.CancelledError()
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(10.0)
        assert scaler.statistics().failures > 0
        target.error = None
        await asyncio.sleep(60.0)
        assert target.current == 8
        supervisor.answer = asyncio.CancelledError()
        await asyncio.sleep(10.0)
        readings = len(supervisor.readings)
        supervisor.answer = Demand(elsewhere=8, service=1.0)
        await asyncio.sleep(60.0)
        assert len(supervisor.readings) > readings + 10
    assert "it was cancelled by itself" in caplog.text


@virtual
async def test_each_call_has_a_limit_of_its_own() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    read, scale = target.replicas, target.scale

    async def slow_replicas() -> Replicas:
        await asyncio.sleep(20.0)
        return await read()

    async def slow_scale(replicas: int) -> None:
        await asyncio.sleep(20.0)
        await scale(replicas)

    target.replicas, target.scale = slow_replicas, slow_scale  # type: ignore[method-assign]
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(45.0)
        assert (target.current, scaler.statistics().failures) == (8, 0)


@virtual
async def test_a_time_out_of_the_target_itself_is_told_as_its_own(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    target.error = TimeoutError("connect timed out after 0.1 s")
    async with autoscaler(supervisor, target):
        await asyncio.sleep(1.0)
    assert "connect timed out after 0.1 s" in caplog.text
    assert "did not answer" not in caplog.text


@virtual
async def test_a_target_that_fails_is_read_on_and_asked_at_once_for_more_than_it_failed_at() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=1, service=1.0)), ScriptedTarget(5)
    target.error = OSError("the cluster is away")
    async with autoscaler(supervisor, target, window=6.0, stabilization=0.0):
        await asyncio.sleep(300.0)  # by now a drop is tried every minute
        readings, asked = len(supervisor.readings), len(target.asked)
        assert {*target.asked} == {2}
        assert readings > 140
        target.error = None
        await asyncio.sleep(2.0)
        assert len(target.asked) == asked
        supervisor.answer = Demand(elsewhere=10, service=1.0)
        await asyncio.sleep(4.0)
        assert target.current > 10


@virtual
async def test_an_autoscaler_that_is_left_ends_though_a_call_swallows_the_cancellation() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    begun = asyncio.Event()

    async def scale(replicas: int) -> None:  # noqa: ARG001 - it has this name
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(20.0)

    target.scale = scale  # type: ignore[method-assign]
    async with asyncio.timeout(5.0), autoscaler(supervisor, target):
        await begun.wait()
    assert not target.is_open


@virtual
async def test_a_target_is_closed_though_leaving_is_cancelled() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    begun = asyncio.Event()

    async def scale(replicas: int) -> None:  # noqa: ARG001 - it has this name
        begun.set()
        try:
            await asyncio.sleep(20.0)
        finally:
            await asyncio.sleep(5.0)  # it winds up

    async def scene() -> None:
        async with autoscaler(supervisor, target):
            await asyncio.Event().wait()

    target.scale = scale  # type: ignore[method-assign]
    running = asyncio.create_task(scene())
    await begun.wait()
    for _ in range(2):
        running.cancel()
        await asyncio.sleep(0.1)
    assert running.done()
    assert not target.is_open
    await asyncio.sleep(5.0)


class TargetInTrouble(ScriptedTarget):
    """A target that does not open, or does not close."""

    async def open(self) -> None:
        """Fail, or wait, as the test has set."""
        await super().open()
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        """Fail."""
        await super().close()
        raise ConnectionError("it is gone")


@virtual
async def test_what_closing_raises_is_logged_and_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=0)), TargetInTrouble()
    async with autoscaler(supervisor, target):
        pass
    assert "scripted could not be closed (ConnectionError: it is gone)" in caplog.text
    target.error = ValueError("it does not open")
    with pytest.raises(ValueError, match="it does not open"):
        await autoscaler(supervisor, target).__aenter__()
    assert not target.is_open


@virtual
async def test_a_target_that_does_not_open_in_time_is_given_up() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=0)), TargetInTrouble()
    target.hangs = True
    began = now()
    with pytest.raises(ScalingFailed, match=r"scripted: open\(\).*did not answer within 30 s"):
        await autoscaler(supervisor, target).__aenter__()
    assert now() - began == pytest.approx(30.0, abs=0.1)
    assert not target.is_open


@virtual
async def test_statistics_count_the_replicas_that_the_target_has() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()

    async def scale(replicas: int) -> None:
        target.current = min(replicas, 3)  # as a group whose greatest size is 3

    target.scale = scale  # type: ignore[method-assign]
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(101.0)
        statistics = scaler.statistics()
        assert (statistics.current, statistics.wanted, statistics.scaled_up) == (3, 8, 2)
        assert statistics.replica_seconds == pytest.approx(300.0, abs=3.0)


@virtual
async def test_statistics_do_not_count_replicas_that_were_refused() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    target.error = OSError("no more instances")
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(101.0)
        statistics = scaler.statistics()
        assert statistics.current == 1
        assert statistics.replica_seconds == pytest.approx(100.0, abs=3.0)


@virtual
async def test_the_service_time_that_replicas_told_counts_while_there_are_none() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=1, service=0.001)), ScriptedTarget()
    target.service = 30.0
    async with autoscaler(supervisor, target, minimum=0, window=6.0, stabilization=10.0):
        await asyncio.sleep(5.0)
        supervisor.answer = Demand(elsewhere=0)
        await asyncio.sleep(60.0)
        assert target.current == 0
        target.service, supervisor.answer = None, Demand(elsewhere=0, spilled=1000)
        await asyncio.sleep(4.0)
        assert target.current == 20


@virtual
async def test_until_a_service_time_is_known_the_fleet_doubles_at_most() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, spilled=1000)), ScriptedTarget(4)
    async with autoscaler(supervisor, target):
        target.ready = 4
        await asyncio.sleep(60.0)
        assert target.asked == [8]  # of which four are not ready


@virtual
async def test_tasks_that_no_ready_replica_takes_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=0, spilled=10, service=1.0)), ScriptedTarget()
    async with autoscaler(supervisor, target):
        await asyncio.sleep(59.0)
        assert "have taken none" not in caplog.text
        await asyncio.sleep(200.0)
        assert caplog.text.count("have taken none of the 10 tasks that wait in the overflow for 60 s") == 1
        assert "have workers for work?" in caplog.text
        for demand in (Demand(elsewhere=1, spilled=9), Demand(elsewhere=0, spilled=8)):
            supervisor.answer = demand
            await asyncio.sleep(59.0)
        assert caplog.text.count("have taken none") == 1
        await asyncio.sleep(10.0)
        assert caplog.text.count("have taken none") == 2


@pytest.mark.parametrize(
    ("demand", "ready", "limited_by"),
    [
        (Demand(elsewhere=0, spilled=10), 0, None),  # none has started
        (Demand(elsewhere=0, spilled=10), 1, "key:requests"),
        (Demand(elsewhere=1, spilled=10), 1, None),
        (Demand(elsewhere=0, spilled=0), 1, None),
    ],
)
def test_tasks_that_wait_for_a_reason_are_not_told(
    demand: Demand, ready: int, limited_by: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    @virtual
    async def scene() -> None:
        target = ScriptedTarget()
        target.ready, target.limited_by = ready, limited_by
        async with autoscaler(ScriptedSupervisor(demand), target):
            await asyncio.sleep(300.0)

    scene()
    assert "have taken none" not in caplog.text


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
async def test_no_replica_is_added_while_the_replicas_are_short_of_something_else() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    target.limited_by = "key:requests"
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(120.0)
        statistics = scaler.statistics()
        assert (target.asked, statistics.limited_by, statistics.wanted) == ([], "key:requests", 8)
        assert statistics.replica_seconds == pytest.approx(120.0, abs=3.0)
        assert statistics.unbought_seconds == pytest.approx(7 * 120.0, abs=30.0)
        target.limited_by = None
        await asyncio.sleep(10.0)
        assert target.current == 8


@virtual
async def test_what_the_supervisor_itself_is_short_of_does_not_keep_replicas_elsewhere_from_being_added() -> None:
    demand = Demand(elsewhere=4, service=1.0, limited_by="worker:local")
    supervisor, target = ScriptedSupervisor(demand), ScriptedTarget()
    async with autoscaler(supervisor, target) as scaler:
        await asyncio.sleep(5.0)
        assert (target.current, scaler.statistics().limited_by) == (8, None)


@virtual
async def test_while_no_replica_can_tell_what_it_is_short_of_one_is_started() -> None:
    demand = Demand(elsewhere=0, spilled=300, service=30.0, limited_by="worker:local")
    supervisor, target = ScriptedSupervisor(demand), ScriptedTarget(0)
    target.ready = 0
    async with autoscaler(supervisor, target, minimum=0) as scaler:
        await asyncio.sleep(60.0)
        assert (target.asked, scaler.statistics().limited_by) == ([1], "worker:local")
        target.ready = None
        await asyncio.sleep(10.0)
        assert target.current == 20


@pytest.mark.parametrize("outside", [True, False])
def test_what_a_slot_here_is_short_of_is_for_the_supervisor_to_tell(outside: bool) -> None:  # noqa: FBT001 - a row
    @virtual
    async def scene() -> None:
        demand = Demand(running=4, elsewhere=4, slots=1, service=1.0, limited_by="key:budget")
        target = ScriptedTarget(outside=outside)
        async with autoscaler(ScriptedSupervisor(demand), target):
            await asyncio.sleep(60.0)
            assert target.current == (8 if outside else 1)

    scene()


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


def unnamed(**attributes: Any) -> ScriptedTarget:
    target = ScriptedTarget()
    for name, value in attributes.items():
        setattr(target, name, value)
    return target


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
        ({"target": unnamed(name=None)}, "`name`, and with `outside` True or False"),
        ({"target": unnamed(outside=None)}, "`name`, and with `outside` True or False"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    target = settings.pop("target", None) or ScriptedTarget(outside=settings.pop("outside", True))
    with pytest.raises(InvalidSetting, match=message):
        autoscaler(ScriptedSupervisor(Demand()), target, **settings)
