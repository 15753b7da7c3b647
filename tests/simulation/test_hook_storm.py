"""Storms of hooks that raise anything and call the supervisor back: no slot, ticket or limit suffers."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.simulation import hook_storm

pytestmark = pytest.mark.blocks  # in virtual time SQLite runs in the loop's own thread


@pytest.mark.parametrize("seed", range(40))
def test_no_hook_of_a_storm_costs_a_slot_a_ticket_or_the_limit(seed: int) -> None:
    try:
        hook_storm.run(seed)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.hook_storm {seed} {seed + 1}")
        raise


def test_the_storms_cover_all_actions() -> None:
    """Otherwise forty seeds would prove nothing."""
    happened = sum((hook_storm.run(seed).happened for seed in range(20)), Counter[str]())
    assert {"_raise", "_submit", "_cancel", "_revive", "_drain", "_close"} <= set(happened)
    assert happened.total() > 500
