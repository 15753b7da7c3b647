"""Calls whose own caller holds a permit of the same account: they go first, and none waits for itself."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest
from tests.unit.upstream.httpx_binding.wire import NOTHING, REQUEST, URL, Reply, Script, left

from forebay import Overloaded, Upstream
from forebay.testing import now, run_ready, virtual
from forebay.upstream.accounts.nested_calls import begin_hold, end_hold, find_holder


@virtual
async def test_guarded_functions_that_call_a_client_of_the_same_upstream_all_end() -> None:
    llm = Upstream("llm", provider="openai", max_concurrent=5)
    client = Script(httpx, Reply(pause=0.5)).client(llm)

    @llm.guard
    async def ask() -> int:
        response = await client.post(URL, json=REQUEST)
        return int(response.status_code)

    assert await asyncio.gather(*(ask() for _ in range(20))) == [200] * 20
    assert now() <= 5.1
    assert left(llm) == NOTHING


@virtual
async def test_a_call_that_waits_for_the_slot_of_its_own_caller_is_rejected_at_once() -> None:
    llm = Upstream("llm", max_concurrent=1)
    async with llm.call():
        with pytest.raises(Overloaded, match="a slot that its own caller holds") as raised:
            async with llm.call():
                pass
    assert raised.value.limited_by == "upstream:llm:concurrency"
    assert now() <= 1.1
    async with llm.call():  # the account goes on
        pass
    assert left(llm) == NOTHING


@virtual
async def test_a_nested_call_waits_for_the_slots_of_others() -> None:
    llm = Upstream("llm", max_concurrent=2)

    async def other() -> None:
        async with llm.call():
            await asyncio.sleep(30.0)

    holder = asyncio.create_task(other())
    await run_ready()
    async with llm.call(), llm.call():
        assert now() == pytest.approx(30.0, abs=0.1)
    await holder


@virtual
async def test_a_task_that_is_started_within_a_block_waits_for_its_end() -> None:
    llm = Upstream("llm", max_concurrent=1)

    async def later() -> float:
        async with llm.call():
            return now()

    async with llm.call():
        task = asyncio.create_task(later())  # it has a copy of the context, and does not keep the block from ending
        await asyncio.sleep(10.0)
    assert await task == pytest.approx(10.0, abs=0.1)


def test_a_permit_is_held_by_the_thread_that_took_it_until_it_ends() -> None:
    llm = Upstream("llm")
    shared = llm.core.accounts.account("")
    with llm.call():
        holder = find_holder(shared.account)
        assert holder is not None
        found = [holder]
        thread = threading.Thread(target=lambda: found.append(find_holder(shared.account)))  # type: ignore[arg-type]
        thread.start()
        thread.join()
        assert found == [holder, None]
        assert find_holder(object()) is None
    assert find_holder(shared.account) is None
    begin_hold(holder)  # it is closed
    assert find_holder(shared.account) is None
    end_hold(holder)
