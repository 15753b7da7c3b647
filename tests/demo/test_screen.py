"""What is seen: the live table fits a small terminal, and a log gets a line now and then."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from rich.console import Console
from tests.demo.test_report import classic, forebay

from demo.child import Child, Ending
from demo.report import report
from demo.sample import Kind, Sample
from demo.screen import PlainScreen, board, clock, spark
from demo.settings import Settings
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
    binding="upstream:key:875cc6fc",
    scarce="requests per minute",
    queued=12,
    input_tokens=700_000,
    output_tokens=300_000,
    useful_tokens=960_000,
)


def side(kind: Kind, sample: Sample | None = BUSY, ending: Ending | None = None) -> Child:
    samples = [] if sample is None else [Sample(t=float(t), stage="surge", done=2 * t) for t in range(59)] + [sample]
    seen: dict[str, Any] = {"kind": kind, "samples": samples, "last": sample, "ending": ending, "seconds": 61.0}
    return cast("Child", SimpleNamespace(**seen, memory=[(1.0, 140.0)]))


def drawn(renderable: Any, *, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30)])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_table_fits_the_terminal(*, width: int, height: int, resumed: bool) -> None:
    sides = [side(Kind.RESUME)] if resumed else [side(Kind.CLASSIC, ending=Ending.OUT_OF_MEMORY), side(Kind.FOREBAY)]
    lines = drawn(board(sides, Settings(), "one simulated key", resumed=resumed), width=width, height=height)
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width
    assert "…" not in "".join(lines)


@pytest.mark.parametrize("sides", [[], [side(Kind.CLASSIC, None)], [side(Kind.CLASSIC)]])
def test_there_is_something_to_see_from_the_beginning(sides: list[Child]) -> None:
    text = "\n".join(drawn(board(sides, Settings(), "a key", resumed=False), width=80, height=24))
    assert "waits for its turn" in text


def test_it_shows_what_binds_and_what_waits_where() -> None:
    text = "\n".join(drawn(board([side(Kind.FOREBAY)], Settings(), "a key", resumed=False), width=100, height=30))
    for words in (
        "upstream:key:875cc6fc",
        "100 in memory, 9,850 on disk",
        "12 calls wait",
        "requests per minute",
        "78,901 with 429",
        "4.0 %",
        "68x least",
    ):
        assert words in text


def test_money_is_told_as_long_as_a_column_is_wide() -> None:
    for usd, done, text in ((3.2, 364, "$3.20  $0.0088/task  1.03x least"), (1234.5, 1234, "$1234  $1.0004/task")):
        now = msgspec.structs.replace(BUSY, usd=usd, done=done, useful_usd=3.1)
        table = board([side(Kind.FOREBAY, now)], Settings(), "a key", resumed=False)
        assert text in "\n".join(drawn(table, width=80, height=24))


def test_workers_that_have_failed_are_told_of() -> None:
    broken = msgspec.structs.replace(BUSY, workers={"busy": 9, "failed": 1})
    text = "\n".join(
        drawn(board([side(Kind.FOREBAY, broken)], Settings(), "a key", resumed=False), width=80, height=24)
    )
    assert "0  1 worker FAILED" in text


def test_a_name_is_no_picture() -> None:
    out = io.StringIO()
    PlainScreen(Console(file=out, width=300)).show([side(Kind.FOREBAY)])
    assert "(upstream:key:875cc6fc)" in out.getvalue()


def test_a_log_gets_the_first_line_and_the_last_and_no_more_in_between() -> None:
    out = io.StringIO()
    with PlainScreen(Console(file=out, width=80)) as screen:
        for _ in range(5):
            screen.show([side(Kind.CLASSIC)])
        for _ in range(2):
            screen.show([side(Kind.CLASSIC, ending=Ending.TIME_UP)])
        screen.show([side(Kind.CLASSIC, ending=Ending.TIME_UP), side(Kind.FOREBAY)])
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["classic", "classic", "forebay"]
    assert lines[1].endswith("time is up")


def test_nothing_is_said_before_there_is_something_to_say() -> None:
    out = io.StringIO()
    PlainScreen(Console(file=out)).show([side(Kind.CLASSIC, None)])
    assert out.getvalue() == ""


def test_the_summary_tells_both_sides_and_the_verdict() -> None:
    found = report(classic(), forebay(), Settings(tasks=1000, seconds=60.0), "plant")
    text = " ".join(" ".join(drawn(summary(found), width=80, height=60)).split())
    assert "Forebay 10 times as many" in text
    assert "kept on disk 0 800" in text
    assert "over the least it needs 20.00 x 1.05 x" in text
    assert "refused with 429 4,000 (80 %) 7 (1.0 %)" in text
    assert "what bound it cannot tell upstream:key short of - requests per minute" in text
    found = msgspec.structs.replace(found, forebay=msgspec.structs.replace(found.forebay, binding="upstream:key:1a2b"))
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
