"""UpstreamLimiter: a model or an agent of pydantic-ai waits in an upstream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextvars import Context
from functools import partial
from typing import Any

import pytest
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import ANSWER, OpenAIDouble
from tests.frameworks.waiting import until
from tests.support.upstream_checks import check_upstream

if "pydantic_ai" not in INSTALLED:
    pytest.skip("it runs in an environment of its own: scripts/test.sh makes it", allow_module_level=True)

from openai import AsyncOpenAI
from pydantic_ai import AbstractConcurrencyLimiter, Agent, ConcurrencyLimitedModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.models.test import TestModel as Scripted
from pydantic_ai.providers.openai import OpenAIProvider

from forebay import BackpressureSupervisor, Budget, Overloaded, Priority, Quota, Task, TaskStatus, Upstream
from forebay.adapters.pydantic_ai import UpstreamLimiter
from forebay.errors import InvalidSetting
from forebay.task import Deadline
from forebay.upstream import Fallback

Limited = Callable[[UpstreamLimiter], Any]


@pytest.fixture
async def limited(double: OpenAIDouble) -> AsyncIterator[Limited]:
    """Return a model whose client is not bound, and which waits in a limiter."""
    async with AsyncOpenAI(api_key="sk-test", base_url=double.url, max_retries=0) as client:
        model = OpenAIChatModel("gpt-4o-mini", provider=OpenAIProvider(openai_client=client))
        yield partial(ConcurrencyLimitedModel, model)


@contextlib.asynccontextmanager
async def supervisor_of(agent: Any, **settings: Any) -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=agent, task_types=["ask"], **{"max_concurrent": 4, **settings})
        yield supervisor


def state_of(upstream: Upstream) -> dict[str, tuple[int, int]]:
    """Return the calls in flight and the calls that have ended, by model."""
    return {
        each.name.removeprefix("upstream:key").removeprefix(":"): (each.in_flight, each.sent - each.in_flight)
        for each in upstream.statistics().accounts
    }


# --- through pydantic-ai ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_requests_of_all_agents_together_keep_the_limit_of_the_upstream(
    limited: Limited, double: OpenAIDouble, *, stream: bool
) -> None:
    upstream = Upstream("key", max_concurrent=2)
    agent = Agent(limited(UpstreamLimiter(upstream)))
    double.hold()
    async with supervisor_of(agent, config={"stream": stream}) as supervisor:
        tickets = [await supervisor.submit(Task("ask", f"river {number}")) for number in range(4)]
        await double.until_requests(2)
        await until(lambda: upstream.statistics().accounts[0].queued == 2)
        assert len(double.requests) == 2
        double.release()
        assert [(await ticket).result["output"] for ticket in tickets] == [ANSWER] * 4
    assert upstream.statistics().accounts[0].sent == 4
    check_upstream(upstream)


async def test_requests_wait_by_the_priority_of_their_task(limited: Limited, double: OpenAIDouble) -> None:
    upstream = Upstream("key", max_concurrent=1)
    double.hold()
    async with supervisor_of(Agent(limited(UpstreamLimiter(upstream)))) as supervisor:
        tickets = [await supervisor.submit(Task("ask", "first"))]
        await double.until_requests(1)
        for number, priority in enumerate((Priority.LOW, Priority.NORMAL, Priority.CRITICAL), 1):
            tickets.append(await supervisor.submit(Task("ask", priority.name, priority=priority)))
            await until(lambda number=number: upstream.statistics().accounts[0].queued == number)  # type: ignore[misc]
        double.release()
        for ticket in tickets:
            assert (await ticket).success
    assert [call.text for call in double.requests] == ["first", "CRITICAL", "NORMAL", "LOW"]


async def test_a_request_is_not_made_that_would_miss_the_deadline_of_its_task(
    limited: Limited, double: OpenAIDouble
) -> None:
    upstream = Upstream("key", max_concurrent=1)
    double.hold()
    async with supervisor_of(Agent(limited(UpstreamLimiter(upstream)))) as supervisor:
        first = await supervisor.submit(Task("ask", "first"))
        await double.until_requests(1)
        late = await supervisor.submit(Task("ask", "late", deadline=Deadline.within(0.3)))
        assert not (await late).success
        double.release()
        assert (await first).success
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
    assert [call.text for call in double.requests] == ["first"]
    check_upstream(upstream)


async def test_a_request_that_the_upstream_rejects_ends_the_task_as_overloaded(
    limited: Limited, double: OpenAIDouble
) -> None:
    def look(text: str) -> str:
        """Look."""
        return text

    upstream = Upstream("key", quotas=[Quota(requests=2, per="day")])
    async with supervisor_of(Agent(limited(UpstreamLimiter(upstream)), tools=[look])) as supervisor:
        with pytest.raises(Overloaded, match="requests per day"):
            await supervisor.run(Task("ask", "Which river?"))
    assert len(double.requests) == 2
    check_upstream(upstream)


@pytest.mark.parametrize(("status", "counted"), [(429, "throttled"), (500, "failed"), (400, "")])
async def test_a_request_that_fails_counts_as_what_the_provider_answered(
    limited: Limited, double: OpenAIDouble, status: int, counted: str
) -> None:
    upstream = Upstream("key", max_concurrent=4)
    double.refuse(status, times=1)
    async with supervisor_of(Agent(limited(UpstreamLimiter(upstream)))) as supervisor:
        assert not (await (await supervisor.submit(Task("ask", "Which river?")))).success
    (account,) = upstream.statistics().accounts
    assert {name: getattr(account, name) for name in ("throttled", "failed")} == {
        name: int(name == counted) for name in ("throttled", "failed")
    }
    check_upstream(upstream)


async def test_a_cancelled_request_and_one_that_still_waits_return_what_they_took(
    limited: Limited, double: OpenAIDouble
) -> None:
    upstream = Upstream("key", max_concurrent=1)
    double.hold()
    async with supervisor_of(Agent(limited(UpstreamLimiter(upstream)))) as supervisor:
        tickets = [await supervisor.submit(Task("ask", "Which river?")) for _ in range(2)]
        await double.until_requests(1)
        await until(lambda: upstream.statistics().accounts[0].queued == 1)
        for ticket in reversed(tickets):
            ticket.cancel()
            assert (await ticket).status is TaskStatus.CANCELLED
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
        (account,) = upstream.statistics().accounts
        assert (account.in_flight, account.queued) == (0, 0)
        double.release()
        assert (await supervisor.run(Task("ask", "Which river?")))["output"] == ANSWER
    check_upstream(upstream)


async def test_an_agent_waits_as_a_whole_and_its_own_bound_calls_do_not_wait_for_it(double: OpenAIDouble) -> None:
    upstream = Upstream("key", provider="openai", max_concurrent=1)
    async with AsyncOpenAI(api_key="sk-test", base_url=double.url) as client:
        provider = OpenAIProvider(openai_client=upstream.bind(client))
        agent = Agent(OpenAIChatModel("gpt-4o-mini", provider=provider), max_concurrency=UpstreamLimiter(upstream))
        async with supervisor_of(agent) as supervisor, asyncio.timeout(20):
            results = await asyncio.gather(*(supervisor.run(Task("ask", f"river {n}")) for n in range(3)))
    assert [each["output"] for each in results] == [ANSWER] * 3
    check_upstream(upstream)


def test_it_works_without_a_supervisor_in_several_event_loops() -> None:
    upstream = Upstream("key", max_concurrent=1)
    agent = Agent(ConcurrencyLimitedModel(Scripted(), UpstreamLimiter(upstream)))
    for _ in range(2):
        assert asyncio.run(agent.run("Which river?")).output
    assert upstream.statistics().accounts[0].succeeded == 2
    check_upstream(upstream)


# --- by hand ---------------------------------------------------------------------------------------------------------


async def test_requests_wait_in_the_account_of_their_model_and_runs_in_that_of_none() -> None:
    upstream = Upstream("key")
    limiter = UpstreamLimiter(upstream)
    assert isinstance(limiter, AbstractConcurrencyLimiter)
    await limiter.acquire("model:gpt-4o:free")
    await limiter.acquire("agent:gpt-4o")
    other = UpstreamLimiter(upstream, model="claude")
    await other.acquire("agent:boatman")
    assert state_of(upstream) == {"gpt-4o:free": (1, 0), "": (1, 0), "claude": (1, 0)}
    for each in (limiter, limiter, other):
        each.release()
    assert state_of(upstream) == {"gpt-4o:free": (0, 1), "": (0, 1), "claude": (0, 1)}


async def test_each_context_releases_what_it_has_acquired() -> None:
    upstream = Upstream("key")
    limiter = UpstreamLimiter(upstream)
    acquired, go = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        await limiter.acquire("model:first")
        acquired.set()
        await go.wait()
        limiter.release()

    first = asyncio.create_task(hold())
    await acquired.wait()
    await limiter.acquire("model:second")
    limiter.release()
    assert state_of(upstream) == {"first": (1, 0), "second": (0, 1)}
    await limiter.acquire("model:third")
    go.set()
    await first
    assert state_of(upstream) == {"first": (0, 1), "second": (0, 1), "third": (1, 0)}
    limiter.release()
    assert state_of(upstream) == {"first": (0, 1), "second": (0, 1), "third": (0, 1)}


async def test_an_agent_within_a_request_of_another_releases_its_own() -> None:
    upstream = Upstream("key")
    limiter = UpstreamLimiter(upstream)
    await limiter.acquire("agent:outer")

    async def inner() -> None:
        await limiter.acquire("model:inner")
        limiter.release()

    await asyncio.create_task(inner())  # in a copy of this context
    assert state_of(upstream) == {"": (1, 0), "inner": (0, 1)}
    limiter.release()
    assert state_of(upstream) == {"": (0, 1), "inner": (0, 1)}


async def test_a_slot_that_is_released_in_another_context_is_released() -> None:
    upstream = Upstream("key", max_concurrent=1)
    limiter = UpstreamLimiter(upstream)
    await limiter.acquire("model:m")
    Context().run(limiter.release)
    await limiter.acquire("model:m")  # this context still remembers the first one
    limiter.release()
    assert upstream.statistics().accounts[0].in_flight == 0
    check_upstream(upstream)


async def test_an_exception_that_was_handled_before_is_not_that_of_the_request() -> None:
    upstream = Upstream("key", max_concurrent=1)
    limiter = UpstreamLimiter(upstream)
    try:
        int("seven")
    except ValueError:
        await limiter.acquire("model:m")
        limiter.release()
    (account,) = upstream.statistics().accounts
    assert (account.sent, account.failed, account.in_flight) == (1, 0, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": Budget(usd=1, per="day")},
        {"tenant_budget": Budget(usd=1, per="day")},
        {"quotas": [Quota(tokens=1000, per="day", strict=True)]},
        {"models": {"gpt-*": [Quota(tokens=1000, per="day", strict=True)]}},
    ],
)
def test_an_upstream_whose_bounds_a_limiter_cannot_keep_is_rejected(settings: Any) -> None:
    with pytest.raises(InvalidSetting, match="without a budget and a strict quota"):
        UpstreamLimiter(Upstream("key", **settings))


def test_what_is_no_upstream_or_has_a_fallback_is_rejected() -> None:
    with pytest.raises(InvalidSetting, match="a Upstream, such as"):
        UpstreamLimiter(5)  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match="without a fallback"):
        UpstreamLimiter(Upstream("key", fallback=Fallback(Upstream("other"))))
