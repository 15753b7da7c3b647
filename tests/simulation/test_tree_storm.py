"""Tree storms: random supervision trees do what a simple model of OTP's semantics does, and lose no task."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.simulation import tree_storm


@pytest.mark.parametrize(
    "first", [*range(0, 400, 50), *(pytest.param(n, marks=pytest.mark.slow) for n in range(400, 2000, 50))]
)
def test_a_supervision_tree_does_what_its_model_does(first: int) -> None:
    for seed in range(first, first + 50):
        try:
            tree_storm.run(seed)
        except BaseException as failure:
            failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.tree_storm {seed}")
            raise


def test_the_storms_restart_and_fail_in_every_way() -> None:
    """Otherwise they would prove nothing."""
    happened = sum((tree_storm.run(seed).happened for seed in range(100)), Counter[str]())
    assert {"life ended: normal", "life ended: shutdown", "life ended: abnormal", "modelled", "wild"} <= set(happened)
    assert happened["restarts"] > 500
    assert happened["gave up"] > 20
    assert happened["failed for good"] > 200
    assert min(happened["succeeded"], happened["failed"], happened["rejected"]) > 200
