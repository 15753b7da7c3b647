"""Three hundred random surges with faults: every task ends once, and no limit is exceeded."""

from __future__ import annotations

import functools
import uuid
from collections import Counter

import pytest
from tests.simulation import surge
from tests.simulation.surge_script import ENDS
from tests.support.redis_servers import redis_server, shared

pytestmark = pytest.mark.blocks  # in virtual time SQLite runs in the loop's own thread


@functools.cache  # the last test asks for some again
def happened(seed: int) -> Counter[str]:
    """Return what happened in the surge of one seed."""
    try:
        return surge.run(seed).happened
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.surge {seed}")
        raise


@pytest.mark.parametrize("seed", surge.SEEDS)
def test_every_task_of_a_surge_ends_once_and_no_limit_is_exceeded(seed: int) -> None:
    happened(seed)


@pytest.mark.parametrize(
    "seed",
    [
        seed if seed < 15 else pytest.param(seed, marks=pytest.mark.slow)
        for seed in range(150)
        if surge.has_durable_store(seed)
    ],
)
def test_every_task_of_a_surge_on_redis_ends_once(seed: int) -> None:
    surge.run(seed, f"{shared(redis_server).url}?name=surge-{uuid.uuid4().hex}")


def test_the_surges_cover_all_outcomes() -> None:
    """Otherwise three hundred seeds would prove nothing."""
    seen: set[str] = set()
    for seed in range(40):
        seen |= set(+happened(seed))
    assert seen >= {*surge.COUNTED, *ENDS, "still spilled"}


@pytest.mark.parametrize("seed", [7, 21])
def test_one_seed_gives_one_run(seed: int) -> None:
    first, second = surge.run(seed), surge.run(seed)
    assert first.happened == second.happened
    for one, other in zip(first.processes, second.processes, strict=True):
        assert one.supervisor.statistics() == other.supervisor.statistics()
        assert list(one.record.statuses.values()) == list(other.record.statuses.values())
