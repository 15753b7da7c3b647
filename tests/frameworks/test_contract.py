"""The contract of an adapter: what it promises of an agent of each framework, run by the real package."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import ANSWER, OpenAIDouble
from tests.frameworks.sample import Connect, Sample, Tool, closeable
from tests.frameworks.waiting import until
from tests.support.upstream_checks import check_upstream

from forebay import BackpressureSupervisor, Overloaded, Priority, Quota, Task, TaskStatus, Ticket
from forebay.errors import UnusableTask
from forebay.events import TaskProgress
from forebay.retry import Retry
from forebay.task import Deadline
from forebay.testing import run_ready
from forebay.upstream import Upstream
from forebay.upstream.sdk_exceptions import find_error_answer

if not INSTALLED:
    pytest.skip("frameworks run in an environment of their own: scripts/test.sh makes it", allow_module_level=True)

MISSING = "inputs without 'message'"
VARIABLE: ContextVar[str] = ContextVar("variable", default="unset")


def note(text: str) -> str:
    """Take a note."""
    return f"noted {text}"


@contextlib.asynccontextmanager
async def connections(double: OpenAIDouble, upstream: Upstream | None = None) -> AsyncIterator[Connect]:
    """Yield what connects clients, which are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        def connect(kind: Callable[..., Any]) -> Any:
            client = kind(api_key="sk-test", base_url=double.url)
            for each in closeable(client):
                if hasattr(each, "__aenter__"):
                    stack.push_async_exit(each)
                else:
                    stack.push(each)
            return client if upstream is None else upstream.bind(client)

        yield connect


@contextlib.asynccontextmanager
async def supervisor_of(
    sample: Sample, double: OpenAIDouble, *, tool: Tool = note, upstream: Upstream | None = None, **settings: Any
) -> AsyncIterator[BackpressureSupervisor]:
    """Run a supervisor with one worker, "agent", of a sample."""
    async with connections(double, upstream) as connect, BackpressureSupervisor() as supervisor:
        made = sample.make(connect, tool)
        supervisor.register_worker("agent", task_types=["ask"], **{"max_concurrent": 4, **made, **settings})
        yield supervisor


def _asked(sample: Sample, double: OpenAIDouble) -> list[str]:
    """Return what the submitters said, by the requests that have arrived."""
    return [sample.asked(call.text) for call in double.requests]


def upstream_of(**settings: Any) -> Upstream:
    return Upstream("key", provider="openai", **settings)


# --- payload and result ----------------------------------------------------------------------------------------------


async def test_the_result_is_plain_data_that_a_next_task_can_go_on_from(sample: Sample, double: OpenAIDouble) -> None:
    async with supervisor_of(sample, double) as supervisor:
        result = await supervisor.run(Task("ask", "Which river?"))
        assert json.loads(json.dumps(result)) == result
        assert result["output"] == ANSWER
        assert result["agent"] == "sample"
        assert _asked(sample, double) == ["Which river?"] * 3
        further = [*result["messages"], {"role": "user", "content": "And where?"}]
        assert (await supervisor.run(Task("ask", further)))["output"] == ANSWER
    sent = [message["content"] for message in double.requests[3].body["messages"] if message["role"] == "user"]
    assert sample.asked(sent[-1]) == "And where?"
    if sample.payloads == "inputs":
        assert "User: Which river?\n" in sent[-1]
    else:
        assert sample.asked(sent[0]) == "Which river?"


@pytest.mark.parametrize(
    "payload",
    [
        "Which river?",
        [{"role": "user", "content": "Which river?"}],
        {"messages": "Which river?"},
        {"messages": [{"role": "user", "content": "Which river?"}], "context": {"user": "Ada"}},
    ],
)
async def test_a_payload_is_text_or_messages_or_both_with_variables(
    sample: Sample, double: OpenAIDouble, payload: Any
) -> None:
    double.calls = 1
    async with supervisor_of(sample, double) as supervisor:
        assert (await supervisor.run(Task("ask", payload)))["output"] == ANSWER
    sent = [message for message in double.requests[0].body["messages"] if message["role"] == "user"]
    assert [sample.asked(message["content"]) for message in sent] == ["Which river?"]


@pytest.mark.parametrize(
    ("payload", "said", "said_of_inputs"),
    [
        (None, "NoneType", MISSING),
        (7, "int", "int"),
        ([], "no message", "no message"),
        (["Which river?"], "item 0 is a str", "item 0 is a str"),
        ({"topic": "rivers"}, "'topic'", MISSING),
        ({7: "rivers"}, "dict with int", "a key that is a int"),
        ({"context": {}}, "without 'messages'", MISSING),
        ({"messages": "Which river?", "context": "Ada"}, "'context' is a str", "'context' is a str"),
    ],
)
async def test_any_other_payload_is_refused_when_it_is_submitted(
    sample: Sample, double: OpenAIDouble, payload: Any, said: str, said_of_inputs: str
) -> None:
    async with supervisor_of(sample, double) as supervisor:
        if sample.payloads == "any inputs" and said_of_inputs == MISSING:
            assert (await supervisor.run(Task("ask", payload)))["output"] == ANSWER
            return
        with pytest.raises(UnusableTask, match=r"a\s+list of messages") as refused:
            await supervisor.submit(Task("ask", payload))
    assert (said if sample.payloads == "messages" else said_of_inputs) in str(refused.value)
    assert not double.requests


TOOL_ROUND = [
    {"role": "user", "content": "Which river?", "name": "Ann B."},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "note", "arguments": '{"text": "n"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "noted n"},
    {"role": "assistant", "content": "The Inn.", "refusal": None},
    {"role": "user", "content": [{"type": "text", "text": "And then?"}]},
]


async def test_messages_of_the_chat_api_are_a_payload_with_names_and_calls_of_tools(
    sample: Sample, double: OpenAIDouble
) -> None:
    double.calls = 1
    async with supervisor_of(sample, double) as supervisor:
        assert (await supervisor.run(Task("ask", TOOL_ROUND)))["output"] == ANSWER
    if sample.payloads == "messages":
        sent = json.dumps(double.requests[0].body["messages"])
        assert all(part in sent for part in ("Which river?", "The Inn.", "And then?"))
        assert ("noted n" in sent) is (sample.name != "autogen team")  # whose agents see the calls of their own alone


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Which river?"},
        {"role": "robot", "content": "Which river?"},
        {"role": "user", "content": None},
        {"role": "user", "content": 5},
        {"role": "user", "content": ["Which river?"]},
        {"role": "tool", "content": "noted"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]},
    ],
)
async def test_messages_that_the_chat_api_does_not_take_are_refused_or_answered(
    sample: Sample, double: OpenAIDouble, message: Any
) -> None:
    double.calls = 1
    async with supervisor_of(sample, double) as supervisor:
        try:
            ticket = await supervisor.submit(Task("ask", [message, {"role": "user", "content": "Which river?"}]))
        except UnusableTask:
            assert not double.requests
        else:
            assert (await ticket).success


async def test_one_agent_runs_many_tasks_at_once_and_mixes_none(sample: Sample, double: OpenAIDouble) -> None:
    async with supervisor_of(sample, double, upstream=upstream_of(), max_concurrent=8) as supervisor:
        tickets = [await supervisor.submit(Task("ask", f"river {n}")) for n in range(8)]
        for number, ticket in enumerate(tickets):
            told = json.dumps((await ticket).result["messages"])
            assert f"river {number}" in told
            assert told.count("river ") == 1
    assert len(double.requests) == 8 * 3


async def test_context_variables_of_the_submitter_reach_the_tools(sample: Sample, double: OpenAIDouble) -> None:
    seen = []

    def look(text: str) -> str:
        """Look."""
        seen.append(VARIABLE.get())
        return text

    async with supervisor_of(sample, double, tool=look) as supervisor:
        for value in ("one", "two"):
            VARIABLE.set(value)
            await supervisor.run(Task("ask", "Which river?"))
    assert seen == ["one", "one", "two", "two"]


async def test_two_supervisors_in_one_process_run_the_same_agent(sample: Sample, double: OpenAIDouble) -> None:
    async with connections(double) as connect, BackpressureSupervisor() as first:
        made = sample.make(connect, note)
        async with BackpressureSupervisor() as second:
            for supervisor in (first, second):
                supervisor.register_worker("agent", task_types=["ask"], **made)
            both = await asyncio.gather(*(each.run(Task("ask", "Which river?")) for each in (first, second)))
            assert [each["output"] for each in both] == [ANSWER] * 2
        assert (await first.run(Task("ask", "Which river?")))["output"] == ANSWER


# --- usage and progress ----------------------------------------------------------------------------------------------


async def test_tokens_metered_are_those_that_the_provider_counted(sample: Sample, double: OpenAIDouble) -> None:
    upstream = upstream_of()
    async with supervisor_of(sample, double, upstream=upstream) as supervisor:
        result = await supervisor.run(Task("ask", "Which river?"))
    (account,) = upstream.statistics().accounts
    assert (account.input_tokens, account.output_tokens) == double.tokens
    assert account.unattributed == 0
    told = result["usage"]
    assert sample.facts.counts_usage
    assert (told["requests"], told["input_tokens"], told["output_tokens"]) == (3, *double.tokens)
    check_upstream(upstream)


async def test_progress_is_reported(sample: Sample, double: OpenAIDouble) -> None:
    async with supervisor_of(sample, double) as supervisor:
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        values = [event.value async for event in ticket.events() if isinstance(event, TaskProgress)]
    if sample.facts.progress == "text":
        assert "".join(each.get("text", "") for each in values) == ANSWER
    elif sample.facts.progress == "no":
        assert not values
    else:
        assert [each["step"] for each in values].count("model") == 3


# --- failures --------------------------------------------------------------------------------------------------------


async def test_an_error_of_the_provider_fails_the_task_and_is_found_behind_it(
    sample: Sample, double: OpenAIDouble
) -> None:
    upstream = upstream_of()
    double.refuse(400, x_request_id="r7")
    async with supervisor_of(sample, double, upstream=upstream) as supervisor:
        result = await (await supervisor.submit(Task("ask", "Which river?")))
    assert result.status is TaskStatus.FAILED
    assert result.cause is not None
    found = find_error_answer(result.cause)
    assert found is not None
    assert (found.status, found.headers.get("x-request-id")) == (400, "r7")
    assert len(double.requests) == 1
    check_upstream(upstream)


@pytest.mark.parametrize("status", [429, 503])
async def test_the_answer_behind_an_error_of_an_unbound_client_is_found(
    sample: Sample, double: OpenAIDouble, status: int
) -> None:
    double.refuse(status, retry_after="7", x_should_retry="false")
    async with supervisor_of(sample, double) as supervisor:
        result = await (await supervisor.submit(Task("ask", "Which river?")))
    assert result.cause is not None
    found = find_error_answer(result.cause)
    assert found is not None
    assert (found.status, found.headers.get("retry-after")) == (status, "7")
    assert b"refused" in found.body


async def test_only_the_upstream_retries_a_bound_call(sample: Sample, double: OpenAIDouble) -> None:
    upstream = upstream_of(retry=Retry(max_attempts=2, base_delay=0.001))
    double.refuse(500, times=1)
    async with supervisor_of(sample, double, upstream=upstream) as supervisor:
        assert (await supervisor.run(Task("ask", "Which river?")))["output"] == ANSWER
        assert len(double.requests) == 3 + 1
        double.refuse(500)
        result = await (await supervisor.submit(Task("ask", "Which river?")))
    assert result.status is TaskStatus.FAILED
    assert len(double.requests) == 3 + 1 + 2
    check_upstream(upstream)


async def test_a_failing_task_without_an_upstream_makes_as_many_calls_as_documented(
    sample: Sample, double: OpenAIDouble
) -> None:
    double.refuse(500, retry_after_ms="1")
    async with supervisor_of(sample, double) as supervisor:
        result = await (await supervisor.submit(Task("ask", "Which river?")))
    assert result.status is TaskStatus.FAILED
    assert len(double.requests) == sample.facts.calls_if_direct


async def test_a_call_that_the_upstream_rejects_ends_the_task_as_overloaded(
    sample: Sample, double: OpenAIDouble
) -> None:
    upstream = upstream_of(quotas=[Quota(requests=2, per="day")])
    async with supervisor_of(sample, double, upstream=upstream) as supervisor:
        with pytest.raises(Overloaded, match="requests per day"):
            await supervisor.run(Task("ask", "Which river?"))
    assert len(double.requests) == 2
    check_upstream(upstream)


# --- cancellation and timeout ----------------------------------------------------------------------------------------


async def _stops(sample: Sample, double: OpenAIDouble, supervisor: BackpressureSupervisor, ticket: Ticket) -> None:
    """Check that a run whose first call is held, and whose ticket has ended, stops where it is documented."""
    worker = supervisor.workers["agent"]
    if sample.facts.stops_at == "at once":
        await double.until(lambda double: double.requests[0].status == 499)
    else:
        for _ in range(5):  # turns of the loop, in which the cancellation is delivered
            await asyncio.sleep(0)
        assert worker.current_tasks == 1  # a run that has not ended holds its slot
        double.release()
    await until(lambda: worker.current_tasks == 0)
    assert ticket.done()
    assert len(double.requests) == 1


@pytest.mark.parametrize("is_bound", [True, False])
async def test_a_cancelled_run_stops(sample: Sample, double: OpenAIDouble, *, is_bound: bool) -> None:
    double.hold()
    upstream = upstream_of() if is_bound else None
    async with supervisor_of(sample, double, upstream=upstream) as supervisor:
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await double.until_requests(1)
        ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        await _stops(sample, double, supervisor, ticket)
    if upstream is not None:
        await until(lambda: not upstream.statistics().accounts[0].in_flight)
        check_upstream(upstream)


async def test_a_run_whose_time_is_up_stops(sample: Sample, double: OpenAIDouble) -> None:
    double.hold()
    async with supervisor_of(sample, double, timeout=0.3) as supervisor:
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await double.until_requests(1)
        assert (await ticket).status is TaskStatus.TIMED_OUT
        await _stops(sample, double, supervisor, ticket)


async def test_a_tool_that_exits_harms_no_other_task(sample: Sample, double: OpenAIDouble) -> None:
    def leave(text: str) -> str:
        """Exit."""
        raise SystemExit(text)

    async def other(task: Task) -> Any:
        await agent_ended.wait()
        return task.payload

    agent_ended = asyncio.Event()
    async with supervisor_of(sample, double, tool=leave) as supervisor:
        supervisor.register_worker("other", task_types=["other"], handler=other)
        ticket = await supervisor.submit(Task("other", 7))
        assert (await (await supervisor.submit(Task("ask", "Which river?")))).status is not TaskStatus.TIMED_OUT
        agent_ended.set()
        assert (await ticket).result == 7


async def test_a_tool_that_does_not_stop_keeps_a_slot_or_leaves_a_thread_as_documented(
    sample: Sample, double: OpenAIDouble
) -> None:
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def stuck(text: str) -> str:
        """Hang."""
        entered.set()
        assert leave.wait(20)
        left.set()
        return text

    async with supervisor_of(sample, double, tool=stuck) as supervisor:
        worker = supervisor.workers["agent"]
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await asyncio.get_running_loop().run_in_executor(None, entered.wait, 20)
        ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        if sample.facts.threads_left:
            await until(lambda: worker.current_tasks == 0)
            assert not left.is_set()
        else:
            for _ in range(50):  # turns of the loop, in which the cancellation is delivered
                await asyncio.sleep(0)
            assert worker.current_tasks == 1
            await run_ready()  # else the function returns before its run has been cancelled
        leave.set()
        await until(lambda: worker.current_tasks == 0 and left.is_set())
    assert len(double.requests) == 1


# --- what the wire sees of the task ----------------------------------------------------------------------------------


def _are_queued(upstream: Upstream, count: int) -> bool:
    return upstream.statistics().accounts[0].queued == count


async def test_the_calls_of_a_task_have_its_priority(sample: Sample, double: OpenAIDouble) -> None:
    double.calls = 1
    double.hold()
    upstream = upstream_of(max_concurrent=1)
    async with supervisor_of(sample, double, upstream=upstream) as supervisor:
        tickets = [await supervisor.submit(Task("ask", "first"))]
        await double.until_requests(1)
        for number, priority in enumerate((Priority.LOW, Priority.NORMAL, Priority.CRITICAL), 1):
            tickets.append(await supervisor.submit(Task("ask", priority.name, priority=priority)))
            await until(partial(_are_queued, upstream, number))
        double.release()
        for ticket in tickets:
            assert (await ticket).success
    assert _asked(sample, double) == ["first", "CRITICAL", "NORMAL", "LOW"]


async def test_a_call_is_not_made_that_would_miss_the_deadline_of_its_task(
    sample: Sample, double: OpenAIDouble
) -> None:
    double.calls = 1
    double.hold()
    upstream = upstream_of(max_concurrent=1)
    async with supervisor_of(sample, double, upstream=upstream) as supervisor:
        first = await supervisor.submit(Task("ask", "first"))
        await double.until_requests(1)
        late = await supervisor.submit(Task("ask", "late", deadline=Deadline.within(0.5)))
        assert not (await late).success
        double.release()
        assert (await first).success
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
    assert _asked(sample, double) == ["first"]
    check_upstream(upstream)
