"""Tickets, results, events and statistics as plain data for JSON."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import json
import math
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import pytest
from tests.support.task_plane import Agent, flood, now, run_ready, virtual

from forebay import (
    BackpressureSupervisor,
    Budget,
    CallUsage,
    Deadline,
    Priority,
    Quota,
    Reading,
    Task,
    TaskResult,
    TaskStatus,
    Upstream,
    clock,
    progress,
)
from forebay.events import Event, TaskFinished, TaskProgress


class Colour(Enum):
    RED = "red"


class Note(pydantic.BaseModel):
    text: str
    on: dt.date


@dataclasses.dataclass
class Point:
    x: int
    y: float


class Text(str):
    __slots__ = ()


class Struct(msgspec.Struct):
    data: bytes


def make_supervisor(handler: Any, *, upstreams: Sequence[Upstream] = (), **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**options)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], upstreams=upstreams)
    return supervisor


def as_json(plain: dict[str, Any]) -> Any:
    """Return what strict encoders write and a browser reads."""
    text = json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()
    assert json.loads(text) == msgspec.json.decode(msgspec.json.encode(plain))
    return json.loads(text)


def result(value: Any) -> TaskResult:
    return TaskResult(task_id="a", worker_id="w", success=True, status=TaskStatus.SUCCEEDED, result=value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        ({"a": [1, 2.5, True, "ü"], "b": (1, 2)}, {"a": [1, 2.5, True, "ü"], "b": [1, 2]}),
        ({1: "one", Colour.RED: 2}, {"1": "one", "red": 2}),
        ({1}, [1]),
        (math.inf, None),
        ([math.nan, {"a": -math.inf}], [None, {"a": None}]),
        (b"\x00\x01", "AAE="),
        (Colour.RED, "red"),
        (Priority.HIGH, 1),
        (Text("text"), "text"),
        (Point(1, math.inf), {"x": 1, "y": None}),
        (Struct(b"a"), {"data": "YQ=="}),
        (dt.datetime(2026, 1, 2, tzinfo=dt.UTC), "2026-01-02T00:00:00Z"),
        ([Note(text="a", on=dt.date(2026, 1, 2))], [{"text": "a", "on": "2026-01-02"}]),
        ("\ud800", "\\ud800"),
        ({"\ud800": "\ud800"}, {"\\ud800": "\\ud800"}),
    ],
    ids=repr,
)
def test_a_value_in_json(value: Any, plain: Any) -> None:
    assert as_json(result(value).as_dict())["result"] == plain
    assert "result_error" not in result(value).as_dict()


class Broken:
    def model_dump(self, **_: Any) -> Any:
        raise RuntimeError("secret")


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), "it holds a object"),
        ([{"a": Broken}], "it holds a type"),
        ({(1, 2): 3}, "writing it raised TypeError"),
        (Broken(), "writing it raised RuntimeError"),
        (endless(), "it is nested too deeply, or holds itself"),
        (2**64, "it holds a whole number beyond 64 bits"),
    ],
    ids=["object", "inside", "key", "raises", "endless", "number"],
)
def test_a_value_that_json_cannot_hold_says_why_and_not_what(value: Any, why: str) -> None:
    plain = as_json(result(value).as_dict())
    assert plain["result"] is None
    assert plain["result_error"] == f"the value has no form in JSON: {why}"
    assert plain["success"] is True
    assert plain["error"] is None


@virtual
async def test_a_ticket_through_its_life() -> None:
    async with make_supervisor(Agent(2.0), backpressure_threshold=1.0) as supervisor:
        deadline = Deadline.within(30.0)
        task = Task(
            "work", {"topic": "Elbe"}, task_id="a", priority=Priority.HIGH, key="k", thread_id="t", deadline=deadline
        )
        ticket = await supervisor.submit(task)
        expected = {
            "task_id": "a",
            "task_type": "work",
            "priority": "high",
            "tenant": "default",
            "key": "k",
            "thread_id": "t",
            "deadline": deadline.at,
            "not_before": None,
            "verdict": "admitted",
            "status": "running",
            "reason": None,
            "limited_by": None,
            "load": ticket.load,
            "retry_after": None,
            "attempts": 1,
            "error": None,
            "result": None,
        }
        await run_ready()
        assert as_json(ticket.as_dict()) == expected
        assert as_json(ticket.as_dict(payload=True)) == {**expected, "payload": {"topic": "Elbe"}}
        await ticket
        plain = as_json(ticket.as_dict())
        assert plain["status"] == "succeeded"
        assert plain["result"] == {
            "task_id": "a",
            "worker_id": "worker",
            "success": True,
            "status": "succeeded",
            "result": {"topic": "Elbe"},
            "error": None,
            "duration_ms": pytest.approx(2000.0),
            "attempts": 1,
            "usage": CallUsage().as_dict(),
        }
        assert "result" not in ticket.as_dict(values=False)["result"]


@virtual
async def test_a_rejected_ticket_says_why_and_has_no_infinity() -> None:
    async with make_supervisor(Agent(1.0), max_queue_size=0) as supervisor:
        flood(supervisor, "work", 1)
        ticket = supervisor.submit_nowait(Task("work"))
        plain = as_json(ticket.as_dict())
        assert (plain["verdict"], plain["status"], plain["result"]) == ("rejected", "rejected", None)
        assert plain["limited_by"] == "pool:work"
        assert plain["reason"]


@virtual
async def test_a_failed_ticket_has_the_error_and_not_its_cause() -> None:
    async with BackpressureSupervisor() as supervisor:

        async def fail(_: Task) -> None:
            raise ValueError("no notes")

        supervisor.register_worker("worker", handler=fail, task_types=["work"])
        ticket = await supervisor.submit(Task("work"))
        await ticket
        assert as_json(ticket.as_dict())["result"]["error"] == "ValueError: no notes"


@pytest.mark.blocks
@virtual
async def test_a_ticket_that_is_left_in_the_overflow_says_so(tmp_path: Path) -> None:
    overflow = f"sqlite:///{tmp_path}/spill.db"
    async with make_supervisor(Agent(1.0), overflow=overflow, max_queue_size=0) as supervisor:
        tickets = [await supervisor.submit(Task("work")) for _ in range(9)]
        await supervisor.drain(0.0)
    plain = as_json(tickets[-1].as_dict())
    assert (plain["status"], plain["result"]) == ("spilled", None)
    assert "is kept in the overflow" in plain["error"]


@virtual
async def test_events_have_their_kind_and_the_wall_time_at_which_they_happened() -> None:
    async def handler(task: Task) -> Any:
        await asyncio.sleep(1.0)
        progress({"page": 1})
        await asyncio.sleep(1.0)
        return object() if task.payload == "object" else "done"

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        events = supervisor.events()
        start = clock.wall_time()
        ticket = await supervisor.submit(Task("work", "secret", task_id="a"))
        await asyncio.sleep(0.5)
        late = ticket.events()
        repeated = await anext(late)
        await ticket
        await asyncio.sleep(60.0)  # they are read long after
        plain = [as_json((await anext(events)).as_dict()) for _ in range(4)]
        assert [event["kind"] for event in plain] == ["submitted", "started", "progress", "finished"]
        assert [event["time"] - start for event in plain] == pytest.approx([0.0, 0.0, 1.0, 2.0])
        assert (plain[0]["verdict"], plain[0]["priority"]) == ("admitted", "normal")
        assert plain[2]["value"] == {"page": 1}
        assert plain[3]["result"]["result"] == "done"
        assert "secret" not in json.dumps(plain)
        assert as_json(repeated.as_dict()) == {**plain[1], "time": pytest.approx(plain[1]["time"])}
        unreadable = await supervisor.submit(Task("work", "object"))
        finished = [event async for event in unreadable.events()][-1].as_dict()
        assert "object" in as_json(finished)["result"]["result_error"]


def test_events_for_a_log_leave_out_what_handlers_return() -> None:
    events: list[Event] = [
        TaskProgress(at=1.0, time=2.0, task_id="a", value="secret"),
        TaskFinished(at=1.0, time=2.0, task_id="a", result=result("secret")),
    ]
    plain = [event.as_dict(values=False) for event in events]
    assert plain[0] == {"kind": "progress", "time": 2.0, "at": 1.0, "task_id": "a"}
    assert "result" not in plain[1]["result"]
    assert plain[1]["result"]["status"] is not None
    unreadable = TaskProgress(at=1.0, time=2.0, task_id="a", value=object())
    assert as_json(unreadable.as_dict())["value"] is None
    assert "object" in unreadable.as_dict()["value_error"]


@virtual
async def test_statistics_readings_and_reports() -> None:
    upstream = Upstream(
        "search", max_concurrent=4, quotas=[Quota(requests=60, per="minute")], budget=Budget(usd=5, per="day")
    )
    async with make_supervisor(Agent(3.0), overflow="memory://", max_queue_size=0, upstreams=[upstream]) as supervisor:
        flood(supervisor, "work", 1)
        await asyncio.sleep(1.0)
        async with upstream.call():
            pass
        plain = as_json(supervisor.statistics().as_dict())
        assert (plain["submitted"], plain["running"]) == (1, 1)
        assert plain["workers"][0]["state"] == supervisor.workers["worker"].state.value
        assert as_json(upstream.statistics().as_dict())["accounts"][0]["quotas"][0]["amount"] == 60
        for reading in supervisor.readings():
            assert as_json(reading.as_dict())["resource"] == reading.resource
        report = await supervisor.drain()
        assert as_json(report.as_dict())["orphans"] == []
        assert now() == pytest.approx(3.0)
    assert Reading("pool:a", math.inf).as_dict() == {"resource": "pool:a", "load": None}
