"""``forebay spend``: the spend of a log, as a table and as JSON."""

from __future__ import annotations

import datetime as dt
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from forebay import clock
from forebay.cli.app import app
from forebay.spend_log import SpendAmounts, SpendLabels, SpendLog

NOW = dt.datetime(2026, 11, 24, 12, 30, tzinfo=dt.UTC).timestamp()
NOON = int(NOW) - 1_800
HOUR = 3_600

Call = tuple[int, str, str, str, float]  # hours ago, tenant, model, key, dollars
CALLS: Sequence[Call] = (
    (0, "acme", "gpt-4o", "ab12cd34", 0.5),
    (0, "acme", "gpt-4o", "ab12cd34", 0.25),
    (2, "acme", "gpt-4o-mini", "ab12cd34", 0.0625),
    (30, "zeta", "gpt-4o", "", 2_000.0),
    (24 * 40, "zeta", "gpt-4o", "", 4.0),
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["spend", *arguments])


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clock, "wall_time", lambda: NOW)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def write(path: Path, calls: Sequence[Call] = CALLS) -> Path:
    spend_log = SpendLog(f"sqlite:///{path}")
    spend_log.open()
    for ago, tenant, model, key, usd in calls:
        labels = SpendLabels(NOON - ago * HOUR, "openai", tenant, model, key)
        spend_log.record(labels, SpendAmounts(1, 1_000, 100, usd))
    spend_log.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "spend.db")


def test_a_table_has_the_dearest_first_and_the_total(path: Path) -> None:
    done = run(str(path), "--by", "tenant,model", "--last", "week")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "TENANT  MODEL        CALLS  INPUT TOKENS  OUTPUT TOKENS         USD",
        "zeta    gpt-4o           1         1,000            100  2,000.0000",
        "acme    gpt-4o           2         2,000            200      0.7500",
        "acme    gpt-4o-mini      1         1,000            100      0.0625",
        "total                    4         4,000            400  2,000.8125",
    ]


def test_json_has_the_same(path: Path) -> None:
    done = run(f"sqlite:///{path}", "--by", "tenant", "--json")
    amounts = {"calls": 3, "input_tokens": 3_000, "output_tokens": 300, "usd": 0.8125}
    assert json.loads(done.stdout) == {
        "file": str(path),
        "since": "2026-11-23T12:00:00Z",
        "rows": [{"tenant": "acme", **amounts}],
        "total": amounts,
    }


@pytest.mark.parametrize(
    ("last", "calls"),
    [("hour", 2), ("day", 3), ("week", 4), ("month", 4), ("all", 5), ("1h", 2), ("2 h", 3), ("31h", 4), ("40d", 5)],
)
def test_the_time_may_be_chosen(path: Path, last: str, calls: int) -> None:
    assert json.loads(run(str(path), "--last", last, "--json").stdout)["total"]["calls"] == calls


def test_rows_by_time_are_in_its_order(path: Path) -> None:
    rows = json.loads(run(str(path), "--by", "day,tenant", "--last", "week", "--json").stdout)["rows"]
    assert [(row["day"], row["tenant"]) for row in rows] == [("2026-11-23", "zeta"), ("2026-11-24", "acme")]
    rows = json.loads(run(str(path), "--by", "hour", "--json").stdout)["rows"]
    assert [row["hour"] for row in rows] == ["2026-11-24T10:00:00Z", "2026-11-24T12:00:00Z"]


def test_only_some_spend_may_be_asked_for(path: Path) -> None:
    where = ("--where", "tenant=acme", "--where", "model=gpt-4o")
    assert json.loads(run(str(path), *where, "--last", "all", "--json").stdout)["total"]["usd"] == 0.75
    assert run(str(path), "--where", "tenant=nobody").stdout == "no spend in the last day\n"


def test_without_columns_there_is_the_total_alone(path: Path) -> None:
    lines = run(str(path), "--by", "", "--last", "all").stdout.splitlines()
    assert lines == ["CALLS  INPUT TOKENS  OUTPUT TOKENS         USD", "    5         5,000            500  2,004.8125"]


def test_names_cannot_control_the_terminal(tmp_path: Path) -> None:
    path = write(tmp_path / "names.db", [(0, "\x1b[31mred", "m", "", 1.0)])
    assert "\\x1b[31mred" in run(str(path), "--by", "tenant").stdout


def test_the_file_of_the_only_gateway_need_not_be_named(tmp_path: Path) -> None:
    state = tmp_path / "state" / "forebay"
    done = run()
    assert done.exit_code == 1
    assert f"there is no spend log in {state}: name its file. `forebay gateway --check` prints" in done.stderr
    state.mkdir(parents=True)
    write(state / "gateway-8787.db")
    assert "gpt-4o" in run().stdout
    write(state / "gateway-9000.db")
    done = run()
    assert done.exit_code == 1
    assert f"name one: {state}/gateway-8787.db, {state}/gateway-9000.db" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("missing.db",), 1, "there is no such file"),
        (("empty.db",), 1, "it is empty"),
        (("other.db",), 1, "it is a database of another program"),
        (("redis://host",), 2, "a spend log is a SQLite file"),
        (("spend.db", "--by", "team"), 2, "there is no column 'team'; there are upstream, tenant, model"),
        (("spend.db", "--by", "tenant,tenant"), 2, "name each column once"),
        (("spend.db", "--last", "fortnight"), 2, "'fortnight' is none of hour, day, week, month, all, 36h, 7d"),
        (("spend.db", "--where", "tenant"), 2, "give COLUMN=VALUE"),
        (("spend.db", "--where", "day=2026-11-24"), 2, "for times there is --last"),
    ],
)
def test_a_mistake_says_what_to_do(
    arguments: tuple[str, ...], status: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "spend.db")
    (tmp_path / "empty.db").touch()
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE other (a)")
    connection.close()
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (status, "")
    assert says in done.stderr
    assert not (tmp_path / "missing.db").exists()
    assert (tmp_path / "empty.db").stat().st_size == 0
