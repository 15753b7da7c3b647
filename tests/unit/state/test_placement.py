"""Placement by rendezvous hashing: even, by weight, and few keys move."""

from __future__ import annotations

from collections import Counter

import pytest

from forebay.state.placement import Placement

KEYS = [f"key {number}".encode() for number in range(30_000)]
NAMES = [f"redis://10.0.0.{number}:6379/0?name=forebay" for number in range(8)]


def placed(weights: dict[str, float]) -> dict[bytes, str]:
    placement = Placement(weights)
    return {key: placement.shard_of(key) for key in KEYS}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_keys_are_even_over_shards_within_a_tenth(count: int) -> None:
    counts = Counter(placed(dict.fromkeys(NAMES[:count], 1.0)).values())
    assert len(counts) == count
    for each in counts.values():
        assert each == pytest.approx(len(KEYS) / count, rel=0.1)


def test_weights_are_shares() -> None:
    counts = Counter(placed({NAMES[0]: 1.0, NAMES[1]: 2.0, NAMES[2]: 0.5}).values())
    for name, weight in ((NAMES[0], 1.0), (NAMES[1], 2.0), (NAMES[2], 0.5)):
        assert counts[name] == pytest.approx(len(KEYS) * weight / 3.5, rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_shard_that_is_added_takes_its_share_and_nothing_else_moves(count: int) -> None:
    before = placed(dict.fromkeys(NAMES[:count], 1.0))
    after = placed(dict.fromkeys(NAMES[: count + 1], 1.0))
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {NAMES[count]}
    assert len(moved) == pytest.approx(len(KEYS) / (count + 1), rel=0.1)


def test_the_order_of_shards_is_free() -> None:
    assert placed(dict.fromkeys(NAMES[:3], 1.0)) == placed(dict.fromkeys(reversed(NAMES[:3]), 1.0))
