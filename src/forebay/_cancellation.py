"""Cancellation, as seen by the task that is cancelled."""

from __future__ import annotations

import asyncio


def is_being_cancelled() -> bool:
    """Return whether somebody has cancelled the running task; else a CancelledError is the error of what it called."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def raise_own_cancellation(error: BaseException) -> None:
    """Raise `error` again if it is the cancellation of the running task, for loops that outlive any other one."""
    if isinstance(error, asyncio.CancelledError) and is_being_cancelled():
        raise error
