"""The statistics of an upstream: its calls by outcome, and the state of its quotas."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from tests.support.task_plane import virtual
from tests.unit.upstream.httpx_binding.wire import REQUEST, URL, USAGE, Reply, Script

from forebay import BackpressureSupervisor, Overloaded, Quota, Retry, Task, Upstream
from forebay.upstream.upstream_statistics import AccountStatistics


def only_account(upstream: Upstream) -> AccountStatistics:
    (account,) = upstream.statistics().accounts
    return account


async def ask(client: Any) -> Any:
    return await client.post(URL, json=REQUEST, headers={"authorization": "Bearer sk"})


def counts(upstream: Upstream) -> dict[str, int]:
    account = only_account(upstream)
    names = ("sent", "succeeded", "throttled", "failed", "unattributed", "rejected", "in_flight")
    return {name: value for name in names if (value := getattr(account, name))}


@virtual
async def test_each_attempt_is_counted_by_its_outcome() -> None:
    upstream = Upstream("llm", provider="openai", retry=Retry(base_delay=0.001))
    limited = Reply.error(429, x_ratelimit_remaining_requests="0", retry_after="0.01")
    client = Script(httpx2, Reply.error(500), limited, Reply.error(529), Reply(), Reply.error(400)).client(upstream)
    await ask(client)
    assert counts(upstream) == {"sent": 4, "succeeded": 1, "throttled": 2, "failed": 1, "unattributed": 4}
    await ask(client)  # an error of the caller is no failure of the provider
    assert counts(upstream) == {"sent": 5, "succeeded": 1, "throttled": 2, "failed": 1, "unattributed": 5}


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
