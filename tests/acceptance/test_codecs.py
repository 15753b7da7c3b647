"""Declared types, from `submit` to a ticket after a restart: the same whichever way a task takes."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pydantic
import pytest
from tests.support.task_plane import Agent, error_of, find_result, find_ticket, now, submit_all, virtual
from tests.support.task_stores import OVERFLOWS, overflow_url

from forebay import BackpressureSupervisor, Deadline, Task, TaskFailed, TaskStatus, Verdict
from forebay.adapters import Handler
from forebay.errors import (
    InvalidPayload,
    InvalidResult,
    InvalidSetting,
    NotSerializable,
    PayloadTooLarge,
    ResultUnavailable,
)
from forebay.interfaces import TaskRecord, TypeMismatch
from forebay.overflow import EnvelopeTooNew, envelope
from forebay.supervisor.codecs import TaskCodecs
from forebay.supervisor.spill import records

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


@dataclasses.dataclass
class Question:
    topic: str
    due: dt.date = dt.date(2025, 1, 1)
    seen: set[int] = dataclasses.field(default_factory=set)


class Answer(msgspec.Struct):
    text: str
    pages: tuple[int, ...] = ()


class Model(pydantic.BaseModel):
    topic: str
    pages: tuple[int, ...] = ()


QUESTION = Question("rivers", seen={1, 2})


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Return the URL of a durable overflow."""
    return f"sqlite:///{tmp_path}/spill.db"


@pytest.fixture(params=OVERFLOWS, ids=str)
def overflow(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """Return the URL of each kind of overflow, and None."""
    return overflow_url(request.param, tmp_path)


def make_supervisor(
    agent: Any, overflow: str | None, *, types: Any = ("work",), **options: Any
) -> BackpressureSupervisor:
    """Return a supervisor with one worker, one slot, and no room to wait except in the overflow."""
    settings = {name: options.pop(name) for name in ("max_payload_bytes", "lease") if name in options}
    supervisor = BackpressureSupervisor(overflow=overflow, max_queue_size=0, **settings)
    supervisor.register_worker("worker", handler=agent, task_types=list(types), **options)
    return supervisor


async def spill_tasks(file: str, *payloads: Any, **options: Any) -> list[str]:
    """Spill tasks, close, and return their ids."""
    async with make_supervisor(Agent(), file, **options) as supervisor:
        await supervisor.submit(Task("work", payloads[0]))
        tickets = await submit_all(supervisor, [Task("work", payload) for payload in payloads])
        assert all(ticket.verdict is Verdict.SPILLED for ticket in tickets)
        return [ticket.task_id for ticket in tickets]


# --- payloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "submitted", "seen"),
    [
        (Question, QUESTION, QUESTION),
        (Question, {"topic": "rivers", "due": "2025-01-01", "seen": [2, 1]}, QUESTION),
        (list[Answer], [Answer("a", (1,))], [Answer("a", (1,))]),
        (Model, {"topic": "rivers", "pages": [1]}, Model(topic="rivers", pages=(1,))),
        (None, {"a": (1, [(2, "b")], b"\xff")}, {"a": (1, [(2, "b")], b"\xff")}),
    ],
)
@virtual
async def test_a_handler_sees_the_same_payload_whichever_way_the_task_takes(
    declared: Any, submitted: Any, seen: Any, file: str
) -> None:
    ways: dict[str, Any] = {}
    for way, overflow in (("no overflow", None), ("admitted", file), ("in memory", "memory://")):
        agent = Agent()
        async with make_supervisor(agent, overflow, payload=declared) as supervisor:
            await supervisor.run(Task("work", submitted))
        ways[way] = agent.started
    agent = Agent()
    async with make_supervisor(agent, file, payload=declared) as supervisor:
        tickets = await submit_all(supervisor, [Task("work", submitted), Task("work", submitted)])
        assert tickets[1].verdict is Verdict.SPILLED
        await asyncio.gather(*tickets)
    ways["spilled"] = agent.started[1:]
    await spill_tasks(file, submitted, payload=declared)
    agent = Agent()
    async with make_supervisor(agent, file, payload=declared):
        await asyncio.sleep(10.0)
    ways["another process"] = agent.started
    for way, payloads in ways.items():
        assert payloads == [seen], way
        assert type(payloads[0]) is type(seen), way


@virtual
async def test_a_payload_of_the_wrong_type_is_an_error_at_submit_and_nothing_is_started_or_stored(
    overflow: str | None,
) -> None:
    agent = Agent()
    async with make_supervisor(agent, overflow, payload=Question) as supervisor:
        for submit in (supervisor.submit, supervisor.run):
            error = await error_of(submit(Task("work", {"topic": 5, "due": "sk-secret"}, task_id="t")))
            assert isinstance(error, InvalidPayload)
            assert (error.path, error.task_type) == ("payload.topic", "work")
            assert "sk-secret" not in str(error)
            assert "Question" in str(error)
            assert error.__cause__ is None
        with pytest.raises(InvalidPayload):
            supervisor.submit_nowait(Task("work", None))
        assert supervisor.statistics().submitted == 0
        assert (await supervisor.submit(Task("work", QUESTION, task_id="t"))).verdict is Verdict.ADMITTED


@virtual
async def test_a_task_that_may_not_spill_has_to_fit_too(file: str) -> None:
    async with make_supervisor(Agent(), file, payload=Question) as supervisor:
        assert isinstance(await error_of(supervisor.submit(Task("work", 5, spill=False))), InvalidPayload)


@virtual
async def test_a_typed_payload_may_still_hold_what_cannot_be_stored(file: str) -> None:
    async with make_supervisor(Agent(), file, payload=int) as supervisor:
        error = await error_of(supervisor.submit(Task("work", 2**64)))
        assert isinstance(error, NotSerializable)
        assert error.path == "payload"
        assert await supervisor.run(Task("work", 2**64, spill=False)) == 2**64


@virtual
async def test_the_bound_holds_for_declared_types(file: str) -> None:
    async with make_supervisor(Agent(), file, payload=Question, max_payload_bytes=100) as supervisor:
        error = await error_of(supervisor.submit(Task("work", Question("x" * 100))))
        assert isinstance(error, PayloadTooLarge)
        assert error.bound == 100
        assert (await supervisor.submit(Task("work", Question("x" * 20)))).verdict is Verdict.ADMITTED


@virtual
async def test_the_task_that_was_submitted_stays_as_it_was(overflow: str | None) -> None:
    payload = {"topic": "rivers"}
    task = Task("work", payload)
    async with make_supervisor(Agent(), overflow, payload=Question) as supervisor:
        ticket = await supervisor.submit(task)
    assert task.payload is payload
    assert payload == {"topic": "rivers"}
    assert ticket.task.payload == Question("rivers")
    assert ticket.task_id == task.task_id


@virtual
async def test_cancelling_run_cancels_a_task_whose_payload_was_converted(overflow: str | None) -> None:
    agent = Agent(60.0)
    async with make_supervisor(agent, overflow, payload=Question) as supervisor:
        caller = asyncio.ensure_future(supervisor.run(Task("work", QUESTION)))
        await asyncio.sleep(1.0)
        caller.cancel()
        await asyncio.wait([caller])
        assert supervisor.statistics().cancelled == 1


@virtual
async def test_a_task_past_its_deadline_is_read_and_expires(file: str) -> None:
    async with make_supervisor(Agent(), file, payload=Question) as supervisor:
        tasks = [Task("work", QUESTION, deadline=Deadline.within(30.0)) for _ in range(3)]
        ids = [ticket.task_id for ticket in await submit_all(supervisor, tasks)]
    await asyncio.sleep(60.0)
    agent = Agent()
    async with make_supervisor(agent, file, payload=Question) as supervisor:
        assert (await find_result(supervisor, ids[1])).status is TaskStatus.EXPIRED
    assert agent.started == []


@virtual
async def test_a_payload_that_changes_after_submission_is_not_lost_when_draining(file: str) -> None:
    agent = Agent()
    supervisor = BackpressureSupervisor(overflow=file, max_queue_size=5)
    supervisor.register_worker("worker", handler=agent, task_types=["work"])
    async with supervisor:
        payloads: list[list[Any]] = [[0], [1], [2]]
        tickets = await submit_all(supervisor, [Task("work", payload) for payload in payloads])
        payloads[1].append(object())
        await supervisor.drain()
        assert [(await tickets[index]).success for index in (0, 1)] == [True, True]
    assert agent.started[:2] == payloads[:2]


# --- results ---------------------------------------------------------------------------------------------------------


@virtual
async def test_a_result_has_its_type_here_and_after_a_restart(overflow: str | None, file: str) -> None:
    async def handler(task: Task) -> Any:
        await asyncio.sleep(1.0)
        return {"text": task.payload, "pages": [1, 2]}

    async with make_supervisor(handler, overflow, result=Answer) as supervisor:
        assert await supervisor.run(Task("work", "a")) == Answer("a", (1, 2))
    async with make_supervisor(handler, file, result=Answer) as supervisor:
        tickets = await submit_all(supervisor, [Task("work", "a"), Task("work", "b"), Task("work", "c", durable=True)])
        assert [(await ticket).result for ticket in tickets] == [Answer(text, (1, 2)) for text in "abc"]
    async with make_supervisor(handler, file, result=Answer) as supervisor:
        later = [await find_result(supervisor, ticket.task_id) for ticket in tickets[1:]]
    assert [result.result for result in later] == [Answer("b", (1, 2)), Answer("c", (1, 2))]
    assert all(result.error is None for result in later)


@pytest.mark.parametrize("blocking", [False, True])
async def test_a_result_that_is_not_of_its_type_fails_the_task(*, blocking: bool, overflow: str | None) -> None:
    def plain(_: Task) -> Any:
        return {"text": ["sk-secret"]}

    async def handler(_: Task) -> Any:
        return {"text": ["sk-secret"]}

    async with make_supervisor(plain if blocking else handler, overflow, result=Answer) as supervisor:
        result = await (await supervisor.submit(Task("work")))
        assert (result.status, result.result) == (TaskStatus.FAILED, None)
        assert isinstance(result.cause, InvalidResult)
        assert (result.cause.path, result.cause.worker_id) == ("result.text", "worker")
        assert "sk-secret" not in str(result.error)
        assert isinstance(await error_of(supervisor.run(Task("work"))), TaskFailed)


@virtual
async def test_a_value_that_cannot_be_stored_is_marked_here_and_an_error_elsewhere(file: str) -> None:
    value = object()

    async def handler(_: Task) -> object:
        await asyncio.sleep(1.0)
        return [value]

    async with make_supervisor(handler, file) as supervisor:
        first, ticket = await submit_all(supervisor, [Task("work"), Task("work")])
        result = await ticket
        assert result.success
        assert result.result == [value]
        assert "at result[0] it holds a object" in str(result.error)
        assert await ticket.value() == [value]
        assert (await first).error is None  # it was not to be stored
    async with make_supervisor(handler, file) as supervisor:
        later = await find_result(supervisor, ticket.task_id)
        assert (later.success, later.status, later.result) == (True, TaskStatus.SUCCEEDED, None)
        assert later.error == result.error
        assert isinstance(later.cause, ResultUnavailable)
        error = await error_of((await find_ticket(supervisor, ticket.task_id)).value())
        assert isinstance(error, ResultUnavailable)
        assert ticket.task_id in str(error)
        assert "only the process that ran it" in str(error)


@virtual
async def test_a_result_larger_than_the_bound_says_so(file: str) -> None:
    async def handler(_: Task) -> str:
        return "x" * 200

    async with make_supervisor(handler, file, max_payload_bytes=100) as supervisor:
        result = await (await supervisor.submit(Task("work", durable=True)))
        assert result.result == "x" * 200
        assert "the bound is 100" in str(result.error)


@virtual
async def test_none_is_stored_like_any_value(file: str) -> None:
    async def handler(_: Task) -> None:
        await asyncio.sleep(1.0)

    async with make_supervisor(handler, file) as supervisor:
        ticket = await supervisor.submit(Task("work", durable=True))
        await ticket
    async with make_supervisor(handler, file) as supervisor:
        later = await find_result(supervisor, ticket.task_id)
        assert (later.result, later.error, later.cause) == (None, None, None)
        assert await (await find_ticket(supervisor, ticket.task_id)).value() is None


# --- what workers declare --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["payload", "result"])
def test_workers_of_one_type_agree(side: str) -> None:
    supervisor = BackpressureSupervisor()

    def register(name: str, *task_types: str, **declared: Any) -> None:
        supervisor.register_worker(name, handler=Agent(), task_types=task_types, **declared)

    register("first", "a", "b", **{side: list[Question]})
    register("same", "a", **{side: list[Question]})
    register("silent", "b")
    with pytest.raises(InvalidSetting) as caught:
        register("other", "c", "b", **{side: Answer})
    for word in ("'other'", side, "Answer", "'first'", "'b'", "Question"):
        assert word in str(caught.value)
    assert "other" not in supervisor.workers
    register("other", "c", **{side: Answer})


def test_a_type_cannot_be_declared_after_a_worker_was_registered_without() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("first", handler=Agent(), task_types=["a"])
    with pytest.raises(InvalidSetting, match="none was"):
        supervisor.register_worker("late", handler=Agent(), task_types=["a"], payload=Question)


@virtual
async def test_a_worker_that_declares_nothing_has_the_type_of_the_first() -> None:
    async def broken(_: Task) -> Any:
        return {"text": 5}

    async with make_supervisor(Agent(), None, payload=Question, result=Question) as supervisor:
        supervisor.register_worker("silent", handler=broken, task_types=["work"])
        tickets = await submit_all(supervisor, [Task("work", {"topic": "a"}), Task("work", {"topic": "b"})])
        ended = {result.worker_id: result for result in await asyncio.gather(*tickets)}
        assert isinstance(ended["worker"].result, Question)
        assert isinstance(ended["silent"].cause, InvalidResult)


@virtual
async def test_a_worker_of_two_task_types_follows_what_each_declares() -> None:
    async with make_supervisor(Agent(), None, types=["one"], payload=Question) as supervisor:
        agent = Agent()
        supervisor.register_worker("both", handler=agent, task_types=["one", "two"])
        supervisor.workers["worker"]._max_concurrent = 0
        await supervisor.run(Task("two", {"topic": "a"}))
        assert agent.started == [{"topic": "a"}]


def test_a_declaration_that_is_no_type_is_an_error_at_registration() -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidSetting, match=r"payload='5'.*must be a type"):
        supervisor.register_worker("worker", handler=Agent(), task_types=["a"], payload=5)
    assert not supervisor.workers


class BuggyCodec:
    """A codec with bugs."""

    def coerce(self, value: Any) -> Any:
        if value == "unfit":
            raise ZeroDivisionError(value)
        return value

    def dump(self, value: Any) -> Any:
        return 1 / 0 if value == "undumped" else value

    def load(self, plain: Any) -> Any:
        if plain == "unloaded":
            raise TypeMismatch(".x", "it is not liked")
        return 1 / 0 if plain == "broken" else plain


@virtual
async def test_a_codec_that_raises_loses_no_task_and_ends_every_ticket(file: str) -> None:
    agent = Agent()
    handler = Handler(call=agent, codec=BuggyCodec())
    async with make_supervisor(handler, file) as supervisor:
        await supervisor.submit(Task("work", 0))
        for payload in ("unfit", "undumped"):
            error = await error_of(supervisor.submit(Task("work", payload)))
            assert isinstance(error, InvalidPayload)
            assert error.why == "its codec raised ZeroDivisionError"
        payloads = ("unloaded", "broken", "good")
        ids = [(await supervisor.submit(Task("work", payload))).task_id for payload in payloads]
    async with make_supervisor(Handler(call=agent, codec=BuggyCodec()), file) as supervisor:
        ended = [await find_result(supervisor, task_id) for task_id in ids]
    assert [result.status for result in ended] == [TaskStatus.FAILED, TaskStatus.FAILED, TaskStatus.SUCCEEDED]
    assert "payload.x: it is not liked" in str(ended[0].error)


# --- malformed records -----------------------------------------------------------------------------------------------


@virtual
async def test_what_an_earlier_release_stored_is_read_by_the_type_of_this_one(file: str) -> None:
    @dataclasses.dataclass
    class OldQuestion:
        topic: str
        dropped: int = 0

    ids = await spill_tasks(file, OldQuestion("rivers", 5), payload=OldQuestion)
    agent = Agent()
    async with make_supervisor(agent, file, payload=Question, result=Question) as supervisor:
        result = await find_result(supervisor, ids[0])
    assert result.result == agent.started[0] == Question("rivers")


@virtual
async def test_what_this_release_cannot_read_fails_and_says_where(file: str) -> None:
    @dataclasses.dataclass
    class OldQuestion:
        subject: str

    ids = await spill_tasks(file, OldQuestion("sk-secret"), payload=OldQuestion)
    agent = Agent()
    async with make_supervisor(agent, file, payload=Question) as supervisor:
        result = await find_result(supervisor, ids[0])
        assert await supervisor.run(Task("work", QUESTION)) == QUESTION
        assert (await supervisor.dead_letters.task(ids[0])).payload == {"subject": "sk-secret"}
    assert result.status is TaskStatus.FAILED
    assert "`topic`" in str(result.error)
    assert "a default" in str(result.error)
    assert "sk-secret" not in str(result.error)


@virtual
async def test_a_requeued_task_runs_once_its_payload_type_is_fixed(file: str) -> None:
    @dataclasses.dataclass
    class OldQuestion:
        subject: str

    @dataclasses.dataclass
    class FixedQuestion:
        subject: str = ""
        topic: str = "none"

    ids = await spill_tasks(file, OldQuestion("rivers"), payload=OldQuestion)
    async with make_supervisor(Agent(), file, payload=Question) as supervisor:
        await find_result(supervisor, ids[0])
    agent = Agent()
    async with make_supervisor(agent, file, payload=FixedQuestion) as supervisor:
        assert (await supervisor.dead_letters.task(ids[0])).payload == FixedQuestion("rivers")
        await supervisor.dead_letters.requeue(ids[0])
        assert (await find_result(supervisor, ids[0])).success
    assert agent.started == [FixedQuestion("rivers")]


@virtual
async def test_a_result_that_this_release_cannot_read_ends_its_ticket_and_says_so(file: str) -> None:
    agent = Agent()
    async with make_supervisor(agent, file, result=str) as supervisor:
        ticket = await supervisor.submit(Task("work", "sk-secret", durable=True))
        await ticket
    async with make_supervisor(agent, file, result=Answer) as supervisor:
        result = await find_result(supervisor, ticket.task_id)
        assert result.success
        assert isinstance(result.cause, ResultUnavailable)
        assert "Expected `object`, got `str`" in str(result.error)
        assert "sk-secret" not in str(result.error)


@pytest.fixture
def newer() -> Any:
    """Return a context in which this Forebay writes the next version of envelopes."""
    return lambda: mock.patch.object(envelope, "VERSION", envelope.VERSION + 1)


@virtual
async def test_an_envelope_of_a_newer_version_is_left_for_a_newer_process(file: str, newer: Any) -> None:
    with newer():
        ids = await spill_tasks(file, "first", "second")
    old = Agent()
    async with make_supervisor(old, file, lease=3.0) as supervisor:
        assert await supervisor.run(Task("work", "ours", durable=True)) == "ours"
        await asyncio.sleep(20.0)
        tickets = [await find_ticket(supervisor, task_id) for task_id in ids]
        await asyncio.sleep(1.0)
        assert not any(ticket.done() for ticket in tickets)
    assert old.started == ["ours"]
    new = Agent()
    with newer():
        async with make_supervisor(new, file) as supervisor:
            assert [(await find_result(supervisor, task_id)).result for task_id in ids] == ["first", "second"]
    assert new.started == ["first", "second"]


@virtual
async def test_a_newer_process_gets_what_an_older_one_cannot_read_while_both_run(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = records.read_record
    old_agent, new_agent = Agent(), Agent()
    old, new = make_supervisor(old_agent, file, lease=3.0), make_supervisor(new_agent, file, lease=3.0)

    def task(record: TaskRecord, codecs: TaskCodecs) -> tuple[Task, Mapping[str, Any] | None]:
        """Return the task of a record, except that the older of the two supervisors cannot read it."""
        if codecs is old._codecs and record.task_id in ids:
            raise EnvelopeTooNew(version=2, known=1)
        return read(record, codecs)

    ids = await spill_tasks(file, *range(30))
    monkeypatch.setattr(records, "read_record", task)
    async with old:
        await asyncio.sleep(2.0)
        async with new:
            started = now()
            assert all([(await find_result(new, task_id)).success for task_id in ids])
            assert now() - started < 300.0  # when a lease of the old process lapses, either may get the record
            assert await old.run(Task("work", "ours", durable=True)) == "ours"
    assert sorted(new_agent.started) == list(range(30))
    assert old_agent.started == ["ours"]


@virtual
async def test_a_result_of_a_newer_version_is_an_error(file: str, newer: Any) -> None:
    with newer():
        async with make_supervisor(Agent(), file) as supervisor:
            ticket = await supervisor.submit(Task("work", "x", durable=True))
            await ticket
    async with make_supervisor(Agent(), file) as supervisor:
        result = await find_result(supervisor, ticket.task_id)
        assert result.success
        assert isinstance(result.cause, ResultUnavailable)
        assert "Upgrade" in str(result.error)


def pack(*fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


WHOLE = ("work", "x", "id", 2, None, None, True, False, None, "default", None, None)


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xc1",
        b"\x91" * 200_000,
        b"\x9d\x01\xa4work" + b"\x91" * 200_000,
        b"\x9d\x01\xa4work" + b"\xc7\xff\x01" * 50_000,
        pack(1),
        pack(0, *WHOLE),
        pack(1, "work", msgspec.msgpack.Ext(7, b"x"), *WHOLE[2:]),
        pack(1, "work", msgspec.msgpack.Ext(1, b"\xa1x"), *WHOLE[2:]),
        pack(1, "work", msgspec.msgpack.Ext(1, b"\x91"), *WHOLE[2:]),
        pack(1, "", *WHOLE[1:]),
        pack(1, *WHOLE[:3], 9, *WHOLE[4:]),
        pack(1, *WHOLE[:4], -1.0, *WHOLE[5:]),
        pack(1, *WHOLE[:5], float("nan"), *WHOLE[6:]),
        b"\x9d\x01\xa4work\x81\x80\x01" + pack(*WHOLE[2:])[1:],
        '{"version": 1}',
    ],
)
@pytest.mark.parametrize("declared", [None, Question])
@virtual
async def test_a_malformed_record_affects_no_other(blob: Any, declared: Any, file: str) -> None:
    ids = await spill_tasks(file, {"topic": "a"}, {"topic": "b"}, payload=declared)
    with sqlite3.connect(file.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE task SET envelope = ? WHERE task_id = ?", (blob, ids[0]))
    database.close()
    agent = Agent()
    async with make_supervisor(agent, file, payload=declared) as supervisor:
        assert (await find_result(supervisor, ids[1])).success
        assert (await find_result(supervisor, ids[0])).status.final
        assert await supervisor.run(Task("work", {"topic": "c"}, durable=True))
