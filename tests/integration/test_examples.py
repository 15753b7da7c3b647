"""The examples run as they stand, in a folder of their own."""

from __future__ import annotations

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
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / "stuck_agent.py")],
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
