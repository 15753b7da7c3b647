"""What fails in the background is logged: a store that is away in one line, now and then."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.task_plane import virtual

from forebay.errors import StoreUnavailable
from forebay.supervisor.failure_log import FailureLog

AWAY = StoreUnavailable(where="the store", why="it is away", advice="Start it.")


@virtual
async def test_a_store_that_is_away_is_logged_in_one_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    failures = FailureLog()
    for number in range(25):
        failures.report("task %r failed", number, error=AWAY)
        failures.report("leases could not be renewed", error=AWAY)
        await asyncio.sleep(1.0)
    assert [record.getMessage() for record in caplog.records] == [
        f"task 0 failed: {AWAY}",
        f"leases could not be renewed: {AWAY}",
        f"task 10 failed: {AWAY} (9 more were not logged)",
        f"leases could not be renewed: {AWAY} (9 more were not logged)",
        f"task 20 failed: {AWAY} (9 more were not logged)",
        f"leases could not be renewed: {AWAY} (9 more were not logged)",
    ]
    assert all(record.exc_info is None for record in caplog.records)


@virtual
async def test_any_other_failure_is_logged_each_time_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    failures, error = FailureLog(), ValueError("a bug")
    for number in range(3):
        failures.report("task %r failed", number, error=error)
    assert [record.getMessage() for record in caplog.records] == [f"task {number} failed" for number in range(3)]
    assert all(record.exc_info and record.exc_info[1] is error for record in caplog.records)
