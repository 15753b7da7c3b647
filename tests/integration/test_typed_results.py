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
from typing import assert_type

import msgspec
import pytest
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Priority, Task, Ticket

ROOT = Path(__file__).parents[2]

PROGRAM = """
from typing import Any
from forebay import BackpressureSupervisor, Task, TaskResult, Ticket
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
    reveal_type(await ticket)  # forebay.task.TaskResult
    reveal_type(supervisor.submit_nowait(task))  # forebay.supervisor.ticket.Ticket[int]
    reveal_type(ticket.task)  # forebay.task.Task[int]
    return ticket

def in_a_thread(portal: Portal, task: Task[int]) -> None:
    reveal_type(portal.run(task))  # int
    reveal_type(portal.submit(task).value(timeout=1))  # int
    reveal_type(portal.run(Task("work")))  # Any
    reveal_type(portal.map("work", [1]))  # list[Any]
    portal.map("work", [1], prio=1)  # E: call-arg
    portal.submit(task, priority=1)  # E: call-arg

async def variance(supervisor: BackpressureSupervisor) -> None:
    task: Task[Animal] = Task[Dog]("walk")
    reveal_type(await supervisor.run(task))  # program.Animal

async def mistakes(supervisor: BackpressureSupervisor) -> None:
    text: str = await supervisor.run(Task[int]("work"))  # E: arg-type
    dog: Task[Dog] = Task[Animal]("walk")  # E: assignment
    Task[int]("work", typo=1)  # E: call-arg
    await supervisor.submit(Task("work"), priority=1)  # E: arg-type
    await supervisor.map("work", [1], prio=1)  # E: call-arg
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


def test_a_typed_task_is_checked_copied_and_shown_as_any_other() -> None:
    task = Task[int]("work", 1, task_id="a")
    assert task == Task("work", 1, task_id="a")
    assert repr(task) == "Task('work', task_id='a', priority=NORMAL)"
    assert copy(task) == pickle.loads(pickle.dumps(task)) == msgspec.structs.replace(task) == task  # noqa: S301 - ours
    with pytest.raises(TypeError, match="thread_id"):
        Task[int]("work", thread="t")  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        task.payload = 2  # type: ignore[misc]
