"""The examples run as they stand, in a folder of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.*")), ids=lambda path: path.name)
def test_an_example_is_embedded_in_a_page(example: Path) -> None:
    line = f'--8<-- "examples/{example.name}"'
    assert any(line in page.read_text() for page in (ROOT / "docs").rglob("*.md"))


def test_a_langgraph_agent_is_backpressured_in_twenty_lines(tmp_path: Path) -> None:
    example = EXAMPLES / "langgraph_20_lines.py"
    assert len(example.read_text().splitlines()) <= 20
    ran = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stderr == ""
    assert ran.stdout == "what is known of river 199\n"
    assert (tmp_path / "spill.db").exists()


@pytest.mark.slow
def test_a_stuck_agent_is_killed_and_its_slot_serves_the_next(tmp_path: Path) -> None:
    program = (EXAMPLES / "stuck_agent.py").read_text()
    assert program.count("timeout=3.0,") == 1
    patient = tmp_path / "stuck_agent.py"  # on a busy machine a process may need longer to start, which counts
    patient.write_text(program.replace("timeout=3.0,", "timeout=8.0,"))
    ran = subprocess.run(
        [sys.executable, str(patient)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [
        "'a good text': True",
        "'aaaaaaaaaaaaaaaaaaaa': TaskTimedOut",
        "'another good text': True",
    ]


def test_fifty_agents_share_what_they_find_over_three_shards(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / "fifty_agents_three_shards.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.stderr == ""
    notes, shards = ran.stdout.splitlines()
    assert notes == str({f"notes on {topic}": 10 for topic in ("canals", "lakes", "rivers", "springs", "weirs")})
    assert shards.startswith("memories of agents on each shard: [")
    assert len(list(tmp_path.glob("shard-?.db"))) == 3


SAGA = EXAMPLES / "saga_research_summarize_act.py"
RESEARCH = "research  asks a model about rivers"
SUMMARIZE = "summarize writes rivers-1-summarize.md"
ACT = "act       posts rivers-1-summarize.md"
PUBLISHED = "published published/rivers-1-act.md"


def run_saga(directory: Path, *arguments: str, status: int = 0) -> list[str]:
    """Run the example on sagas, and return the lines that it has printed."""
    ran = subprocess.run(
        [sys.executable, str(SAGA), *arguments], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stderr) == (status, "")
    return ran.stdout.splitlines()


def files(directory: Path) -> dict[str, str]:
    """Return the files that the saga has left, with their contents, and without its log."""
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in directory.rglob("*.md")  # the summary, and what was published
    }


def test_a_saga_that_fails_leaves_nothing(tmp_path: Path) -> None:
    undone = "summarize is undone: removes rivers-1-summarize.md"
    lines = run_saga(tmp_path, "--fail")
    assert lines[:4] == [RESEARCH, SUMMARIZE, ACT, undone]
    assert lines[4].startswith(
        "Saga 'rivers' failed, and all its effects are undone. Step 'act' of saga 'rivers' failed"
    )
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("step", "before", "afterwards"),
    [
        ("summarize", [RESEARCH, SUMMARIZE], [SUMMARIZE, ACT, PUBLISHED]),
        pytest.param("research", [RESEARCH], [RESEARCH, SUMMARIZE, ACT, PUBLISHED], marks=pytest.mark.slow),
        pytest.param("act", [RESEARCH, SUMMARIZE, ACT], [ACT, PUBLISHED], marks=pytest.mark.slow),
    ],
)
def test_a_saga_that_is_killed_goes_on_when_it_is_run_again(
    tmp_path: Path, step: str, before: list[str], afterwards: list[str]
) -> None:
    assert run_saga(tmp_path, "--crash-after", step, status=-signal.SIGKILL) == before
    published = tmp_path / "published" / "rivers-1-act.md"
    assert published.exists() == (step == "act")
    if published.exists():
        published.write_text("done once")  # a request that is done again would replace it
    assert run_saga(tmp_path) == afterwards
    ended = files(tmp_path)
    assert ended.keys() == {"rivers-1-summarize.md", "published/rivers-1-act.md"}
    assert ended["rivers-1-summarize.md"] == "# rivers\n\nThey rise in the hills.\n"
    assert ended["published/rivers-1-act.md"] == ("done once" if step == "act" else ended["rivers-1-summarize.md"])
    assert run_saga(tmp_path) == [PUBLISHED]  # it is done: nothing runs


@pytest.mark.slow
def test_processes_come_and_go_and_none_is_bought_for_a_quota_that_is_short(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / "autoscale.py")],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.stderr == ""
    *_, scaled, money = ran.stdout.splitlines()
    up, down, _ = map(int, re.findall(r"\d+", scaled))
    assert up >= 3
    assert down >= 2
    spent, spared = map(float, re.findall(r"\$(\d+\.\d+)", money))
    assert spent > 0.0
    assert spared > 0.0
    assert (tmp_path / "autoscale.svg").read_text().count("<polyline") == 6
