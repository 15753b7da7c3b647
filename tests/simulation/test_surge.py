"""Three hundred surges with faults, each drawn from its seed: promises 1 and 2 of the design hold in all."""

from __future__ import annotations

import pytest
from tests.simulation import surge
from tests.simulation.surge_script import ENDS

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


@pytest.mark.parametrize("seed", surge.SEEDS)
def test_every_task_of_a_surge_ends_once_and_no_limit_is_passed(seed: int) -> None:
    try:
        surge.run(seed)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.surge {seed}")
        raise


def test_the_surges_are_not_too_kind() -> None:
    """What the promises are about must happen: else three hundred seeds prove nothing."""
    seen: set[str] = set()
    for seed in range(40):
        seen |= set(+surge.run(seed).happened)
    assert seen >= {*surge.COUNTED, *ENDS, "still spilled"}


@pytest.mark.parametrize("seed", [7, 21])
def test_one_seed_gives_one_run(seed: int) -> None:
    first, second = surge.run(seed), surge.run(seed)
    assert first.happened == second.happened
    for one, other in zip(first.processes, second.processes, strict=True):
        assert one.supervisor.statistics() == other.supervisor.statistics()
        assert list(one.record.statuses.values()) == list(other.record.statuses.values())
