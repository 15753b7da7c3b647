"""Three hundred surges with faults, each drawn from its seed: promises 1 and 2 of the design hold in all."""

from __future__ import annotations

import logging

import pytest
from tests.sim import surge


@pytest.mark.parametrize("seed", surge.SEEDS)
def test_every_task_of_a_surge_ends_once_and_no_limit_is_passed(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    try:
        surge.run(seed)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.sim.surge {seed}")
        raise


def test_the_surges_are_not_too_kind() -> None:
    """What the promises are about must happen: else three hundred seeds prove nothing."""
    seen: set[str] = set()
    for seed in range(40):
        statistics = surge.run(seed).house.statistics()
        seen |= {name for name in surge.HAPPENINGS if getattr(statistics, name)}
    assert seen == set(surge.HAPPENINGS)


def test_one_seed_gives_one_run() -> None:
    first, second = surge.run(7), surge.run(7)
    assert first.house.statistics() == second.house.statistics()
    assert first.books.endings == second.books.endings
    assert list(first.books.endings) == list(second.books.endings)
