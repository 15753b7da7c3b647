"""The statistics of an upstream: its calls by outcome, and the state of its quotas."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from tests.support.task_plane import virtual
from tests.unit.upstream.httpx_binding.wire import REQUEST, URL, USAGE, Reply, Script

from forebay import BackpressureSupervisor, Overloaded, Price, Quota, Retry, Task, Upstream
from forebay.upstream.upstream_statistics import AccountStatistics


def only_account(upstream: Upstream) -> AccountStatistics:
    (account,) = upstream.statistics().accounts
    return account


def only_key(upstream: Upstream) -> str:
    """Return the API key of the calls that have one, as it is shown."""
    (key,) = {
        name.split(":")[2] for account in upstream.statistics().accounts if (name := account.name).count(":") == 3
    }
    return key


async def ask(client: Any) -> Any:
    return await client.post(URL, json=REQUEST, headers={"authorization": "Bearer sk"})


def counts(upstream: Upstream) -> dict[str, int]:
    account = only_account(upstream)
    names = ("sent", "succeeded", "throttled", "failed", "unattributed", "rejected", "in_flight")
    return {name: value for name in names if (value := getattr(account, name))}


@virtual
async def test_calls_outside_of_tasks_count_as_unattributed() -> None:
    upstream = Upstream("llm", provider="openai")
    client = Script(httpx2).client(upstream)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=lambda _: ask(client), task_types=["ask"])
        await supervisor.run(Task("ask"))
    await ask(client)
    assert counts(upstream) == {"sent": 2, "succeeded": 2, "unattributed": 1}
    account = only_account(upstream)
    assert account.input_tokens == 2 * USAGE["prompt_tokens"]
    assert account.output_tokens == 2 * USAGE["completion_tokens"]


@virtual
async def test_calls_that_were_not_admitted_do_not_count_as_sent() -> None:
    upstream = Upstream("tool", max_concurrent=1, max_wait=5.0)
    async with upstream.call():
        waiting = asyncio.ensure_future(upstream.call().__aenter__())
        await asyncio.sleep(1.0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert counts(upstream) == {"sent": 1, "unattributed": 1, "in_flight": 1}
    small = Upstream("small", quotas=[Quota(input_tokens=10, per="minute")])
    with pytest.raises(Overloaded):
        await small.call(input_tokens=11).__aenter__()
    assert counts(small) == {"rejected": 1}


@virtual
async def test_a_permit_granted_to_a_cancelled_call_does_not_count_as_sent() -> None:
    upstream = Upstream("tool", max_concurrent=1)
    first = upstream.call()
    await first.__aenter__()
    waiting = asyncio.ensure_future(upstream.call().__aenter__())
    await asyncio.sleep(1.0)
    await first.__aexit__(None, None, None)  # the permit is granted now
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert counts(upstream) == {"sent": 1, "succeeded": 1, "unattributed": 1}


@virtual
async def test_configured_and_learned_quotas_show_what_remains() -> None:
    upstream = Upstream("llm", provider="openai", quotas=[Quota(input_tokens=1000, per="minute")])
    headers = {"x-ratelimit-limit-requests": "100", "x-ratelimit-remaining-requests": "80"}
    await ask(Script(httpx2, Reply(headers=headers)).client(upstream))
    configured, learned = only_account(upstream).quotas
    assert (configured.name, configured.amount, configured.learned) == ("input tokens per minute", 1000, False)
    assert configured.remaining == pytest.approx(1000 - USAGE["prompt_tokens"], abs=1)
    assert (learned.name, learned.amount, learned.learned) == ("requests per minute", 100, True)
    assert learned.remaining == pytest.approx(80, abs=1)


@virtual
async def test_usage_is_added_up_by_tenant_model_and_key() -> None:
    upstream = Upstream("llm", provider="openai", prices={"gpt-4o": Price(input=10_000, output=0)})
    client = Script(httpx2).client(upstream)

    async def handler(task: Task) -> None:
        headers = {"authorization": f"Bearer {task.payload['key']}"}
        await client.post(URL, json={**REQUEST, "model": task.payload["model"]}, headers=headers)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=handler, task_types=["ask"])
        for tenant, model, key in (
            ("acme", "gpt-4o", "sk"),
            ("acme", "gpt-4o", "sk"),
            ("bmo", "x", "sk"),
            ("bmo", "x", ""),
        ):
            await supervisor.run(Task("ask", {"key": key, "model": model}, tenant=tenant))
    statistics = upstream.statistics()
    key = only_key(upstream)
    assert [(row.tenant, row.model, row.api_key, row.usage.calls) for row in statistics.usage] == [
        ("acme", "gpt-4o", key, 2),
        ("bmo", "x", "", 1),
        ("bmo", "x", key, 1),
    ]
    assert statistics.usage[0].usage.usd == pytest.approx(2 * 0.3)
    assert statistics.used.unpriced == 2
    assert statistics.as_dict()["usage"][0]["usage"]["input_tokens"] == 60


@virtual
async def test_calls_that_a_provider_refuses_have_no_usage() -> None:
    upstream = Upstream("llm", provider="openai", retry=Retry(max_attempts=1))
    client = Script(httpx2, Reply.error(404), Reply.error(400), Reply.error(500)).client(upstream)
    for _ in range(3):
        await ask(client)
    assert upstream.statistics().usage == ()


@virtual
async def test_a_call_that_its_caller_leaves_counts_as_unreported() -> None:
    upstream = Upstream("llm", provider="openai", prices={"gpt-4o": Price(input=0, output=10_000)})
    client = Script(httpx2, Reply(pause=60.0)).client(upstream)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5.0):
            await ask(client)
    used = upstream.statistics().used
    assert (used.calls, used.unreported, used.output_tokens) == (1, 1, 100)
    assert used.usd == pytest.approx(1.0)
