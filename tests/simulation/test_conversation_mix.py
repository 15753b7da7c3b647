"""Sixty random mixes of conversations, nested tasks, cancellations and deadlines: nothing hangs, and order holds."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.simulation import conversation_mix

pytestmark = pytest.mark.blocks  # in virtual time SQLite runs in the loop's own thread


@pytest.mark.parametrize("seed", range(60))
def test_nothing_hangs_and_each_conversation_keeps_its_order(seed: int) -> None:
    conversation_mix.run(seed)


def test_the_mixes_cover_all_outcomes() -> None:
    """Otherwise they would prove nothing."""
    seen: Counter[str] = sum((conversation_mix.run(seed).happened for seed in range(12)), Counter())
    assert {"succeeded", "cancelled", "expired", "rejected", "nested: NoneType", "nested: Overloaded"} <= set(seen)
