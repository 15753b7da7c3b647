"""The documented rules of Erlang/OTP's supervisors, as a table: each row is run by a supervisor in virtual time.

Source: Erlang/OTP, "Supervisor Behaviour" (design principles), and the reference manual of the module `supervisor`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.support.scripted_life import ScriptedLife, settle
from tests.support.task_plane import Agent, virtual

from forebay import BackpressureSupervisor

Step = tuple[str, str] | float  # a worker and what happens to it, or seconds that pass

ENDS = {
    "returns": ScriptedLife.returns,
    "is cancelled": ScriptedLife.is_cancelled,
    "crashes": ScriptedLife.crash,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One documented statement, a script, and what is logged from the first step on.

    Attributes:
        statement: in our words.
        strategy: of the supervisor.
        restart: the restart types of its workers, which are called a, b, c.
        script: the steps; a step ``("b", "fails to start")`` has the next start of b fail.
        expected: the starts and ends that follow.
        failed: the workers that are FAILED at the end.
        gone: the workers that are unregistered at the end.
        settings: further settings of the supervisor.
    """

    statement: str
    script: Sequence[Step]
    expected: Sequence[str]
    strategy: str = "one_for_one"
    restart: Sequence[str] = ("permanent",) * 3
    failed: str = ""
    gone: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


PERMANENT, TRANSIENT, TEMPORARY = "permanent", "transient", "temporary"
ONE, ALL, REST = "one_for_one", "one_for_all", "rest_for_one"

RESTART_TYPES = [
    Row(
        statement=f"a {restart} child that {end} is {'' if restarted else 'not '}restarted",
        restart=[PERMANENT, restart, PERMANENT],
        script=[("b", end)],
        expected=["b ends", "b starts"] if restarted else ["b ends"],
        failed="b" if restart == TRANSIENT and not restarted else "",
        gone="b" if restart == TEMPORARY else "",
    )
    for restart, restarting in (
        (PERMANENT, ("returns", "is cancelled", "crashes")),
        (TRANSIENT, ("crashes",)),
        (TEMPORARY, ()),
    )
    for end in ENDS
    for restarted in [end in restarting]
]
STRATEGIES = [
    Row(
        statement="one_for_one: only the child that terminated is restarted",
        script=[("a", "crashes")],
        expected=["a ends", "a starts"],
    ),
    Row(
        statement="one_for_all: the others are terminated, in reverse order, then all are started, in order",
        strategy=ALL,
        script=[("b", "crashes")],
        expected=["b ends", "c ends", "a ends", "a starts", "b starts", "c starts"],
    ),
    Row(
        statement="rest_for_one: the children after it in start order are terminated and started with it",
        strategy=REST,
        script=[("b", "crashes")],
        expected=["b ends", "c ends", "b starts", "c starts"],
    ),
    Row(
        statement="rest_for_one: the last child has nobody after it",
        strategy=REST,
        script=[("c", "crashes")],
        expected=["c ends", "c starts"],
    ),
    Row(
        statement="rest_for_one: all children are after the first",
        strategy=REST,
        script=[("a", "crashes")],
        expected=["a ends", "c ends", "b ends", "a starts", "b starts", "c starts"],
    ),
    Row(
        statement="a child that is not to be restarted has no other restarted",
        strategy=ALL,
        restart=[PERMANENT, TRANSIENT, TEMPORARY],
        script=[("b", "returns"), ("c", "crashes")],
        expected=["b ends", "c ends"],
        failed="b",
        gone="c",
    ),
    Row(
        statement="one_for_all: a temporary child that is terminated for another one is never restarted",
        strategy=ALL,
        restart=[PERMANENT, TEMPORARY, PERMANENT],
        script=[("a", "crashes")],
        expected=["a ends", "c ends", "b ends", "a starts", "c starts"],
        gone="b",
    ),
    Row(
        statement="rest_for_one: a temporary child that is terminated for another one is never restarted",
        strategy=REST,
        restart=[PERMANENT, PERMANENT, TEMPORARY],
        script=[("b", "crashes")],
        expected=["b ends", "c ends", "b starts"],
        gone="c",
    ),
    Row(
        statement="one_for_all: a transient child that is terminated for another one is restarted",
        strategy=ALL,
        restart=[TRANSIENT, PERMANENT, TRANSIENT],
        script=[("b", "crashes")],
        expected=["b ends", "c ends", "a ends", "a starts", "b starts", "c starts"],
    ),
    Row(
        statement="one_for_all: all children are started, a transient one that had ended normally included",
        strategy=ALL,
        restart=[TRANSIENT, PERMANENT, PERMANENT],
        script=[("a", "returns"), ("b", "crashes")],
        expected=["a ends", "b ends", "c ends", "a starts", "b starts", "c starts"],
    ),
]
INTENSITY = [
    Row(
        statement="as many restarts as max_restarts may happen within the period",
        settings={"max_restarts": 2, "within": 5.0},
        script=[("a", "crashes"), 1.0, ("a", "crashes")],
        expected=["a ends", "a starts"] * 2,
    ),
    Row(
        statement="one more restart within the period is too many",
        settings={"max_restarts": 2, "within": 5.0},
        script=[("a", "crashes"), 1.0, ("a", "crashes"), 1.0, ("a", "crashes")],
        expected=[*["a ends", "a starts"] * 2, "a ends"],
        failed="a",
    ),
    Row(
        statement="restarts that are longer ago than the period do not count",
        settings={"max_restarts": 2, "within": 5.0},
        script=[("a", "crashes"), 3.0, ("a", "crashes"), 3.0, ("a", "crashes")],
        expected=["a ends", "a starts"] * 3,
    ),
    Row(
        statement="the restarts of all children count together",
        settings={"max_restarts": 2, "within": 5.0},
        script=[("a", "crashes"), ("b", "crashes"), ("c", "crashes")],
        expected=["a ends", "a starts", "b ends", "b starts", "c ends"],
        failed="c",
    ),
    Row(
        statement="one restart of several children together counts once",
        strategy=ALL,
        settings={"max_restarts": 1, "within": 5.0},
        script=[("a", "crashes")],
        expected=["a ends", "c ends", "b ends", "a starts", "b starts", "c starts"],
    ),
    Row(
        statement="with max_restarts=0 no child is ever restarted",
        settings={"max_restarts": 0},
        script=[("a", "crashes")],
        expected=["a ends"],
        failed="a",
    ),
    Row(
        statement="beyond the intensity the children are terminated in reverse order",
        strategy=ALL,
        settings={"max_restarts": 0},
        script=[("b", "crashes")],
        expected=["b ends", "c ends", "a ends"],
        failed="abc",
    ),
    Row(
        statement="the end of a child that is not to be restarted does not count",
        restart=[PERMANENT, TRANSIENT, TEMPORARY],
        settings={"max_restarts": 1, "within": 5.0},
        script=[("b", "returns"), ("c", "crashes"), ("a", "crashes")],
        expected=["b ends", "c ends", "a ends", "a starts"],
        failed="b",
        gone="c",
    ),
]
FAILED_STARTS = [
    Row(
        statement="a restart whose start fails is tried again",
        script=[("a", "fails to start"), ("a", "crashes")],
        expected=["a ends", "a fails to start", "a starts"],
    ),
    Row(
        statement="each attempt to restart counts",
        settings={"max_restarts": 2, "within": 5.0},
        script=[*[("a", "fails to start")] * 2, ("a", "crashes")],
        expected=["a ends", "a fails to start", "a fails to start"],
        failed="a",
    ),
    Row(
        statement="a transient child whose restart fails is tried again",
        restart=[PERMANENT, TRANSIENT, PERMANENT],
        script=[("b", "fails to start"), ("b", "crashes")],
        expected=["b ends", "b fails to start", "b starts"],
    ),
    Row(
        statement="one_for_all: if a restart fails, those that were started are terminated, and all are tried again",
        strategy=ALL,
        script=[("b", "fails to start"), ("a", "crashes")],
        expected=[
            *["a ends", "c ends", "b ends", "a starts", "b fails to start"],
            *["a ends", "a starts", "b starts", "c starts"],
        ],
    ),
    Row(
        statement="rest_for_one: if a restart fails, those before it keep running",
        strategy=REST,
        script=[("c", "fails to start"), ("b", "crashes")],
        expected=["b ends", "c ends", "b starts", "c fails to start", "c starts"],
    ),
]
ROWS = [*RESTART_TYPES, *STRATEGIES, *INTENSITY, *FAILED_STARTS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.statement)
@virtual
async def test_a_supervisor_does_what_otp_documents(row: Row) -> None:
    log: list[str] = []
    lives = {name: ScriptedLife(name, log) for name in "abc"}
    async with BackpressureSupervisor(strategy=row.strategy, **row.settings) as supervisor:
        for life, restart in zip(lives.values(), row.restart, strict=True):
            supervisor.register_worker(
                life.name, handler=Agent(), task_types=[life.name], start=life.start, restart=restart
            )
            await settle()
        assert log == ["a starts", "b starts", "c starts"]
        log.clear()
        for step in row.script:
            if not isinstance(step, tuple):
                await asyncio.sleep(step)
            elif step[1] == "fails to start":
                lives[step[0]].start_errors.append("no")
            else:
                ENDS[step[1]](lives[step[0]])
                await settle()
        assert log == list(row.expected)
        assert "".join(name for name, worker in supervisor.workers.items() if worker.failed) == row.failed
        assert "".join(name for name in lives if name not in supervisor.workers) == row.gone


@virtual
async def test_children_are_started_in_order_and_terminated_in_reverse() -> None:
    log: list[str] = []
    supervisor = BackpressureSupervisor()
    for name in "abc":
        supervisor.register_worker(name, handler=Agent(), task_types=[name], start=ScriptedLife(name, log).start)
    async with supervisor:
        pass
    assert log == ["a starts", "b starts", "c starts", "c ends", "b ends", "a ends"]


@pytest.mark.parametrize("restart", [PERMANENT, TRANSIENT, TEMPORARY])
@virtual
async def test_a_supervisor_exceeds_its_intensity_and_exits_as_shutdown_to_its_parent(restart: str) -> None:
    log: list[str] = []
    a, b = ScriptedLife("a", log), ScriptedLife("b", log)
    inner = BackpressureSupervisor(max_restarts=0)
    for life in (a, b):
        inner.register_worker(life.name, handler=Agent(), task_types=["work"], start=life.start)
    async with BackpressureSupervisor() as outer:
        worker = outer.register_worker("inner", handler=inner, task_types=["work"], restart=restart)
        await settle()
        log.clear()
        a.crash()
        await settle()
        restarted = restart == PERMANENT  # a shutdown is no abnormal end
        assert log == ["a ends", "b ends", *(["a starts", "b starts"] if restarted else [])]
        assert worker.failed == (restart == TRANSIENT)
        assert (outer.workers == {}) == (restart == TEMPORARY)


@pytest.mark.parametrize("failing", "abc")
@virtual
async def test_if_a_child_cannot_be_started_first_those_before_it_are_terminated_in_reverse(failing: str) -> None:
    log: list[str] = []
    lives = [ScriptedLife(name, log, start_error="no" if name == failing else "") for name in "abc"]
    supervisor = BackpressureSupervisor()
    for life in lives:
        supervisor.register_worker(life.name, handler=Agent(), task_types=[life.name], start=life.start)
    with pytest.raises(OSError, match="no"):
        await supervisor.start()
    await settle()
    before = "abc"[: "abc".index(failing)]
    starts = [f"{name} starts" for name in before]
    assert log == [*starts, f"{failing} fails to start", *(f"{name} ends" for name in reversed(before))]
