"""Storms on the task plane: no cancellation, kill or stop breaks what is promised of conversations and nested tasks."""

from __future__ import annotations

import functools
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.mutation import bugs
from tests.simulation import fair_share, task_storm
from tests.support.redis_servers import redis_server, shared

pytestmark = pytest.mark.blocks  # in virtual time SQLite runs in the loop's own thread

ROOT = Path(__file__).parents[2]


@functools.cache  # the test of what they cover asks for some again
def happened(seed: int) -> Counter[str]:
    """Return what happened in the storm of one seed."""
    try:
        return task_storm.run(seed).happened
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.task_storm {seed}")
        raise


@pytest.mark.parametrize(
    "seed", [seed if seed < 30 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(200)]
)
def test_no_cancellation_kill_or_stop_of_a_storm_breaks_a_promise(seed: int) -> None:
    happened(seed)


ON_REDIS = [seed for seed in range(150) if task_storm.has_durable_store(seed)]


@pytest.mark.parametrize(
    "seed", [seed if seed < 20 else pytest.param(seed, marks=pytest.mark.slow) for seed in ON_REDIS]
)
def test_a_storm_breaks_no_promise_on_redis(seed: int) -> None:
    url = f"{shared(redis_server).url}?name=storm-{uuid.uuid4().hex}"
    try:
        task_storm.run(seed, url)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.task_storm --redis {seed}")
        raise


@pytest.mark.parametrize(
    "seed", [seed if seed < 15 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(60)]
)
def test_busy_conversations_and_nested_tasks_starve_nobody(seed: int) -> None:
    fair_share.run(seed)


def test_the_storms_cover_all_faults() -> None:
    """Otherwise they would prove nothing."""
    seen = sum(map(happened, range(50)), Counter[str]())
    assert {
        "admitted", "spilled", "rejected", "crash", "drain within", "close", "fail", "clock step", "file lost",
        "looked up", "keyed", "moved by a drain", "life ends", "start fails", "start hangs", "worker restarted",
        "worker given up", "revived", "unregister", "registered again", "pause", "cut", "calmed down", "hook: raise",
        "hook: submit", "hook: cancel", "hook: drain",
    } <= set(seen)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)  # it is 40 seconds on two cores that have nothing else to do
@pytest.mark.parametrize(
    "bug",
    [bugs.an_orderly_stop_counts_as_a_crash, bugs.a_cancelled_await_goes_on_without_its_slot],
    ids=lambda bug: bug.__name__,
)
def test_the_explorer_finds_an_injected_bug(bug: Callable[[], None]) -> None:
    command = [sys.executable, "-m", "tests.simulation.explore", "--inject", bug.__name__, "--storms", "0:200"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 1, outcome.stdout
    assert f"--inject {bug.__name__}" in outcome.stdout, outcome.stdout
