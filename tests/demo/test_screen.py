"""The live table fits a small terminal, and a log gets a line every ten seconds."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from rich.console import Console
from tests.demo.test_report import classic, compared, forebay

from demo.sample import SIDES, Sample, Side
from demo.screen import PlainScreen, board, clock, spark
from demo.settings import Settings
from demo.side_process import Ending, SideProcess
from demo.table import summary

BUSY = Sample(
    t=59.0,
    stage="surge",
    submitted=10_000,
    running=50,
    waiting=100,
    spilled=9_850,
    done=1_234,
    done_by=(200, 1000, 30, 4),
    calls=123_456,
    calls_429=78_901,
    answered=44_000,
    usd=1_234.5,
    useful_usd=18.2,
    load=1.0,
    limited_by="upstream:key:875cc6fc",
    waiting_for="requests per minute",
    queued=12,
    input_tokens=700_000,
    output_tokens=300_000,
    useful_tokens=960_000,
)


def process(side: Side, sample: Sample | None = BUSY, ending: Ending | None = None) -> SideProcess:
    samples = [] if sample is None else [Sample(t=float(t), stage="surge", done=2 * t) for t in range(59)] + [sample]
    seen: dict[str, Any] = {"side": side, "samples": samples, "last": sample, "ending": ending, "seconds": 61.0}
    return cast("SideProcess", SimpleNamespace(**seen, memory=[(1.0, 140.0)]))


def drawn(renderable: Any, *, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (120, 30)])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_table_fits_the_terminal(*, width: int, height: int, resumed: bool) -> None:
    ended = [process(Side.CLASSIC, ending=Ending.OUT_OF_MEMORY), process(Side.SEMAPHORE, ending=Ending.TIME_UP)]
    sides = [process(Side.RESUME)] if resumed else [*ended, process(Side.FOREBAY)]
    table = board(sides, Settings(), "one simulated key", resumed=resumed, width=width)
    lines = drawn(table, width=width, height=height)
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width
    assert "…" not in "".join(lines)


@pytest.mark.parametrize(
    ("width", "started", "shown"),
    [
        (80, 0, ["classic", "semaphores"]),
        (80, 2, ["classic", "semaphores"]),
        (80, 3, ["semaphores", "Forebay"]),
        (120, 1, ["classic", "semaphores", "Forebay"]),
    ],
)
def test_a_narrow_terminal_shows_the_latest_two_sides(width: int, started: int, shown: list[str]) -> None:
    sides = [process(side) for side in SIDES[:started]]
    head = drawn(board(sides, Settings(), "a key", resumed=False, width=width), width=width, height=30)[3]
    assert head.split() == shown


@pytest.mark.parametrize("sides", [[], [process(Side.CLASSIC, None)], [process(Side.CLASSIC)]])
def test_the_table_can_be_drawn_from_the_beginning(sides: list[SideProcess]) -> None:
    text = "\n".join(drawn(board(sides, Settings(), "a key", resumed=False), width=80, height=24))
    assert "not started" in text


def test_it_shows_the_limit_and_where_tasks_wait() -> None:
    text = "\n".join(drawn(board([process(Side.FOREBAY)], Settings(), "a key", resumed=False), width=100, height=30))
    for words in (
        "upstream:key:875cc6fc",
        "100 in memory, 9,850 spilled",
        "12 calls wait",
        "requests per minute",
        "78,901 with 429",
        "4.0 %",
        "68x least",
    ):
        assert words in text


def test_dollars_fit_into_a_column() -> None:
    for usd, done, text in ((3.2, 364, "$3.20  $0.0088/task  1.03x least"), (1234.5, 1234, "$1234  $1.0004/task")):
        now = msgspec.structs.replace(BUSY, usd=usd, done=done, useful_usd=3.1)
        table = board([process(Side.FOREBAY, now)], Settings(), "a key", resumed=False)
        assert text in "\n".join(drawn(table, width=80, height=24))


def test_failed_workers_are_shown() -> None:
    broken = msgspec.structs.replace(BUSY, workers={"busy": 9, "failed": 1})
    text = "\n".join(
        drawn(board([process(Side.FOREBAY, broken)], Settings(), "a key", resumed=False), width=80, height=24)
    )
    assert "0  1 worker FAILED" in text


def test_a_name_is_not_an_emoji() -> None:
    out = io.StringIO()
    PlainScreen(Console(file=out, width=300)).show([process(Side.FOREBAY)])
    assert "(upstream:key:875cc6fc)" in out.getvalue()


def test_a_log_gets_the_first_line_and_the_last_and_no_more_in_between() -> None:
    out = io.StringIO()
    with PlainScreen(Console(file=out, width=80)) as screen:
        for _ in range(5):
            screen.show([process(Side.CLASSIC)])
        for _ in range(2):
            screen.show([process(Side.CLASSIC, ending=Ending.TIME_UP)])
        screen.show([process(Side.CLASSIC, ending=Ending.TIME_UP), process(Side.FOREBAY)])
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["classic", "classic", "forebay"]
    assert lines[1].endswith("time is up")


def test_nothing_is_printed_before_the_first_sample() -> None:
    out = io.StringIO()
    PlainScreen(Console(file=out)).show([process(Side.CLASSIC, None)])
    assert out.getvalue() == ""


def test_the_summary_has_all_sides_and_the_verdict() -> None:
    found = compared(classic(), forebay())
    text = " ".join(" ".join(drawn(summary(found), width=80, height=60)).split())
    assert "Forebay 10 times as many" in text
    assert "kept in overflow 0 0 800" in text
    assert "over the least 20.00 x 1.40 x 1.05 x" in text
    assert "refused with 429 4,000 (80 %) 600 (60 %) 7 (1.0 %)" in text
    assert "limited by unknown unknown upstream:key short of - - requests per minute" in text
    found = msgspec.structs.replace(
        found, forebay=msgspec.structs.replace(found.forebay, limited_by="upstream:key:1a2b")
    )
    assert "upstream:key:1a2b" in "".join(drawn(summary(found), width=80, height=60))


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0:00"), (59.9, "0:59"), (100.0, "1:40"), (3723.0, "1:02:03")])
def test_a_clock_reads_as_people_write_it(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_spark_shows_the_shape_of_what_was_done() -> None:
    rising = [Sample(t=float(t), stage="surge", done=t * t) for t in range(50)]
    bars = spark(rising)
    assert list(bars) == sorted(bars)
    assert bars[-1] == "█"
    assert spark(rising[:5]) == ""
    assert spark([Sample(t=float(t), stage="surge") for t in range(50)]) == ""
