"""What only the adapter of pydantic-ai does."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import ANSWER, OpenAIDouble
from tests.frameworks.waiting import check_cancelled_run_holds_its_slot, until

if "pydantic_ai" not in INSTALLED:
    pytest.skip("it runs in an environment of its own: scripts/test.sh makes it", allow_module_level=True)

import pydantic_ai
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, ConcurrencyLimitedModel, ModelAPIError, ModelRetry, RunContext
from pydantic_ai.capabilities import HandleDeferredToolCalls, ReinjectSystemPrompt, UseThreadExecutor
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.models.test import TestModel as Scripted
from pydantic_ai.providers.openai import OpenAIProvider

from forebay import BackpressureSupervisor, Overloaded, Priority, Quota, Task, TaskStatus, Upstream
from forebay._threads import DaemonThreadExecutor
from forebay.adapters import as_handler
from forebay.adapters.chat import ApprovalNeeded
from forebay.adapters.pydantic_ai import ToolResultNeeded, UpstreamLimiter
from forebay.errors import InvalidHandler, InvalidSetting, NotBindable, NotGuardable, UnusableTask
from forebay.events import TaskProgress


@pytest.fixture
async def model(double: OpenAIDouble) -> AsyncIterator[Any]:
    async with AsyncOpenAI(api_key="sk-test", base_url=double.url) as client:
        yield OpenAIChatModel("gpt-4o-mini", provider=OpenAIProvider(openai_client=client))


async def result_of(agent: Any, payload: Any = "Which river?", *, config: Any = None, **fields: Any) -> Any:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=agent, task_types=["ask"], config=config)
        return await (await supervisor.submit(Task("ask", payload, **fields)))


def sent(double: OpenAIDouble, number: int = 0) -> list[tuple[str, Any]]:
    return [(each["role"], each.get("content")) for each in double.requests[number].body["messages"]]


# --- what is registered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obj", [Scripted(), pydantic_ai.Tool(len), pydantic_ai.UsageLimits()])
def test_an_object_of_pydantic_ai_that_is_no_agent_is_rejected_with_advice(obj: Any) -> None:
    with pytest.raises(InvalidHandler, match="pass an Agent of pydantic-ai"):
        as_handler(obj)


def test_the_class_of_an_agent_is_rejected_with_advice() -> None:
    with pytest.raises(InvalidHandler, match="pass an instance of it, or factory="):
        as_handler(Agent)


def test_an_option_that_a_run_does_not_have_is_rejected() -> None:
    with pytest.raises(InvalidSetting, match=r"usage_limit.*takes .*usage_limits"):
        as_handler(Agent(Scripted()), config={"usage_limit": 3})


async def test_an_agent_derived_from_theirs_and_a_wrapper_are_agents() -> None:
    class Mine(Agent[None, str]):  # type: ignore[misc]
        pass

    assert (await result_of(Mine(Scripted(), name="mine"))).result["agent"] == "mine"
    assert (await result_of(pydantic_ai.agent.WrapperAgent(Mine(Scripted(), name="mine")))).result["agent"] == "mine"


async def test_a_factory_makes_an_agent_for_each_task(double: OpenAIDouble, model: Any) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(Agent(model, name=f"agent {len(made)}"))
        return made[-1]

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", factory=make, task_types=["ask"])
        names = [(await supervisor.run(Task("ask", "Which river?")))["agent"] for _ in range(2)]
    assert len(set(names)) == 2
    assert double.answered == 2


async def test_a_model_or_a_tool_is_not_bound_or_guarded_and_what_to_write_is_told(model: Any) -> None:
    def look(text: str) -> str:
        """Look."""
        return text

    upstream = Upstream("key")
    for each in (model, Agent(model)):
        with pytest.raises(NotBindable, match=r"openai_client=upstream\.bind"):
            upstream.bind(each)
    with pytest.raises(NotGuardable, match=r"Tool\(upstream\.guard\(function\)\)"):
        upstream.guard(pydantic_ai.Tool(look))
    assert (await result_of(Agent(model, tools=[pydantic_ai.Tool(upstream.guard(look))]))).success
    assert upstream.statistics().accounts[0].succeeded == 2


# --- payload and result ----------------------------------------------------------------------------------------------


async def test_a_conversation_as_openai_has_it_is_read_whole(model: Any, double: OpenAIDouble) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"text": "map"}'}}
    urls = ["https://example.org/map.png", "data:image/png;base64,iVBORw0KGgo="]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look at the map."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "blue"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is blue."}]},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, *images]},
    ]
    assert (await result_of(Agent(model), messages)).result["output"] == ANSWER
    told = double.requests[0].body["messages"]
    assert [each["role"] for each in told] == ["system", "user", "assistant", "tool", "assistant", "user"]
    assert told[0]["content"] == "Be brief."
    assert told[2]["tool_calls"][0]["function"] == call["function"]
    assert (told[3]["content"], told[3]["tool_call_id"], told[4]["content"]) == ("blue", "c1", "It is blue.")
    assert [each["type"] for each in told[5]["content"]] == ["text", "image_url", "image_url"]
    assert [each["image_url"]["url"] for each in told[5]["content"][1:]] == urls


@pytest.mark.parametrize(
    "message",
    [
        {"role": "robot", "content": "hush"},
        {"content": "hush"},
        {"role": "user"},
        {"role": "user", "content": 7},
        {"role": "user", "content": ["hush"]},
        {"role": "user", "content": [{"type": "video", "text": "hush"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:hush"}}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": "hush"}]},
        {"role": "assistant", "content": None, "tool_calls": ["hush"]},
        {"role": "tool", "tool_call_id": "of no call", "content": "hush"},
        {"kind": "request", "parts": "hush"},
        {"kind": "hush"},
    ],
)
async def test_a_message_that_cannot_be_read_is_refused_when_it_is_submitted_and_not_shown(message: Any) -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=Agent(Scripted()), task_types=["ask"])
        with pytest.raises(UnusableTask, match="item 1 cannot be read") as refused:
            await supervisor.submit(Task("ask", [{"role": "user", "content": "Which river?"}, message]))
    assert "hush" not in str(refused.value)


async def test_the_messages_of_a_result_keep_what_openais_cannot_say(double: OpenAIDouble, model: Any) -> None:
    raw = bytes(range(256))
    part = pydantic_ai.UserPromptPart(["What is it?", pydantic_ai.BinaryContent(raw, media_type="image/png")])
    thought = pydantic_ai.ThinkingPart("Hm.", signature="s1", provider_name="other")
    history = [pydantic_ai.ModelRequest([part]), pydantic_ai.ModelResponse([thought, pydantic_ai.TextPart("A map.")])]
    plain = pydantic_ai.ModelMessagesTypeAdapter.dump_python(history, mode="json")
    result = (await result_of(Agent(model), [*plain, {"role": "user", "content": "Of what?"}])).result
    told = json.loads(json.dumps(result["messages"]))
    read = pydantic_ai.ModelMessagesTypeAdapter.validate_json(json.dumps(told))
    assert read[0].parts[0].content[1].data == raw
    assert read[1].parts[0].signature == "s1"
    assert sent(double)[-1] == ("user", "Of what?")


@pytest.mark.parametrize(
    "payload",
    [
        "Which river?",
        [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Which river?"},
        ],
    ],
)
async def test_the_system_prompt_of_the_agent_is_sent_once_in_every_turn(
    model: Any, double: OpenAIDouble, payload: Any
) -> None:
    agent = Agent(model, system_prompt="Be a boatman.")
    first = (await result_of(agent, payload)).result
    await result_of(agent, [*first["messages"], {"role": "user", "content": "And where?"}])
    for number in range(2):
        assert [text for role, text in sent(double, number) if role == "system"] == ["Be a boatman."]
    assert sent(double)[0][0] == "system"


async def test_a_system_prompt_that_an_agent_of_yours_replaces_stays_replaced(model: Any, double: OpenAIDouble) -> None:
    agent = Agent(model, system_prompt="Mine.", capabilities=[ReinjectSystemPrompt(replace_existing=True)])
    await result_of(agent, [{"role": "system", "content": "Theirs."}, {"role": "user", "content": "Which river?"}])
    assert sent(double) == [("system", "Mine."), ("user", "Which river?")]


async def test_a_structured_output_is_plain_data(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseModel):
        river: str

    monkeypatch.setattr("tests.frameworks.openai_double.ANSWER", '{"river": "Danube"}')
    agent = Agent(model, output_type=pydantic_ai.PromptedOutput(Answer))
    assert (await result_of(agent)).result["output"] == {"river": "Danube"}


async def test_the_context_of_the_payload_is_the_deps_and_limits_are_kept(model: Any, double: OpenAIDouble) -> None:
    seen: list[Any] = []

    def look(context: RunContext[Any], text: str) -> str:
        """Look."""
        seen.append(context.deps)
        return text

    payload = {"messages": "Which river?", "context": {"user": "Ada"}}
    limits = pydantic_ai.UsageLimits(request_limit=2)
    result = await result_of(Agent(model, tools=[look]), payload, config={"usage_limits": limits, "deps": "others"})
    assert seen == [{"user": "Ada"}] * 2
    assert isinstance(result.cause, pydantic_ai.UsageLimitExceeded)
    assert len(double.requests) == 2
    await result_of(Agent(model, tools=[look]), config=lambda _: {"deps": "from the config"})
    assert seen[2:] == ["from the config"] * 2


@dataclass
class User:
    name: str
    age: int = 7


class UserModel(BaseModel):
    name: str
    age: int = 7


class Connection:
    pass


@pytest.mark.parametrize("kind", [User, UserModel])
async def test_the_deps_are_of_the_type_that_the_agent_has_for_them(
    model: Any, double: OpenAIDouble, kind: type[Any]
) -> None:
    seen: list[Any] = []

    def look(context: RunContext[Any], text: str) -> str:
        """Look."""
        seen.append(context.deps)
        return text

    double.calls = 2
    agent = Agent(model, deps_type=kind, tools=[look])
    assert (await result_of(agent, {"messages": "Which river?", "context": {"name": "Ada"}})).success
    assert seen == [kind(name="Ada")]


@pytest.mark.parametrize(
    ("kind", "context", "said"),
    [
        (User, {"age": "hush"}, "unusable 'name'"),
        (UserModel, {"name": "Ada", "age": "hush"}, "unusable 'age'"),
        (str, {"name": "hush"}, "fields of a str"),
        (Connection, {"name": "hush"}, "a Connection cannot be made of it, give it by config="),
    ],
)
async def test_deps_of_another_shape_are_refused_when_they_are_submitted_and_not_shown(
    kind: type[Any], context: Any, said: str
) -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=Agent(Scripted(), deps_type=kind), task_types=["ask"])
        with pytest.raises(UnusableTask) as refused:
            await supervisor.submit(Task("ask", {"messages": "Which river?", "context": context}))
    assert said in str(refused.value)
    assert "hush" not in str(refused.value)


# --- steps, approvals, retries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_each_call_of_the_model_and_each_tool_is_progress(model: Any, *, stream: bool) -> None:
    def look(text: str) -> str:
        """Look."""
        return text

    async with BackpressureSupervisor() as supervisor:
        agent = Agent(model, name="boatman", tools=[look])
        supervisor.register_worker("agent", handler=agent, task_types=["ask"], config={"stream": stream})
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        steps = [event.value for event in [e async for e in ticket.events()] if isinstance(event, TaskProgress)]
    steps = [each for each in steps if "step" in each]
    assert steps == [
        {"step": "model", "agent": "boatman"},
        {"step": "tool", "agent": "boatman", "tool": "look"},
        {"step": "model", "agent": "boatman"},
        {"step": "tool", "agent": "boatman", "tool": "look"},
        {"step": "model", "agent": "boatman"},
    ]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_event_handler_of_yours_sees_the_events_of_a_run(model: Any, *, stream: bool) -> None:
    seen: list[str] = []

    async def watch(_: Any, events: Any) -> None:
        seen.extend([type(event).__name__ async for event in events])

    agent = Agent(model)
    result = await result_of(agent, config={"stream": stream, "event_stream_handler": watch})
    assert result.result["output"] == ANSWER
    assert "PartDeltaEvent" in seen


async def test_a_tool_that_needs_an_approval_fails_the_task(model: Any, double: OpenAIDouble) -> None:
    def pay(text: str) -> str:
        """Pay."""
        return text

    tools = [pydantic_ai.Tool(pay, requires_approval=True)]
    result = await result_of(Agent(model, tools=tools, output_type=[str, pydantic_ai.DeferredToolRequests]))
    assert isinstance(result.cause, ApprovalNeeded)
    assert str(result.cause).startswith("The agent of worker 'agent' waits for an approval of 'pay'")
    result = await result_of(Agent(model, tools=tools))
    assert isinstance(result.cause, pydantic_ai.UserError)  # it has no output for such a request
    assert len(double.requests) == 2


async def test_a_tool_that_is_run_elsewhere_fails_the_task(model: Any) -> None:
    def pay(text: str) -> str:
        """Pay."""
        raise pydantic_ai.CallDeferred(metadata={"text": text})

    result = await result_of(Agent(model, tools=[pay], output_type=[str, pydantic_ai.DeferredToolRequests]))
    assert isinstance(result.cause, ToolResultNeeded)
    assert "waits for a result of 'pay'" in str(result.cause)


async def test_an_agent_that_answers_its_own_approvals_runs_on(model: Any) -> None:
    def pay(text: str) -> str:
        """Pay."""
        return text

    def approve(_: Any, requests: Any) -> Any:
        return requests.build_results(approve_all=True)

    tools = [pydantic_ai.Tool(pay, requires_approval=True)]
    agent = Agent(model, tools=tools, capabilities=[HandleDeferredToolCalls(handler=approve)])
    assert (await result_of(agent)).result["output"] == ANSWER


async def test_a_tool_that_asks_for_a_retry_costs_a_call_each_time_and_one_by_default(
    model: Any, double: OpenAIDouble
) -> None:
    double.calls = 10

    def look(text: str) -> str:
        """Look."""
        raise ModelRetry(text)

    result = await result_of(Agent(model, tools=[look]))
    assert isinstance(result.cause, pydantic_ai.UnexpectedModelBehavior)
    assert len(double.requests) == 2
    result = await result_of(Agent(model, tools=[look]), config={"retries": 4})
    assert len(double.requests) == 2 + 5


async def test_headers_tell_a_gateway_the_priority_of_the_task(model: Any, double: OpenAIDouble) -> None:
    def config(task: Task) -> dict[str, Any]:
        return {"model_settings": {"extra_headers": {"x-forebay-priority": task.priority.name.lower()}}}

    assert (await result_of(Agent(model), config=config, priority=Priority.HIGH)).success
    assert double.requests[0].headers["x-forebay-priority"] == "high"


# --- cancellation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancelled_run_leaves_no_asyncio_task(model: Any, double: OpenAIDouble, *, stream: bool) -> None:
    double.hold()
    async with BackpressureSupervisor() as supervisor:
        before = asyncio.all_tasks()
        supervisor.register_worker("agent", handler=Agent(model), task_types=["ask"], config={"stream": stream})
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await double.until_requests(1)
        ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
        kept = [each for each in asyncio.all_tasks() - before if "pydantic" in str(each.get_coro())]
        assert not kept


async def test_a_cancelled_run_lasts_until_its_tools_and_its_model_have_stopped() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(text: str) -> str:
        """Hang."""
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            await leave.wait()
        return text

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=Agent(Scripted(), tools=[slow]), task_types=["ask"])
        await check_cancelled_run_holds_its_slot(supervisor, entered, leave)


async def test_an_executor_of_yours_runs_the_plain_tools_of_its_agent() -> None:
    seen: list[str] = []

    def look(text: str) -> str:
        """Look."""
        seen.append(threading.current_thread().name)
        return text

    executor = DaemonThreadExecutor("mine")
    await result_of(Agent(Scripted(), tools=[look], capabilities=[UseThreadExecutor(executor)]))
    await result_of(Agent(Scripted(), tools=[look]))
    assert [name.partition("-")[0] for name in seen] == ["mine", "forebay"]


async def test_a_plain_tool_that_has_outlived_its_timeout_does_not_keep_the_result() -> None:
    leave, called = threading.Event(), []

    def stuck(text: str) -> str:
        """Hang once."""
        called.append(text)
        if len(called) == 1:
            leave.wait(20)
        return text

    try:
        agent = Agent(Scripted(), tools=[pydantic_ai.Tool(stuck, timeout=0.05)])
        async with asyncio.timeout(10):
            result = await result_of(agent)
            assert not leave.is_set()
    finally:
        leave.set()
    assert result.success


async def test_a_run_that_fails_in_one_tool_lasts_until_another_has_returned() -> None:
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def slow(text: str) -> str:
        """Take long."""
        entered.set()
        assert leave.wait(20)
        left.set()
        return text

    def boom(text: str) -> str:
        """Fail."""
        assert entered.wait(20)
        raise ValueError(text)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=Agent(Scripted(), tools=[slow, boom]), task_types=["ask"])
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        threading.Timer(0.3, leave.set).start()  # long after the other one has failed
        result = await ticket  # of one answer, which calls both
        assert left.is_set()
    assert isinstance(result.cause, ValueError)


# --- models that fall back -------------------------------------------------------------------------------------------


async def test_a_model_that_falls_back_goes_to_the_next_one_for_a_failed_call(model: Any, double: OpenAIDouble) -> None:
    double.refuse(400, times=1)
    assert (await result_of(Agent(FallbackModel(model, Scripted())))).success
    assert len(double.requests) == 1


@pytest.mark.parametrize("way", ["bound", "limiter"])
async def test_a_model_that_falls_back_does_so_for_a_call_that_its_upstream_rejects_if_it_is_told(
    double: OpenAIDouble, way: str
) -> None:
    upstream = Upstream("key", provider="openai", quotas=[Quota(requests=1, per="day")])
    async with AsyncOpenAI(api_key="sk-test", base_url=double.url) as client:
        provider = OpenAIProvider(openai_client=upstream.bind(client) if way == "bound" else client)
        model: Any = OpenAIChatModel("gpt-4o-mini", provider=provider)
        if way == "limiter":
            model = ConcurrencyLimitedModel(model, UpstreamLimiter(upstream))
        other = Scripted(custom_output_text="The Inn.")
        agent = Agent(FallbackModel(model, other, fallback_on=(ModelAPIError, Overloaded)))
        assert [(await agent.run("Which river?")).output for _ in range(2)] == [ANSWER, "The Inn."]
        with pytest.raises(Overloaded):
            await Agent(FallbackModel(model, other)).run("Which river?")
    assert len(double.requests) == 1
