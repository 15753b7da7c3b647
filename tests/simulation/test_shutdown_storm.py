"""Shutdown storms: a supervisor with a backlog drains and closes in time, and loses nothing that it could move."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.simulation import shutdown_storm

pytestmark = pytest.mark.blocks


@pytest.mark.parametrize("first", [0, 25, 50, *(pytest.param(n, marks=pytest.mark.slow) for n in range(75, 500, 25))])
def test_a_supervisor_with_a_backlog_ends_as_promised(first: int) -> None:
    for seed in range(first, first + 25):
        try:
            shutdown_storm.run(seed)
        except BaseException as failure:
            failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.shutdown_storm {seed}")
            raise


def test_the_storms_move_a_backlog_in_every_way() -> None:
    """Otherwise they would prove nothing."""
    happened = sum((shutdown_storm.run(seed).happened for seed in range(25)), Counter[str]())
    assert {"drain", "close", "fail", "moved", "run by the successor"} <= set(happened)
    assert happened["moved"] > 100
    assert happened["run by the successor"] > 1_000
