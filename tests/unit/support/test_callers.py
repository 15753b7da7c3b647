"""A test that waits for callers ends with what is wrong with them."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.callers import Accepted, running


async def test_a_caller_that_fails_ends_the_wait_with_its_error() -> None:
    async def fail() -> None:
        raise ValueError("a bug")

    with pytest.raises(ExceptionGroup) as raised:
        async with running(fail(), asyncio.Event().wait()):
            await Accepted().more(1)
    assert [str(error) for error in raised.value.exceptions] == ["a bug"]


async def test_callers_end_with_the_block() -> None:
    accepted, ended = Accepted(), asyncio.Event()

    async def call() -> None:
        try:
            for number in range(3):
                accepted.add(f"{number}")
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with running(call()):
        await accepted.more(3)
    assert ended.is_set()
    assert accepted.ids == ["0", "1", "2"]


async def test_callers_that_are_rejected_end_the_wait_with_the_reason() -> None:
    accepted = Accepted()
    accepted.add("before")

    async def call() -> None:
        accepted.add("after")
        accepted.reject(ValueError("too few replicas"))
        await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as raised:
        async with running(call()):
            await accepted.more(2, within=0.01)
    [error] = raised.value.exceptions
    assert str(error) == "1 of 2 were accepted within 0 s; the last error: ValueError('too few replicas')"
