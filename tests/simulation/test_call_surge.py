"""A hundred random surges with faults on a supervisor and an upstream: the invariants hold in all of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import pytest
from tests.simulation import call_surge
from tests.simulation.call_surge import GoodputPlateau

T = TypeVar("T")


def run(check: Callable[[int], T], seed: int) -> T:
    try:
        return check(seed)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.call_surge {seed}")
        raise


@functools.cache  # the test of what they cover asks for some again
def happened(seed: int) -> Counter[str]:
    """Return what happened in the surge of one seed."""
    return run(call_surge.run, seed).happened


@pytest.mark.parametrize("seed", call_surge.SEEDS)
def test_every_task_ends_once_no_limit_is_exceeded_and_nothing_stays_reserved(seed: int) -> None:
    happened(seed)


@pytest.mark.parametrize("seed", call_surge.PLATEAUS)
def test_goodput_under_a_flood_is_that_of_the_key_and_recovers(seed: int) -> None:
    run(lambda number: GoodputPlateau(number).check(), seed)


@pytest.mark.parametrize("seed", range(10))
def test_without_limits_the_same_supervisor_collapses(seed: int) -> None:
    """The negative control: a key that cannot be overloaded would prove nothing."""
    plateau = GoodputPlateau(seed)
    assert plateau.goodput_share(plateau.fleet(plateau.load_factor, unlimited=True), call_surge.WARM_UP) < 0.1


def test_the_surges_cover_all_outcomes() -> None:
    """Otherwise a hundred seeds would prove nothing."""
    seen: set[str] = set()
    for seed in range(40):
        seen |= set(+happened(seed))
    assert seen >= {*call_surge.COUNTED, *call_surge.CALL_ENDS}


@pytest.mark.parametrize("seed", [3, 21])
def test_one_seed_gives_one_run(seed: int) -> None:
    first, second = call_surge.run(seed), call_surge.run(seed)
    assert first.happened == second.happened
    assert first.spent == second.spent
    assert [ticket.status for ticket in first.tickets] == [ticket.status for ticket in second.tickets]
