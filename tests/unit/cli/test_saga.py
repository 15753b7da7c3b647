"""``forebay saga`` without a log that it can use, or with options that contradict each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.stored_sagas import UNKNOWN, store_saga
from typer.testing import CliRunner

from forebay.cli.app import app
from forebay.cli.saga import _print_advice
from forebay.saga import MemorySagaLog, SagaAdmin


@pytest.mark.parametrize(
    ("url", "status", "why"),
    [
        ("nonsense", 2, "The saga log 'nonsense' cannot be opened: it does not begin with the name of a store and ://"),
        ("mysql://host/db", 2, "there is no store 'mysql'"),
        ("sqlite:///saga.db?bound=9", 2, "bound is an option of an overflow"),
        ("memory://", 2, "a saga log in memory is not shared"),
        ("sqs://tasks", 2, "no saga log is known for sqs://"),
        ("sqlite:///no/such/file.db", 1, "there is no file"),
    ],
)
@pytest.mark.parametrize("command", [["ls"], ["show", "ID"], ["retry", "ID"], ["resolve", "ID"]])
def test_a_log_that_cannot_be_used_is_explained_in_a_line(command: list[str], url: str, status: int, why: str) -> None:
    done = CliRunner().invoke(app, ["saga", command[0], url, *command[1:]])
    assert done.exit_code == status
    assert done.stderr.startswith("forebay: ")
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_looking_into_a_file_that_does_not_exist_makes_none(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["saga", "ls", f"sqlite:///{tmp_path}/saga.db"]).exit_code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["ls", "URL", "--all", "--state", "done"], "give --state or --all, not both"),
        (["resolve", "URL", "ID", "--done", "1"], "name the step, by --step NAME"),
        (["resolve", "URL", "ID", "--undone"], "name the step, by --step NAME"),
        (["resolve", "URL", "ID", "--step", "act"], "give one of --done JSON, --not-done and --undone"),
        (["resolve", "URL", "ID", "--step", "act", "--done", "1", "--not-done"], "give one of --done JSON"),
        (["resolve", "URL", "ID", "--step", "act", "--done", "secret"], "--done takes JSON"),
        (["resolve", "URL", "ID", "--step", "act", "--done", "[" * 100_000], "--done takes JSON"),
        (["resolve", "URL", "ID", "--step", "act", "--done", "NaN"], "--done takes JSON"),
        (["resolve", "URL", "ID", "--step", "act", "--done", "1e999999"], "--done takes JSON"),
    ],
)
def test_options_that_contradict_each_other_are_explained(options: list[str], why: str) -> None:
    done = CliRunner().invoke(app, ["saga", *options])
    assert (done.exit_code, len(done.stderr.splitlines()), "secret" in done.output) == (2, 1, False)
    assert done.stderr.startswith(f"forebay: {why}")


async def test_the_commands_that_are_shown_leave_the_password_out(capsys: pytest.CaptureFixture[str]) -> None:
    await store_saga(log := MemorySagaLog(), "s", UNKNOWN)
    _print_advice(await SagaAdmin(log).show("s"), "redis://user:hunter2@host:6379/0")
    shown = capsys.readouterr().out
    assert ("hunter2" in shown, shown.count("'redis://***@host:6379/0'")) == (False, 4)


@pytest.mark.parametrize("command", [["ls"], ["show", "ID"], ["retry", "ID"], ["resolve", "ID"]])
def test_a_server_that_is_away_is_explained_without_the_password(command: list[str]) -> None:
    options = ["saga", command[0], "redis://user:hunter2@127.0.0.1:1/0", *command[1:]]
    done = CliRunner().invoke(app, options)
    assert (done.exit_code, done.stderr.startswith("forebay: "), "hunter2" in done.output) == (1, True, False)
