"""``forebay overflow`` on every store that another process can open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pytest
from tests.support.task_stores import ENVELOPE, SHARED, SLOW_STORES, StoreBackend
from typer.testing import CliRunner, Result

from forebay import clock
from forebay.cli.app import app
from forebay.interfaces import Completion, RecordState, TaskRecord, TaskStore
from forebay.overflow import encode_result, encode_task, open_task_store
from forebay.task import Priority, Task

if TYPE_CHECKING:
    from tests.contract.conftest import MakeRecord

pytestmark = pytest.mark.blocks

T = TypeVar("T")

PAYLOAD = "the rivers of Saxony"
DAY = 86_400.0
FAILED = Completion(status="failed", worker_id="w", error="ConnectionError: no answer", attempts=3)


class Command:
    """``forebay overflow`` on the store of this test, and the store itself."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, command: str, *options: str, answer: str | None = None) -> Result:
        return CliRunner().invoke(app, ["overflow", command, self.url, *options], input=answer)

    def json(self, command: str, *options: str) -> Any:
        done = self(command, *options, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def run(self, action: Callable[[TaskStore], Awaitable[T]]) -> T:
        """Return what `action` returns of the store, opened."""

        async def run() -> T:
            store = open_task_store(self.url)
            await store.open()
            try:
                return await action(store)
            finally:
                await store.close()

        return asyncio.run(run())

    def states(self) -> dict[str, str]:
        return {each["task_id"]: each["state"] for each in self.json("ls", "--state", "done", *ALL)}


ALL = [part for state in ("waiting", "parked", "leased", "delayed", "dead") for part in ("--state", state)]


@pytest.fixture
def command(backend: StoreBackend, tmp_path: Path) -> Command:
    backend.needs(SHARED)
    return Command(backend.fast_url(tmp_path))


def stored(record: MakeRecord, task_id: str, **fields: Any) -> TaskRecord:
    """Return the record of a task with a payload that nobody may see."""
    task = Task("research", PAYLOAD, task_id=task_id)
    envelope = encode_task(task, PAYLOAD, bound=1000)
    return record(task_id, envelope=envelope, enqueued_at=clock.wall_time() - 100.0, **fields)


@pytest.fixture
def filled(command: Command, record: MakeRecord) -> Command:
    """Return the command on a store with a record in each state."""

    async def fill(store: TaskStore) -> None:
        now = clock.wall_time()
        for name in ("held", "done", "dead"):
            await store.put(stored(record, name, key=f"key of {name}"))
        held = {lease.record.task_id: lease for lease in await store.lease("research", 9, until=now + 60.0)}
        end = Completion(
            status="succeeded", result=encode_result("an answer", task_id="done", bound=99), finished_at=now
        )
        await store.finish("done", end, fence=held["done"].fence)
        await store.mark_dead(held["dead"], msgspec.structs.replace(FAILED, finished_at=now - DAY))
        await store.put(stored(record, "waits", priority=Priority.LOW, tenant="acme", thread="t"))
        await store.put(stored(record, "behind", thread="t"))
        await store.put(stored(record, "later", not_before=now + 3600.0), now=now)

    command.run(fill)
    return command


def test_records_of_all_states_but_done_are_listed_without_their_payloads(filled: Command) -> None:
    done = filled("ls")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["STATE", "TYPE", "PRIORITY", "TENANT", "AGE", "ATTEMPTS", "DUE", "ERROR", "ID"]
    assert [line.split()[0] for line in lines[1:]] == ["leased", "waiting", "delayed", "parked", "dead"]
    assert [line.split()[-1] for line in lines[1:]] == ["held", "waits", "later", "behind", "dead"]
    assert "ConnectionError: no answer" in lines[-1]
    assert "in 60 min" in lines[3]
    assert "acme" in lines[2]
    assert PAYLOAD not in done.output


def test_a_listing_as_json_has_every_field(filled: Command) -> None:
    found = {each["task_id"]: each for each in filled.json("ls", *ALL, "--state", "done")}
    assert {name: each["state"] for name, each in found.items()} == {
        "held": "leased",
        "waits": "waiting",
        "later": "delayed",
        "behind": "parked",
        "done": "done",
        "dead": "dead",
    }
    now = clock.wall_time()
    assert found["later"]["due"] == found["later"]["not_before"] == pytest.approx(now + 3600.0, abs=60.0)
    assert found["held"]["lease_until"] == pytest.approx(now + 60.0, abs=60.0)
    assert (found["waits"]["priority"], found["waits"]["tenant"], found["waits"]["thread_id"]) == ("low", "acme", "t")
    assert (found["dead"]["error"], found["dead"]["status"]) == ("ConnectionError: no answer", "failed")


def test_a_listing_is_limited_and_says_so(filled: Command) -> None:
    done = filled("ls", "--limit", "2")
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == "... and more: raise --limit 2\n"
    assert filled("ls", "--limit", "5").stderr == ""
    assert filled("ls", "--type", "other").stdout == "no records\n"
    assert len(filled.json("ls", "--type", "research", "--limit", "1")) == 1


def test_one_record_is_shown_and_its_payload_only_on_request(filled: Command, backend: StoreBackend) -> None:
    done = filled("show", "dead")
    assert done.exit_code == 0
    assert PAYLOAD not in done.output
    shown = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert (shown["state"], shown["key"], shown["error"]) == ("dead", "key of dead", "ConnectionError: no answer")
    assert "h ago" in shown["finished_at"]
    assert filled.json("show", "dead", "--payload")["payload"] == PAYLOAD
    waiting = filled.json("show", "waits", "--payload")
    assert (waiting["payload"], waiting.get("payload_error")) == (
        (PAYLOAD, None)
        if ENVELOPE in backend.can
        else (None, "this overflow does not show it before the task has ended")
    )
    assert "result" not in filled.json("show", "done")
    assert filled.json("show", "done", "--payload")["result"] == "an answer"


def test_records_are_counted_by_state_type_and_priority(filled: Command) -> None:
    counts = filled.json("count")
    assert [(each["state"], each["task_type"], each["priority"], each["records"]) for each in counts] == [
        ("leased", "research", "normal", 1),
        ("waiting", "research", "low", 1),
        ("delayed", "research", "normal", 1),
        ("parked", "research", "normal", 1),
        ("dead", "research", "normal", 1),
        ("done", "research", "normal", 1),
    ]
    assert filled("count").stdout.splitlines()[0].split() == ["STATE", "TYPE", "PRIORITY", "RECORDS"]


def test_many_records_are_read_page_by_page(backend: StoreBackend, command: Command, record: MakeRecord) -> None:
    if backend in SLOW_STORES:
        pytest.skip("the simulated queue takes most of a minute, and the index that is read is that of another store")

    async def fill(store: TaskStore) -> None:
        await asyncio.gather(*(store.put(stored(record, f"{number}")) for number in range(1_100)))

    command.run(fill)
    assert [each["records"] for each in command.json("count")] == [1_100]
    assert len(command.json("ls", "--limit", "2000")) == 1_100
    assert command.json("purge", "--state", "waiting", "--yes") == {"purged": 1_100}
    assert command.json("count")[0]["state"] == "done"


def test_a_dead_letter_is_replayed(filled: Command) -> None:
    assert filled("replay", "dead").stdout == "1 replayed\n"
    state, record, completion = filled.run(lambda store: store.find("dead")) or (None, None, None)
    assert (state, completion) == (RecordState.WAITING, None)
    assert record is not None
    assert record.attempts == 0
    assert filled.json("replay", "--all") == {"replayed": [], "failed": []}


def test_what_cannot_be_replayed_is_named_and_the_rest_is_replayed(filled: Command, record: MakeRecord) -> None:
    filled.run(lambda store: store.put(stored(record, "again", key="key of dead")))
    done = filled("replay", "dead", "waits", "nothing", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {
        "replayed": [],
        "failed": [
            {"task_id": "dead", "reason": "another task has taken its key"},
            {"task_id": "waits", "reason": "there is no dead letter of that id"},
            {"task_id": "nothing", "reason": "there is no dead letter of that id"},
        ],
    }
    filled.json("purge", "--state", "waiting", "--yes")
    assert filled.json("replay", "--all")["replayed"] == ["dead"]


@pytest.mark.parametrize("options", [[], ["dead", "--all"]])
def test_what_to_replay_must_be_said(filled: Command, options: list[str]) -> None:
    done = filled("replay", *options)
    assert (done.exit_code, done.stderr) == (2, "forebay: name the ids of dead letters, or give --all\n")
    assert filled.states()["dead"] == "dead"


@pytest.mark.parametrize(
    ("state", "gone", "ended"),
    [
        ("dead", {"dead"}, {"done"}),
        ("done", {"done"}, set()),
        ("waiting", set(), {"done", "waits", "behind"}),
        ("delayed", set(), {"done", "later"}),
    ],
)
def test_records_of_one_state_are_purged(filled: Command, state: str, gone: set[str], ended: set[str]) -> None:
    before = filled.states()
    done = filled("purge", "--state", state, "--yes")
    assert done.stdout == f"{len(gone) or len(ended - {'done'})} purged\n"
    after = filled.states()
    assert before.keys() - after.keys() == gone
    assert {name for name, each in after.items() if each == "done"} == ended
    for name in ended - {"done"}:
        assert filled.json("show", name)["status"] == "cancelled"
    assert after["held"] == "leased"


@pytest.mark.parametrize(("older_than", "purged"), [("12h", 1), ("1d", 1), ("2d", 0), ("30s", 1), ("1.5d", 0)])
def test_only_old_ones_are_purged(filled: Command, older_than: str, purged: int) -> None:
    assert filled.json("purge", "--state", "dead", "--older-than", older_than, "--yes") == {"purged": purged}


@pytest.mark.parametrize("older_than", ["7", "d", "7w", "-1d", "1e3s", ""])
def test_an_age_that_is_none_is_an_error(filled: Command, older_than: str) -> None:
    done = filled("purge", "--state", "dead", "--yes", f"--older-than={older_than}")
    assert (done.exit_code, "write a number and s, m, h or d" in done.stderr) == (2, True)
    assert filled.states()["dead"] == "dead"


def test_without_yes_and_without_a_terminal_nothing_is_purged(filled: Command) -> None:
    done = filled("purge", "--state", "waiting")
    assert (done.exit_code, done.stderr) == (
        2,
        "forebay: Cancel 2 waiting tasks? Give --yes to do it without being asked\n",
    )
    assert filled.states()["waits"] == "waiting"


def test_text_of_others_does_not_reach_the_terminal(command: Command, record: MakeRecord) -> None:
    hostile = "a\x1b[2J\nfake line\u202e"
    command.run(lambda store: store.put(record(hostile, of=f"type {hostile}", tenant=hostile)))
    for done in (command("ls"), command("count"), command("show", hostile)):
        assert done.exit_code == 0
        assert not {"\x1b", "\u202e"} & set(done.stdout)
    assert len(command("ls").stdout.splitlines()) == 2
    assert command.json("ls")[0]["task_id"] == hostile


def test_an_unknown_id_is_an_error(filled: Command) -> None:
    done = filled("show", "nothing")
    assert (done.exit_code, done.stderr) == (1, "forebay: there is no task 'nothing' in this overflow\n")
