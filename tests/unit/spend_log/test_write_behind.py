"""The spend log: what calls have cost is in its file, whatever becomes of its process or the file."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forebay import clock
from forebay.errors import InvalidSpendLogUrl, StoreUnavailable
from forebay.simulation import simulate
from forebay.spend_log import SpendAmounts, SpendLabels, SpendLog, SpendQuery, read_spend
from forebay.spend_log.spend_file import SpendFile
from forebay.spend_log.spend_record import ALL_UPSTREAMS, HOUR, AlertPlace, GivenAlert
from forebay.storage import Fsync

NOON = int(dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC).timestamp())
DAY = 24 * HOUR
BUDGET = AlertPlace("openai", "budget", "")
ACME = AlertPlace("openai", "tenant_budget", "acme")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spend.db"


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "wall_time", lambda: NOON + 60.0)


@pytest.fixture
def open_log(path: Path) -> Iterator[Callable[[], SpendLog]]:
    opened: list[SpendLog] = []

    def open_log() -> SpendLog:
        opened.append(SpendLog(f"sqlite:///{path}"))
        opened[-1].open()
        return opened[-1]

    yield open_log
    for spend_log in opened:
        spend_log.close()


def spend(
    spend_log: SpendLog, usd: float = 1.0, hour: int = NOON, tenant: str = "acme", task: str | None = None
) -> None:
    labels = SpendLabels(hour, "openai", tenant, "gpt-4o", "ab12")
    spend_log.record(labels, SpendAmounts(1, 100, 20, usd), task)


def spent_in(path: Path) -> float:
    return sum(group.amounts.usd for group in read_spend(path, SpendQuery(by=())))


def test_spend_is_written_by_itself(open_log: Callable[[], SpendLog], path: Path) -> None:
    spend_log = open_log()
    spend(spend_log)
    while not spent_in(path):  # the thread of the log writes it: a test that waits in vain ends by its timeout
        pass
    assert spent_in(path) == 1.0


def test_what_is_not_written_is_written_at_close(open_log: Callable[[], SpendLog], path: Path) -> None:
    spend_log = open_log()
    for _ in range(1_000):
        spend(spend_log, 0.01)
    spend_log.close()
    spend_log.close()
    assert spent_in(path) == pytest.approx(10.0)
    (group,) = read_spend(path, SpendQuery(by=("upstream", "tenant", "model", "key", "hour")))
    assert group.values == ("openai", "acme", "gpt-4o", "ab12", NOON)
    assert (group.amounts.calls, group.amounts.input_tokens, group.amounts.output_tokens) == (1_000, 100_000, 20_000)


def test_two_processes_add_to_one_file_and_each_begins_with_the_sum(open_log: Callable[[], SpendLog]) -> None:
    one, two = open_log(), open_log()
    spend(one, 1.0)
    spend(two, 2.0)
    assert one.spent(BUDGET, "day", NOON) == 1.0
    assert two.spent(BUDGET, "day", NOON) == 2.0
    one.close()
    two.close()
    assert open_log().spent(BUDGET, "day", NOON) == 3.0


def test_what_is_spent_is_by_period(open_log: Callable[[], SpendLog]) -> None:
    spend_log = open_log()
    for hour, usd in ((NOON - 40 * DAY, 1.0), (NOON - 2 * DAY, 2.0), (NOON - HOUR, 4.0), (NOON, 8.0)):
        spend(spend_log, usd, hour=hour)
    spend(spend_log, 16.0, tenant="zeta")
    spend(spend_log, 32.0, hour=NOON - 2 * DAY)  # late: a call that began two days ago
    spend_log.flush()
    for each in (spend_log, open_log()):
        now = NOON + 60.0
        spent = {per: each.spent(BUDGET, per, now) for per in ("hour", "day", "month", None)}
        assert spent == {"hour": 24.0, "day": 28.0, "month": 62.0, None: 63.0}
        assert each.spent(ACME, "day", now) == 12.0
        assert each.spent(BUDGET, "day", now + DAY) == 0.0
        assert each.spent(BUDGET, "month", now + 10 * DAY) == 0.0


def test_the_spend_of_a_key_and_of_a_tenant_is_that_at_all_upstreams(open_log: Callable[[], SpendLog]) -> None:
    spend_log = open_log()
    for upstream, key, hour, usd in (
        ("openai", "writer", NOON, 1.0),
        ("anthropic", "writer", NOON - 2 * DAY, 2.0),
        ("openai", "writer", NOON - 40 * DAY, 4.0),
        ("openai", "reader", NOON, 8.0),
        ("openai", "", NOON, 16.0),
    ):
        spend_log.record(SpendLabels(hour, upstream, "acme", "gpt-4o", key), SpendAmounts(1, 100, 20, usd))
    spend_log.flush()
    for each in (spend_log, open_log()):
        for place, expected in (
            (AlertPlace(ALL_UPSTREAMS, "key_budget", "writer"), {"day": 1.0, "month": 3.0, None: 7.0}),
            (AlertPlace(ALL_UPSTREAMS, "tenant_budget", "acme"), {"day": 25.0, "month": 27.0, None: 31.0}),
        ):
            assert {per: each.spent(place, per, NOON + 60.0) for per in ("day", "month", None)} == expected


def test_an_earlier_month_does_not_count_in_the_present_one(open_log: Callable[[], SpendLog]) -> None:
    spend_log = open_log()
    spend(spend_log, 5.0, hour=NOON - 30 * DAY)
    assert spend_log.spent(BUDGET, "month", NOON) == 0.0
    assert spend_log.spent(BUDGET, None, NOON) == 5.0


def test_a_clock_that_was_ahead_does_not_refill_a_budget(open_log: Callable[[], SpendLog]) -> None:
    before = open_log()
    spend(before, 9.0)
    spend(before, 0.5, hour=NOON + DAY, task="job")  # by a clock that was a day ahead
    spend(before, 0.25, hour=NOON + 40 * DAY)
    before.close()
    after = open_log()
    spent = [after.spent(BUDGET, per, NOON + 60.0) for per in ("hour", "day", "month", None)]
    assert spent == [9.75] * 4
    assert after.spent(ACME, "day", NOON + 60.0) == 9.75
    assert after.spent(AlertPlace("openai", "task_budget", "job"), "day", NOON + 60.0) == 0.5


def test_the_spend_of_tasks_is_kept(open_log: Callable[[], SpendLog]) -> None:
    spend_log = open_log()
    spend(spend_log, 0.2, task="run-1")
    spend(spend_log, 0.3, hour=NOON + HOUR, task="run-1")
    spend_log.flush()
    for each in (spend_log, open_log()):
        assert each.spent(AlertPlace("openai", "task_budget", "run-1"), None, NOON) == pytest.approx(0.5)


def test_an_alert_that_was_given_is_remembered_for_its_period(open_log: Callable[[], SpendLog]) -> None:
    spend_log = open_log()
    spend_log.record_alert(BUDGET, GivenAlert(float(NOON - 12 * HOUR), 0.8))
    spend_log.flush()
    for each in (spend_log, open_log()):
        assert each.alerted(BUDGET, float(NOON - 12 * HOUR)) == 0.8
        assert each.alerted(BUDGET, float(NOON + 12 * HOUR)) == 0.0
        assert each.alerted(ACME, float(NOON - 12 * HOUR)) == 0.0


def test_names_that_no_encoding_has_are_written_escaped(open_log: Callable[[], SpendLog], path: Path) -> None:
    spend_log = open_log()
    spend(spend_log, tenant="a\ud800")
    assert spend_log.flush()
    assert [group.values for group in read_spend(path, SpendQuery(by=("tenant",)))] == [("a\\ud800",)]


# --- a file that fails ---


def test_a_file_that_cannot_be_written_costs_nothing_and_is_written_later(
    open_log: Callable[[], SpendLog], path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = SpendFile.write

    def fail(*_: object) -> None:
        raise StoreUnavailable(where=str(path), why="the disk is full", advice="Free some space.")

    spend_log = open_log()
    monkeypatch.setattr(SpendFile, "write", fail)
    for _ in range(5):
        spend(spend_log)
        assert not spend_log.flush()
    assert spend_log.spent(BUDGET, "day", NOON) == 5.0
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1, "it is said once"
    assert "the disk is full" in caplog.text
    monkeypatch.setattr(SpendFile, "write", write)
    spend(spend_log)
    assert spend_log.flush()
    assert "can be written again" in caplog.text
    assert spent_in(path) == 6.0


def test_a_group_is_written_whole_or_not_at_all(path: Path, open_log: Callable[[], SpendLog]) -> None:
    spend_log = open_log()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TRIGGER full BEFORE INSERT ON alert BEGIN SELECT RAISE(ABORT, 'no room'); END")
    connection.close()
    spend(spend_log)
    spend_log.record_alert(BUDGET, GivenAlert(0.0, 0.8))
    assert not spend_log.flush()
    assert spent_in(path) == 0.0
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER full")
    connection.close()
    assert spend_log.flush()
    assert spent_in(path) == 1.0


def test_a_file_that_was_removed_is_made_again(
    open_log: Callable[[], SpendLog], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spend_log = open_log()
    spend(spend_log)
    spend_log.flush()
    path.unlink()
    spend(spend_log, 2.0)
    assert spend_log.flush()
    assert spent_in(path) == 2.0
    assert "begins again without what it had" in caplog.text
    assert spend_log.spent(BUDGET, "day", NOON) == 3.0, "a budget forgets nothing while its process lives"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.mkdir(), "cannot be opened"),
        (lambda path: path.write_bytes(b"not a database at all" * 100), "not a SQLite database"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE other (a)").connection.close(), "another program"),
    ],
)
def test_a_file_that_cannot_be_opened_says_why(path: Path, make: Callable[[Path], object], says: str) -> None:
    make(path)
    with pytest.raises(StoreUnavailable, match=says):
        SpendLog(f"sqlite:///{path}").open()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("spend.db", "does not begin with the name of a store"),
        ("redis://host", "a spend log is a SQLite file"),
        ("memory://", "a spend log is a SQLite file"),
        ("sqlite:///spend.db?bound=5", "bound is an option of an overflow"),
        ("sqlite:///spend.db?fsync=maybe", "none of yes, checkpoint, no"),
        (5, "it is not a text"),
    ],
)
def test_an_invalid_url_says_what_is_allowed(url: str, says: str) -> None:
    with pytest.raises(InvalidSpendLogUrl, match=says) as caught:
        SpendLog(url)
    assert "sqlite:///spend.db" in str(caught.value)


# --- time ---


def test_spend_that_is_long_past_is_added_up_by_day(path: Path, open_log: Callable[[], SpendLog]) -> None:
    spend_log = open_log()
    midnight = NOON - 12 * HOUR - 100 * DAY
    for hour in range(24):
        spend(spend_log, 0.5, hour=midnight + hour * HOUR, task="old")
    spend(spend_log, 1.0, hour=NOON)
    spend_log.close()
    file = SpendFile(path, Fsync.NO)
    for _ in range(2):
        file.tidy(NOON)
        totals, _ = file.load(NOON)
        assert totals.spent(("openai", "budget", ""), None, NOON) == 13.0
        assert totals.spent(("openai", "task_budget", "old"), None, NOON) == 0.0, "forgotten after a month"
    file.close()
    groups = read_spend(path, SpendQuery(by=("hour",)))
    assert [(group.values, group.amounts.calls) for group in groups] == [((midnight,), 24), ((NOON,), 1)]


@pytest.mark.blocks  # a virtual loop runs what blocks inline
def test_in_virtual_time_it_is_written_without_threads(open_log: Callable[[], SpendLog], path: Path) -> None:
    spend_log = open_log()

    async def main() -> None:
        spend(spend_log)
        await asyncio.sleep(0.1)
        assert spent_in(path) == 1.0

    simulate(main())
    spend(spend_log)
    assert spend_log.flush()
    assert spent_in(path) == 2.0
