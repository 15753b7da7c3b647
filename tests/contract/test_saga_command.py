"""``forebay saga`` on every saga log that another process can open."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.support.saga_logs import DURABLE_LOGS, LogBackend
from tests.support.stored_sagas import (
    AT,
    GOES_BACK,
    OUTPUT,
    RESEARCH,
    UNDO_FAILS,
    UNKNOWN,
    begun,
    failed,
    output,
    state_of,
    store_saga,
)
from typer.testing import CliRunner, Result

from forebay import clock
from forebay.cli.app import app
from forebay.saga import SagaLog, SagaState, open_saga_log
from forebay.saga.records import (
    CompensatedEntry,
    DoneEntry,
    Entry,
    FinishedEntry,
    ParkedEntry,
    ResolvedEntry,
    SagaHistory,
    StepState,
    StoredSaga,
    UndoFailedEntry,
    decode_entries,
)

pytestmark = pytest.mark.blocks

T = TypeVar("T")

DONE = (*RESEARCH, FinishedEntry(at=AT, result=output("published")))
PARKED = ParkedEntry(at=AT, why="a person has to look", step="act")
UNDO_FAILED = UndoFailedEntry(at=AT, step="act", error="TimeoutError")
SAGAS: dict[str, tuple[Entry, ...]] = {
    "runs": RESEARCH,
    "waits": UNKNOWN,
    "returns": (*RESEARCH, GOES_BACK),
    "fails": UNDO_FAILS,
    "ended": DONE,
    "went back": (GOES_BACK, CompensatedEntry(at=AT)),
    "closed": (*UNKNOWN, ResolvedEntry(at=AT)),
}


class Command:
    """``forebay saga`` on the log of this test, and the log itself."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, command: str, *options: str) -> Result:
        return CliRunner().invoke(app, ["saga", command, self.url, *options])

    def json(self, command: str, *options: str) -> Any:
        done = self(command, *options, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def run(self, action: Callable[[SagaLog], Awaitable[T]]) -> T:
        """Return what `action` returns of the log, opened."""

        async def run() -> T:
            log = open_saga_log(self.url)
            await log.open()
            try:
                return await action(log)
            finally:
                await log.close()

        return asyncio.run(run())

    def store(self, sagas: dict[str, tuple[Entry, ...]]) -> None:
        """Write sagas, each younger than the one before."""

        async def store(log: SagaLog) -> None:
            for number, (saga_id, entries) in enumerate(sagas.items()):
                await store_saga(log, saga_id, entries, age=300.0 - number)

        self.run(store)

    def read(self, saga_id: str) -> tuple[StoredSaga, SagaHistory]:
        stored = self.run(lambda log: log.get(saga_id))
        assert stored is not None
        return stored, SagaHistory(saga_id, decode_entries(saga_id, stored.entries))

    def state(self, saga_id: str) -> SagaState:
        return self.run(lambda log: state_of(log, saga_id))


@pytest.fixture(params=DURABLE_LOGS, ids=str)
def command(request: pytest.FixtureRequest, tmp_path: Path) -> Command:
    backend: LogBackend = request.param
    command = Command(backend.fast_url(tmp_path))
    command.store({})
    return command


@pytest.fixture
def filled(command: Command) -> Command:
    """Return the command on a log with a saga in each state."""
    command.store(SAGAS)
    return command


# --- ls --------------------------------------------------------------------------------------------------------------


def test_parked_sagas_are_listed_first_then_unfinished_ones(filled: Command) -> None:
    done = filled("ls")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["STATE", "NAME", "AGE", "STEPS", "WHY", "ID"]
    states = ["parked", "parked", "running, held by nobody", "compensating, held by nobody"]
    assert [line.split("  ")[0] for line in lines[1:]] == states
    assert [line.split()[-1] for line in lines[1:]] == ["waits", "fails", "runs", "returns"]
    assert " min  1 of 2  the outcome of step 'act' is unknown" in lines[1]
    assert "the compensation of step 'research' fails: PermissionErro..." in lines[2]
    assert " min  1 of 1  ConnectionError: no answer" in lines[4]


@pytest.mark.parametrize(
    ("left", "state"), [(600.0, "running"), (-0.1, "running, held by nobody")], ids=["held", "lease expired"]
)
def test_an_unfinished_saga_whose_lease_has_expired_is_said_to_be_held_by_nobody(
    command: Command, left: float, state: str
) -> None:
    command.store({"s": RESEARCH})

    async def take(log: SagaLog) -> float:
        now = clock.wall_time()
        assert await log.claim(["publish"], limit=1, fence="f", until=now + left, now=now)
        return now + left

    until = command.run(take)
    assert command("ls").stdout.splitlines()[1].split("  ")[0] == state
    shown = command("show", "s").stdout.splitlines()
    assert [line.split(None, 1)[1] for line in shown if line.startswith("state ")] == [state]
    for found in (command.json("ls")[0], command.json("show", "s")):
        assert (found["state"], found["lease_until"]) == ("running", pytest.approx(until, abs=1.0))


def test_states_are_chosen(filled: Command) -> None:
    def ids(*options: str) -> list[str]:
        return [each["saga_id"] for each in filled.json("ls", *options)]

    assert ids("--state", "done") == ["ended"]
    assert ids("--state", "resolved", "--state", "parked") == ["waits", "fails", "closed"]
    assert ids("--all") == ["waits", "fails", "runs", "returns", "ended", "went back", "closed"]


def test_a_listing_as_json_has_every_field_and_no_payload(filled: Command) -> None:
    first = filled.json("ls")[0]
    assert first["updated_at"] == pytest.approx(clock.wall_time() - 300.0, abs=60.0)
    times = {name: first.pop(name) for name in ("created_at", "updated_at")}
    assert first == {
        "saga_id": "waits",
        "name": "publish",
        "version": "2",
        "state": "parked",
        "why": "the outcome of step 'act' is unknown",
        "claims": 0,
        "lease_until": None,
        "steps_done": 1,
        "steps_begun": 2,
    }
    assert times["created_at"] == times["updated_at"]


def test_a_listing_is_limited_and_says_so(filled: Command) -> None:
    done = filled("ls", "--limit", "3")
    assert (len(done.stdout.splitlines()), done.stderr) == (4, "... and more: raise --limit 3\n")
    assert filled("ls", "--limit", "4").stderr == ""
    assert len(filled.json("ls", "--limit", "1")) == 1


def test_an_empty_log_has_no_sagas(command: Command) -> None:
    assert (command("ls").stdout, command.json("ls", "--all")) == ("no sagas\n", [])


def test_many_sagas_are_listed_page_by_page(command: Command) -> None:
    async def fill(log: SagaLog) -> None:
        await asyncio.gather(*(store_saga(log, f"{number:04}", UNKNOWN) for number in range(600)))

    command.run(fill)
    listed = [each["saga_id"] for each in command.json("ls", "--limit", "1000")]
    assert sorted(listed) == [f"{number:04}" for number in range(600)]


# --- show ------------------------------------------------------------------------------------------------------------


def test_a_saga_is_shown_with_what_happened_in_order(filled: Command) -> None:
    done = filled("show", "fails")
    assert done.exit_code == 0
    fields, steps, history, advice = done.stdout.split("\n\n")
    shown = dict(line.split(None, 1) for line in fields.splitlines())
    assert (shown["saga_id"], shown["state"]) == ("fails", "parked")
    assert "min ago)" in shown["created_at"]
    rows = [[cell for cell in line.split("  ") if cell] for line in steps.splitlines()]
    assert [row[0].strip() for row in rows] == ["STEP", "research", "act"]
    assert "fails/1/research" in steps.splitlines()[1]
    assert "2 times" in steps.splitlines()[1]
    assert [line.split("  ", 1)[1] for line in history.splitlines()][3:5] == [
        "step 'act' failed without an effect: ConnectionError: no answer",
        "compensates: ConnectionError: no answer",
    ]
    assert advice.startswith("It is parked")


def test_outputs_and_results_are_shown_on_request_alone(filled: Command) -> None:
    for options in ((), ("--json",)):
        assert OUTPUT not in filled("show", "ended", *options).output
    assert "outputs" not in filled.json("show", "ended")
    done = filled("show", "ended", "--outputs")
    assert f'the output of step \'research\': "{OUTPUT}"\nthe result: "published"\n' in done.stdout
    assert [(each["step"], each["value"]) for each in filled.json("show", "ended", "--outputs")["outputs"]] == [
        ("research", OUTPUT),
        (None, "published"),
    ]


def test_a_saga_that_is_not_parked_asks_for_nothing(filled: Command) -> None:
    assert "forebay saga" not in filled("show", "runs").stdout
    assert filled.json("show", "runs")["next"] == []


@pytest.mark.parametrize(
    ("entries", "options"),
    [
        (UNKNOWN, ["--step=act --done=JSON", "--step=act --not-done"]),
        (UNDO_FAILS, ["--step=research --undone"]),
        ((*RESEARCH, begun("act"), failed("act"), PARKED), ["--step=act --done=JSON"]),
        ((begun("act", compensable=True), failed("act"), UNDO_FAILED, PARKED), ["--step=act --undone"]),
        ((begun("act"), begun("other"), PARKED), ["--step=act --done=JSON", "--step=act --not-done"]),
        ((begun("act"), GOES_BACK, PARKED), ["--step=act --undone"]),
        ((begun("act"), failed("act", clean=True), GOES_BACK, PARKED), []),
        ((*RESEARCH, ParkedEntry(at=AT, why="its code has changed", step="research")), []),
        ((ParkedEntry(at=AT, why="its version is another one"),), []),
    ],
)
def test_what_to_do_about_a_parked_saga_is_shown_as_commands(
    command: Command, entries: tuple[Entry, ...], options: list[str]
) -> None:
    command.store({"s": entries})
    expected = [
        *(f"forebay saga resolve {shlex.quote(command.url)} s {each}" for each in options),
        f"forebay saga retry {shlex.quote(command.url)} s",
        f"forebay saga resolve {shlex.quote(command.url)} s --note=WHY",
    ]
    assert command.json("show", "s")["next"] == expected
    shown = command("show", "s").stdout.splitlines()
    assert [line.strip() for line in shown if line.strip().startswith("forebay saga")] == expected


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        (
            UNKNOWN,
            [
                "step act began, and its outcome is unknown (look for the key s/1/act); if it is done",
                "if it is not done",
                "after you gave the step a check= or idempotent=True (else it is parked again), let it go on",
            ],
        ),
        (
            (*RESEARCH, begun("act"), failed("act"), PARKED),
            [
                "step act failed, and may have had its effect (look for the key s/1/act); if it is done",
                "once the cause is gone, let it go on: the step is called again, under its key",
            ],
        ),
        (
            (*RESEARCH, begun("act"), failed("act", clean=True), PARKED),
            ["step act failed; if you have done it by hand", "once the cause is gone, let it go on"],
        ),
        (
            UNDO_FAILS,
            [
                "step research could not be undone; if you have undone it by hand",
                "once the cause is gone, let it go on",
            ],
        ),
    ],
    ids=["unknown", "failed", "not done", "not undone"],
)
def test_what_may_be_done_says_what_is_known_of_the_step(
    command: Command, entries: tuple[Entry, ...], what: list[str]
) -> None:
    command.store({"s": entries})
    shown = [line[2:-1] for line in command("show", "s").stdout.splitlines() if line.startswith("- ")]
    assert shown == [*what, "or close it as it is, with the effects that it has"]


@pytest.mark.parametrize("saga_id", ["it's; rm -rf $HOME", "--help", "a\nb\x1b[2J'\\", "\u202eid \U0001f600"])
def test_the_commands_work_as_they_are_shown(command: Command, saga_id: str) -> None:
    command.store({saga_id: (*RESEARCH, begun("-x 'y'"), ParkedEntry(at=AT, why="w", step="-x 'y'"))})
    shown = json.loads(command("show", "--json", "--", saga_id).stdout)
    for line in shown["next"]:
        assert not {"\n", "\x1b", "\u202e"} & set(line)
    words = bash_words(shown["next"][1])
    done = CliRunner().invoke(app, words[1:])
    assert (done.exit_code, command.read(saga_id)[1].steps["-x 'y'"].state) == (0, StepState.NOT_DONE), done.output


def bash_words(line: str) -> list[str]:
    """Return the words of a command, as bash reads them."""
    script = f"printf '%s\\0' {line}"
    read = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})  # noqa: S607
    return read.stdout.decode().split("\0")[:-1]


def test_text_of_others_does_not_reach_the_terminal(command: Command) -> None:
    hostile = "a\x1b[2J\nfake line\u202e"
    command.store({hostile: (begun(hostile), ParkedEntry(at=AT, why=hostile, step=hostile))})
    for done in (command("ls"), command("show", hostile, "--outputs"), command("retry", hostile)):
        assert done.exit_code == 0
        assert not {"\x1b", "\u202e"} & set(done.stdout)
    command.store({"other": (begun(hostile), ParkedEntry(at=AT, why=hostile, step=hostile))})
    assert len(command("ls", "--state", "parked").stdout.splitlines()) == 2


# --- retry, resolve --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saga_id", "state"), [("waits", "running"), ("fails", "compensating")])
def test_a_parked_saga_is_retried_and_any_process_may_take_it(filled: Command, saga_id: str, state: str) -> None:
    assert filled("retry", saga_id).stdout == f"saga {saga_id} goes on, and is {state}\n"

    async def claim(log: SagaLog) -> dict[str, str]:
        now = clock.wall_time()
        claimed = await log.claim(["publish"], limit=9, fence="f", until=now + 10.0, now=now)
        return {each.header.saga_id: each.header.state.value for each in claimed}

    assert filled.run(claim)[saga_id] == state


@pytest.mark.parametrize(
    ("saga_id", "step", "options", "after"),
    [
        ("waits", "act", ["--done", '{"id": 7}'], StepState.DONE),
        ("waits", "act", ["--done", "null"], StepState.DONE),
        ("waits", "act", ["--not-done"], StepState.NOT_DONE),
        ("fails", "research", ["--undone"], StepState.UNDONE),
    ],
)
def test_the_outcome_of_a_step_is_written_with_its_note_and_the_saga_goes_on(
    filled: Command, saga_id: str, step: str, options: list[str], after: StepState
) -> None:
    state = "running" if saga_id == "waits" else "compensating"
    done = filled.json("resolve", saga_id, "--step", step, *options, "--note", "asked the bank")
    assert done == {"saga_id": saga_id, "state": state}
    stored, history = filled.read(saga_id)
    assert (stored.header.state, history.state, history.steps[step].state) == (
        SagaState(state),
        SagaState(state),
        after,
    )
    assert ": asked the bank" in filled("show", saga_id).stdout
    if "--done" in options:
        (entry,) = [entry for entry in decode_entries(saga_id, stored.entries) if isinstance(entry, DoneEntry)][1:]
        assert entry.output == output(json.loads(options[1]))


def test_without_a_step_a_parked_saga_is_closed(filled: Command) -> None:
    assert filled("resolve", "waits", "--note", "paid by hand").stdout == "saga waits is closed\n"
    assert filled.state("waits") is SagaState.RESOLVED
    assert "closed by a person: paid by hand" in filled("show", "waits").stdout


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["show", "nothing"], "No saga 'nothing' is in this log"),
        (["retry", "nothing"], "No saga 'nothing' is in this log"),
        (["retry", "runs"], "Saga 'runs' is running, and only a parked saga"),
        (["retry", "ended"], "Saga 'ended' is done, and only a parked saga"),
        (["resolve", "closed"], "Saga 'closed' is resolved, and only a parked saga"),
        (["resolve", "waits", "--step", "other", "--not-done"], "it has not begun a step 'other'"),
        (["resolve", "waits", "--step", "research", "--not-done"], "step 'research' has returned, so it is done"),
        (["resolve", "waits", "--step", "research", "--undone"], "the saga goes forward"),
        (
            ["resolve", "waits", "--step", "act", "--done", "18446744073709551616"],
            "output is not plain data: int",
        ),
    ],
)
def test_what_cannot_be_done_is_explained_in_a_line_and_changes_nothing(
    filled: Command, options: list[str], why: str
) -> None:
    before = [filled.read(saga_id)[0] for saga_id in SAGAS]
    done = filled(*options)
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("forebay: ")
    assert why in done.stderr
    assert [filled.read(saga_id)[0] for saga_id in SAGAS] == before
