"""The types of results, as mypy sees them in a program of a user's, and as they are when it runs."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import subprocess
import sys
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_type

import msgspec
import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Priority, Task, TaskResult, TaskStatus, Ticket

ROOT = Path(__file__).parents[2]

PROGRAM = """
from typing import Any
from forebay import BackpressureSupervisor, FanOut, Task, TaskFailed, TaskResult, Ticket
from forebay.supervisor import Portal

class Animal: ...
class Dog(Animal): ...

async def plain(supervisor: BackpressureSupervisor, task: Task) -> Ticket:
    reveal_type(await supervisor.run(task))  # Any
    reveal_type(await supervisor.run(Task("work", 1)))  # Any
    ticket = await supervisor.submit(Task("work", 1, task_id="a"))
    reveal_type(ticket)  # forebay.supervisor.ticket.Ticket[Any]
    reveal_type((await ticket).result)  # Any
    tickets: list[Ticket] = [ticket, await supervisor.submit(Task[int]("work"))]
    number: int = await supervisor.run(Task("work"))
    reveal_type(await supervisor.find("a"))  # forebay.supervisor.ticket.Ticket[Any] | None
    return tickets[0]

async def typed(supervisor: BackpressureSupervisor, task: Task[int]) -> Ticket[int]:
    reveal_type(await supervisor.run(task))  # int
    reveal_type(await supervisor.run(Task[dict[str, int]]("work", 1)))  # dict[str, int]
    ticket = await supervisor.submit(task)
    reveal_type(ticket)  # forebay.supervisor.ticket.Ticket[int]
    reveal_type(await ticket.value())  # int
    reveal_type(await ticket)  # forebay.task.TaskResult[int]
    reveal_type((await ticket).result)  # int | None
    reveal_type(ticket.result)  # forebay.task.TaskResult[int] | None
    reveal_type(supervisor.submit_nowait(task))  # forebay.supervisor.ticket.Ticket[int]
    reveal_type(ticket.task)  # forebay.task.Task[int]
    return ticket

async def plain_results(supervisor: BackpressureSupervisor, task: Task, found: TaskResult) -> TaskResult:
    reveal_type(found)  # forebay.task.TaskResult[Any]
    reveal_type(found.result["text"].upper())  # Any
    async for result in supervisor.fan_out([task, Task("work")]):
        reveal_type(result)  # forebay.task.TaskResult[Any]
        reveal_type(result.result)  # Any
    reveal_type(supervisor.fan_out(Task("work", n) for n in range(3)))  # forebay.supervisor.fan_out.FanOut[Any]
    reveal_type(await supervisor.map([task]))  # list[Any]
    reveal_type(await supervisor.map("work", [1], limit=2, tenant="a"))  # list[Any]
    reveal_type(await supervisor.map(task_type="work", payloads=[1], return_exceptions=True))  # list[Any]
    numbers: list[int] = await supervisor.map("work", [1])
    made = TaskResult(task_id="a", worker_id=None, success=True, status=found.status, result=1)
    reveal_type(made)  # forebay.task.TaskResult[Any]
    return result

async def typed_results(supervisor: BackpressureSupervisor, tasks: list[Task[Dog]], strict: bool) -> None:
    reveal_type(supervisor.fan_out(tasks))  # forebay.supervisor.fan_out.FanOut[program.Dog]
    async with supervisor.fan_out((task for task in tasks), ordered=True) as results:
        async for result in results:
            reveal_type(result)  # forebay.task.TaskResult[program.Dog]
            reveal_type(result.result)  # program.Dog | None
            if result.result is not None:
                reveal_type(result.result)  # program.Dog
            assert isinstance(result, TaskResult)
            reveal_type(result)  # forebay.task.TaskResult[program.Dog]
    reveal_type(await anext(supervisor.fan_out(iter(tasks))))  # forebay.task.TaskResult[program.Dog]
    reveal_type(await supervisor.map(tasks))  # list[program.Dog]
    reveal_type(await supervisor.map((Task[int]("work", n) for n in range(3)), limit=2))  # list[int]
    reveal_type(await supervisor.map(tasks, return_exceptions=False))  # list[program.Dog]
    for value in await supervisor.map(tasks, return_exceptions=True):
        reveal_type(value)  # program.Dog | forebay.errors.ForebayError
        if isinstance(value, TaskFailed):
            reveal_type(value.error)  # str | None
    either = await supervisor.map(tasks, return_exceptions=strict)
    reveal_type(either)  # list[program.Dog | forebay.errors.ForebayError]
    animals: FanOut[Animal] = supervisor.fan_out(tasks)
    animal: TaskResult[Animal] = await anext(supervisor.fan_out(tasks))

def in_a_thread(portal: Portal, task: Task[int]) -> None:
    reveal_type(portal.run(task))  # int
    reveal_type(portal.submit(task).value(timeout=1))  # int
    reveal_type(portal.run(Task("work")))  # Any
    reveal_type(portal.submit(task).result())  # forebay.task.TaskResult[int]
    reveal_type(portal.map("work", [1]))  # list[Any]
    reveal_type(portal.map([task], wait_timeout=1, limit=1))  # list[int]
    reveal_type(portal.map([task], return_exceptions=True))  # list[int | forebay.errors.ForebayError]
    portal.map("work", [1], prio=1)  # E: call-overload
    portal.submit(task, priority=1)  # E: call-arg

async def variance(supervisor: BackpressureSupervisor) -> None:
    task: Task[Animal] = Task[Dog]("walk")
    reveal_type(await supervisor.run(task))  # program.Animal

async def mistakes(supervisor: BackpressureSupervisor) -> None:
    text: str = await supervisor.run(Task[int]("work"))  # E: arg-type
    dog: Task[Dog] = Task[Animal]("walk")  # E: assignment
    Task[int]("work", typo=1)  # E: call-arg
    await supervisor.submit(Task("work"), priority=1)  # E: arg-type
    await supervisor.map("work", [1], prio=1)  # E: call-overload
    await supervisor.map("work")  # E: arg-type
    await supervisor.map([Task("work")], tenant="a")  # E: call-overload
    dogs: FanOut[Dog] = supervisor.fan_out([Task[Animal]("walk")])  # E: list-item
    async for result in supervisor.fan_out([Task[str]("work")]):
        result.result.upper()  # E: union-attr
        result.result = ""  # E: misc
"""


def plain_name(revealed: str) -> str:
    return revealed.replace("builtins.", "").replace("Union[", "").replace(", None]", " | None")


@pytest.mark.slow
def test_mypy_knows_the_type_of_a_result(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"]
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src"), "COLUMNS": "1000"}
    outcome = subprocess.run(
        [*command, f"--cache-dir={tmp_path / 'cache'}", str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    line_of_output = r'^program\.py:(\d+): (?:note: Revealed type is "(.*)"|error: .*\[([\w-]+)\])$'
    found = {
        int(line): plain_name(revealed) if revealed else f"E: {error}"
        for line, revealed, error in re.findall(line_of_output, outcome.stdout, re.MULTILINE)
    }
    expected = {
        number: line.partition("  # ")[2] for number, line in enumerate(PROGRAM.splitlines(), 1) if "  # " in line
    }
    assert found == expected, outcome.stdout + outcome.stderr


@dataclass
class Answer:
    text: str


@virtual
async def test_a_typed_task_is_a_task() -> None:
    async def handler(task: Task) -> dict[str, str]:
        await asyncio.sleep(1.0)
        return {"text": task.payload}

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], result=Answer)
        task = Task[Answer]("work", "rivers", priority=Priority.HIGH)
        assert type(task) is Task
        answer = await supervisor.run(task)
        assert_type(answer, Answer)
        assert answer == Answer("rivers")
        ticket = await supervisor.submit(Task[Answer]("work", "lakes"))
        assert type(ticket) is Ticket
        assert_type(ticket, Ticket[Answer])
        assert (await ticket.value()).text == "lakes"


@virtual
async def test_results_of_typed_tasks_are_results() -> None:
    async def handler(task: Task) -> dict[str, str]:
        await asyncio.sleep(1.0)
        if task.payload == "seas":
            raise ValueError("too salty")
        return {"text": task.payload}

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], result=Answer)
        tasks = [Task[Answer]("work", topic) for topic in ("rivers", "seas")]
        results = [result async for result in supervisor.fan_out(tasks, ordered=True)]
        assert_type(results, list[TaskResult[Answer]])
        assert [type(result) for result in results] == [TaskResult, TaskResult]
        assert [result.result for result in results] == [Answer("rivers"), None]
        answers = await supervisor.map([Task[Answer]("work", "lakes")])
        assert_type(answers, list[Answer])
        assert answers == [Answer("lakes")]


def test_a_typed_result_is_made_copied_and_read_as_any_other() -> None:
    fields: dict[str, Any] = {"task_id": "a", "worker_id": "w", "success": True, "status": TaskStatus.SUCCEEDED}
    result = TaskResult[int](**fields, result=1)
    assert type(result) is TaskResult
    assert isinstance(result, TaskResult)
    assert result == TaskResult(**fields, result=1)
    assert copy(result) == pickle.loads(pickle.dumps(result)) == msgspec.structs.replace(result) == result  # noqa: S301 - ours
    stored = msgspec.json.encode(result)
    assert msgspec.json.decode(stored, type=TaskResult) == msgspec.json.decode(stored, type=TaskResult[int]) == result
    with pytest.raises(msgspec.ValidationError, match=r"\$\.result"):
        msgspec.json.decode(stored, type=TaskResult[str])
    assert TaskResult(**fields).result is None
    with pytest.raises(AttributeError):
        result.result = 2  # type: ignore[misc]


def test_a_typed_task_is_checked_copied_and_shown_as_any_other() -> None:
    task = Task[int]("work", 1, task_id="a")
    assert task == Task("work", 1, task_id="a")
    assert repr(task) == "Task('work', task_id='a', priority=NORMAL)"
    assert copy(task) == pickle.loads(pickle.dumps(task)) == msgspec.structs.replace(task) == task  # noqa: S301 - ours
    with pytest.raises(TypeError, match="thread_id"):
        Task[int]("work", thread="t")  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        task.payload = 2  # type: ignore[misc]
