"""The picture can be drawn of any result."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.picture import draw
from demo.report import SideRun, report
from demo.sample import Sample, Side
from demo.settings import Settings
from demo.side_process import Ending
from demo.stored_tasks import StoredTasks

PNG = b"\x89PNG\r\n\x1a\n"
SETTINGS = Settings(tasks=100, seconds=30.0)


def played(*, done: int, ending: Ending = Ending.TIME_UP, stored: StoredTasks | None = None) -> SideRun:
    seconds = range(30)
    samples = [Sample(t=float(t), stage="surge", done=done * t, waiting=90, spilled=5, usd=0.1 * t) for t in seconds]
    memory = [(float(t), 100.0 + t) for t in seconds]
    return SideRun(
        samples=tuple(samples),
        latencies=(),
        memory=tuple(memory),
        peak_rss_mb=130.0,
        ending=ending,
        ended_at=30.0,
        stored=stored,
    )


EMPTY = SideRun(samples=(), latencies=(), memory=(), peak_rss_mb=70.0, ending=Ending.OUT_OF_MEMORY, ended_at=0.0)


@pytest.mark.parametrize(
    "classic",
    [played(done=1), played(done=0), played(done=1, ending=Ending.OUT_OF_MEMORY), EMPTY],
    ids=["survived", "did nothing", "killed", "killed at once"],
)
@pytest.mark.parametrize(
    "forebay", [played(done=2, stored=StoredTasks(waiting=42, done=58)), EMPTY], ids=["usual", "nothing"]
)
@pytest.mark.blocks
def test_it_is_a_png_for_any_result(tmp_path: Path, classic: SideRun, forebay: SideRun) -> None:
    path = tmp_path / "surge.png"
    runs = {Side.CLASSIC: classic, Side.SEMAPHORE: classic, Side.FOREBAY: forebay}
    draw(runs, report(runs, SETTINGS, "simulated"), SETTINGS, path)
    assert path.read_bytes().startswith(PNG)
