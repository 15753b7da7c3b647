"""The storms find the bugs that they are said to find, each injected into a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest
from tests.mutation.test_injected_bugs import SLIPS
from tests.simulation import found_by_storms
from tests.simulation.found_by_storms import FOUND, Bug

SAMPLE = {storm: bug for bug, (storm, _) in reversed(FOUND.items())}.values()  # the first of each storm
pytestmark = pytest.mark.blocks  # in virtual time SQLite runs in the loop's own thread


@pytest.fixture(scope="module")
def forks() -> Iterator[Executor]:
    """Yield an executor that runs each call in a new process, forked from one that has imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([found_by_storms.__name__])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as executor:
        yield executor


@pytest.mark.parametrize(
    "bug",
    [bug if bug in SAMPLE else pytest.param(bug, marks=pytest.mark.slow) for bug in FOUND],
    ids=lambda bug: bug.__name__,
)
def test_a_storm_finds_an_injected_bug(forks: Executor, bug: Bug) -> None:
    found = forks.submit(found_by_storms.find, bug).result()
    assert not found.startswith(("nothing", *SLIPS)), found


@pytest.mark.slow
@pytest.mark.parametrize(("storm", "seed"), sorted(set(FOUND.values()), key=str))
def test_without_a_bug_these_storms_pass(storm: object, seed: int) -> None:
    storm.run(seed)  # type: ignore[attr-defined]
