"""`TaskResult.usage`: the calls, tokens and dollars of a task, however it runs and ends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from tests.support.task_plane import find_result, virtual
from tests.support.task_stores import DURABLE_STORES, StoreBackend
from tests.unit.upstream.httpx_binding.wire import CHAT, REQUEST, URL, Reply, Script

from forebay import BackpressureSupervisor, Budget, CallUsage, Price, Retry, Task, TaskStatus, Upstream
from forebay.events import Event, TaskFinished, TaskRetried
from forebay.interfaces import Completion

PRICES = {"gpt-4o": Price(input=10_000, output=20_000, cached_input=5_000)}  # a cent, and two, a token
DETAILED = {
    "prompt_tokens": 30,
    "completion_tokens": 20,
    "prompt_tokens_details": {"cached_tokens": 10},
    "completion_tokens_details": {"reasoning_tokens": 8},
}


def approx(usd: float) -> Any:
    return pytest.approx(usd)


ONE_CALL = CallUsage(calls=1, input_tokens=30, output_tokens=20, usd=approx(0.7))
ONCE_MORE = Retry(max_attempts=2, base_delay=0.01)


def answer(usage: Any) -> Reply:
    return Reply(body=[json.dumps({**CHAT, "usage": usage}).encode()])


def make_upstream(**settings: Any) -> Upstream:
    return Upstream("llm", provider="openai", prices=PRICES, **settings)


async def ask(client: Any) -> Any:
    return await client.post(URL, json=REQUEST, headers={"authorization": "Bearer sk"})


class Asker:
    """A handler that asks once, and then fails as often as it is told to."""

    def __init__(self, client: Any, *, failures: int = 0) -> None:
        self.client = client
        self.failures = failures

    async def __call__(self, task: Task) -> str:
        await ask(self.client)
        if self.failures:
            self.failures -= 1
            raise ValueError(task.task_id)
        return "done"


async def usage_of(handler: Any, **settings: Any) -> CallUsage:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=handler, task_types=["ask"], **settings)
        return (await supervisor.submit_nowait(Task("ask"))).usage


@virtual
@pytest.mark.parametrize("budget", [None, Budget(usd=100)], ids=["no budget", "budget"])
async def test_a_result_has_the_usage_of_the_tasks_calls(budget: Budget | None) -> None:
    client = Script(httpx2, answer(DETAILED)).client(make_upstream(budget=budget))

    async def handler(_: Task) -> None:
        await ask(client)
        await ask(client)

    usage = await usage_of(handler)
    assert usage == CallUsage(
        calls=2,
        input_tokens=60,
        output_tokens=40,
        cached_input_tokens=20,
        reasoning_tokens=16,
        usd=approx(2 * (0.2 + 0.05 + 0.4)),
    )


@virtual
async def test_a_task_without_calls_has_used_nothing() -> None:
    assert await usage_of(lambda _: asyncio.sleep(0)) == CallUsage()


@virtual
async def test_refused_attempts_use_nothing() -> None:
    upstream = make_upstream(retry=Retry(base_delay=0.001))
    client = Script(httpx2, Reply.error(500), Reply.error(429), Reply()).client(upstream)
    assert await usage_of(Asker(client)) == ONE_CALL


@virtual
async def test_the_usage_of_attempts_that_failed_counts() -> None:
    client = Script(httpx2).client(make_upstream())
    usage = await usage_of(Asker(client, failures=1), retry=ONCE_MORE)
    assert (usage.calls, usage.usd) == (2, approx(1.4))


@virtual
async def test_a_task_that_fails_has_its_usage() -> None:
    client = Script(httpx2).client(make_upstream())
    assert await usage_of(Asker(client, failures=1)) == ONE_CALL


@virtual
async def test_a_call_that_is_under_way_when_its_task_times_out_is_unfinished() -> None:
    client = Script(httpx2, Reply(), Reply(pause=60.0)).client(make_upstream())

    async def handler(_: Task) -> None:
        await ask(client)
        await ask(client)

    usage = await usage_of(handler, timeout=5.0)
    assert usage == msgspec.structs.replace(ONE_CALL, unfinished=1)


@virtual
async def test_a_call_cut_off_by_a_timeout_counts_in_the_next_attempts_result() -> None:
    client = Script(httpx2, Reply(pause=60.0), Reply()).client(make_upstream())
    usage = await usage_of(Asker(client), timeout=5.0, retry=ONCE_MORE)
    assert (usage.calls, usage.unreported, usage.unfinished) == (2, 1, 0)
    assert usage.usd > 0.7  # what it may have cost


@virtual
async def test_a_call_of_a_model_without_a_price_is_unpriced() -> None:
    client = Script(httpx2).client(Upstream("llm"))
    assert await usage_of(Asker(client)) == CallUsage(calls=1, input_tokens=30, output_tokens=20, unpriced=1)


@virtual
async def test_a_guarded_function_is_a_call_without_tokens() -> None:
    async def search() -> None:
        """Find nothing."""

    guarded = Upstream("search").guard(search)
    assert await usage_of(lambda _: guarded()) == CallUsage(calls=1)


@virtual
async def test_a_call_by_hand_counts_as_it_is_settled() -> None:
    upstream = make_upstream()

    async def handler(_: Task) -> None:
        async with upstream.call("gpt-4o", input_tokens=10, output_tokens=10) as call:
            call.settle(input_tokens=30, output_tokens=20)
        async with upstream.call("gpt-4o", input_tokens=10, output_tokens=10) as call:
            call.settle(input_tokens=1, output_tokens=1, usd=0.5)
        async with upstream.call("gpt-4o", input_tokens=10, output_tokens=10):
            pass

    usage = await usage_of(handler)
    assert usage == CallUsage(calls=3, input_tokens=41, output_tokens=31, usd=approx(1.5), unreported=1)


@pytest.mark.blocks
async def test_calls_of_a_plain_handler_count() -> None:
    upstream = make_upstream()

    def handler(_: Task) -> None:
        for _call in range(3):
            with upstream.call("gpt-4o") as call:
                call.settle(input_tokens=30, output_tokens=20)

    assert (await usage_of(handler)).calls == 3


@virtual
async def test_each_call_of_nested_tasks_is_in_one_result() -> None:
    client = Script(httpx2).client(make_upstream())
    async with BackpressureSupervisor() as supervisor:

        async def plan(_: Task) -> Any:
            await ask(client)
            return await supervisor.submit_nowait(Task("ask"))

        supervisor.register_worker("planner", handler=plan, task_types=["plan"])
        supervisor.register_worker("agent", handler=Asker(client), task_types=["ask"])
        outer = await supervisor.submit_nowait(Task("plan"))
    assert outer.usage == ONE_CALL
    assert outer.result.usage == ONE_CALL


@virtual
async def test_a_branch_of_a_fan_out_has_the_usage_of_its_second_attempt_too() -> None:
    client = Script(httpx2).client(make_upstream())
    begun = 0

    async def handler(_: Task) -> None:
        nonlocal begun
        begun += 1
        await ask(client)
        if begun == 1:
            await asyncio.sleep(100.0)

    async with BackpressureSupervisor() as supervisor:
        for name in ("one", "two"):
            supervisor.register_worker(name, handler=handler, task_types=["ask"])
        results = [result async for result in supervisor.fan_out([Task("ask")], hedge=5.0)]
    assert [result.usage.calls for result in results] == [2]


@virtual
async def test_the_event_and_the_json_of_a_result_have_its_usage() -> None:
    client = Script(httpx2).client(make_upstream())
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=Asker(client), task_types=["ask"])
        ticket = supervisor.submit_nowait(Task("ask"))
        (finished,) = [event async for event in ticket.events() if isinstance(event, TaskFinished)]
    assert finished.result.usage == ONE_CALL
    assert finished.as_dict()["result"]["usage"] == ONE_CALL.as_dict()


@pytest.mark.blocks
@pytest.mark.parametrize("backend", DURABLE_STORES, ids=str)
async def test_another_process_reads_the_usage_of_a_stored_result(backend: StoreBackend, tmp_path: Path) -> None:
    url, client = backend.fast_url(tmp_path), Script(httpx2).client(make_upstream())
    async with BackpressureSupervisor(overflow=url) as supervisor:
        supervisor.register_worker("agent", handler=Asker(client, failures=1), task_types=["ask"], retry=ONCE_MORE)
        first = await (await supervisor.submit(Task("ask", task_id="a", durable=True)))
    async with BackpressureSupervisor(overflow=url) as supervisor:
        supervisor.register_worker("agent", handler=Asker(client), task_types=["ask"])
        found = await find_result(supervisor, "a")
    assert found.status is TaskStatus.SUCCEEDED
    assert found.usage == first.usage
    assert found.usage.calls == 2


def test_a_completion_that_an_earlier_version_stored_is_read_without_usage() -> None:
    stored = msgspec.msgpack.encode({"status": "succeeded", "attempts": 1})
    assert msgspec.msgpack.decode(stored, type=Completion).usage is None


@pytest.mark.blocks
@pytest.mark.parametrize("backend", DURABLE_STORES, ids=str)
@virtual
async def test_another_process_goes_on_with_the_usage_of_the_attempts_that_failed(
    backend: StoreBackend, tmp_path: Path
) -> None:
    url, client = backend.fast_url(tmp_path), Script(httpx2).client(make_upstream())
    later = Retry(max_attempts=2, base_delay=60.0, max_delay=60.0)
    retried = asyncio.Event()

    def note(event: Event) -> None:
        if isinstance(event, TaskRetried):
            retried.set()

    async with BackpressureSupervisor(overflow=url, on_event=note) as supervisor:
        supervisor.register_worker("agent", handler=Asker(client, failures=1), task_types=["ask"], retry=later)
        await supervisor.submit(Task("ask", task_id="a", durable=True))
        await retried.wait()
        await supervisor.drain(0.0)
    async with BackpressureSupervisor(overflow=url) as supervisor:
        supervisor.register_worker("agent", handler=Asker(client), task_types=["ask"], retry=later)
        ticket = await supervisor.find("a")
        assert ticket is not None
        result = await ticket
    assert (result.status, result.attempts) == (TaskStatus.SUCCEEDED, 2)
    assert (result.usage.calls, result.usage.usd) == (2, approx(1.4))
