"""Blocks that the gateway ends at once when it is stopped."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from forebay.gateway.abortable_block import AbortableBlock


async def waiting(blocks: set[AbortableBlock], *, aborted: bool = False) -> str:
    """Wait in a block until it is ended; return how it was."""
    try:
        with AbortableBlock(blocks, aborted=aborted):
            await asyncio.Event().wait()
    except TimeoutError:
        return "aborted"
    return "ended"


async def started(blocks: set[AbortableBlock]) -> asyncio.Task[str]:
    task = asyncio.create_task(waiting(blocks))
    await asyncio.sleep(0)
    return task


async def test_a_block_ends_with_a_timeout_error_when_it_is_aborted() -> None:
    blocks: set[AbortableBlock] = set()
    task = await started(blocks)
    for block in blocks:
        block.abort()
        block.abort()  # once is enough
    assert await task == "aborted"
    assert not blocks


async def test_a_block_of_a_gateway_that_was_aborted_ends_at_its_first_wait() -> None:
    assert await waiting(set(), aborted=True) == "aborted"


async def test_a_caller_who_leaves_while_its_block_is_aborted_is_cancelled() -> None:
    blocks: set[AbortableBlock] = set()
    task = await started(blocks)
    task.cancel()
    for block in blocks:
        block.abort()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_abort_after_its_end_cancels_nothing() -> None:
    blocks: set[AbortableBlock] = set()
    with AbortableBlock(blocks, aborted=False) as block:
        pass
    current = asyncio.current_task()
    assert current is not None
    block.abort()
    requested = current.cancelling()
    while current.cancelling():
        current.uncancel()  # for the test to end by its assertion
    assert (requested, blocks) == (0, set())


async def test_an_error_passes_and_leaves_no_cancellation_behind() -> None:
    blocks: set[AbortableBlock] = set()
    task = asyncio.create_task(failing_when_aborted(blocks))
    await asyncio.sleep(0)
    for block in blocks:
        block.abort()
    assert await task == 0


async def failing_when_aborted(blocks: set[AbortableBlock]) -> int:
    """Raise another error in a block that is aborted; return how many cancellations of the task are left."""
    with contextlib.suppress(ValueError), AbortableBlock(blocks, aborted=False):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError from None
    current = asyncio.current_task()
    assert current is not None
    return current.cancelling()
