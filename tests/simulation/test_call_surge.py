"""Supervisor and upstream on one key with faults, a hundred houses drawn from seeds: promises 1 to 3 hold in all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.simulation import call_surge
from tests.simulation.call_surge import GoodputPlateau


def kept(proof: Callable[[int], object], seed: int) -> None:
    try:
        proof(seed)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.call_surge {seed}")
        raise


@pytest.mark.parametrize("seed", call_surge.SEEDS)
def test_every_task_ends_once_no_limit_is_passed_and_nothing_stays_reserved(seed: int) -> None:
    kept(call_surge.run, seed)


@pytest.mark.parametrize("seed", call_surge.PLATEAUS)
def test_a_flood_gets_what_the_key_bears_and_service_recovers_by_itself(seed: int) -> None:
    kept(lambda number: GoodputPlateau(number).check(), seed)


@pytest.mark.parametrize("seed", range(10))
def test_with_nothing_limited_the_same_house_collapses(seed: int) -> None:
    """The negative control: a key that bears anything would prove nothing."""
    plateau = GoodputPlateau(seed)
    assert plateau.goodput_share(plateau.fleet(plateau.load_factor, wild=True), call_surge.WARM_UP) < 0.1


def test_the_surges_are_not_too_kind() -> None:
    """What the promises are about must happen: else a hundred seeds prove nothing."""
    seen: set[str] = set()
    for seed in range(40):
        seen |= set(+call_surge.run(seed).happened)
    assert seen >= {*call_surge.COUNTED, *call_surge.CALL_ENDS}


@pytest.mark.parametrize("seed", [3, 21])
def test_one_seed_gives_one_run(seed: int) -> None:
    first, second = call_surge.run(seed), call_surge.run(seed)
    assert first.happened == second.happened
    assert first.spent == second.spent
    assert [ticket.status for ticket in first.tickets] == [ticket.status for ticket in second.tickets]
