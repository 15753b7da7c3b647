"""What only the adapter of the OpenAI Agents SDK does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import ANSWER, OpenAIDouble
from tests.frameworks.waiting import check_cancelled_run_holds_its_slot, until

if "openai_agents" not in INSTALLED:
    pytest.skip("it runs in an environment of its own: scripts/test.sh makes it", allow_module_level=True)

import agents
from openai import AsyncOpenAI
from pydantic import BaseModel

from forebay import BackpressureSupervisor, Priority, Task, TaskStatus
from forebay.adapters import as_handler
from forebay.adapters.chat import ApprovalNeeded
from forebay.errors import InvalidHandler, InvalidSetting

agents.set_tracing_disabled(True)


@pytest.fixture
async def model(double: OpenAIDouble) -> AsyncIterator[Any]:
    async with AsyncOpenAI(api_key="sk-test", base_url=double.url) as client:
        yield agents.OpenAIChatCompletionsModel("gpt-4o-mini", client)


async def result_of(agent: Any, payload: Any = "Which river?", *, config: Any = None, **fields: Any) -> Any:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=agent, task_types=["ask"], config=config)
        return await (await supervisor.submit(Task("ask", payload, **fields)))


def test_an_object_of_the_sdk_that_is_no_agent_is_rejected_with_advice() -> None:
    with pytest.raises(InvalidHandler, match="pass an Agent"):
        as_handler(agents.RunConfig())


def test_an_option_that_the_runner_does_not_have_is_rejected() -> None:
    agent = agents.Agent(name="sample")
    with pytest.raises(InvalidSetting, match=r"max_turn.*takes .*max_turns"):
        as_handler(agent, config={"max_turn": 3})


async def test_a_config_made_for_a_task_is_checked_when_it_is_made(model: Any) -> None:
    agent = agents.Agent(name="sample", model=model)
    result = await result_of(agent, config=lambda _: {"max_turn": 3})
    assert isinstance(result.cause, InvalidSetting)
    result = await result_of(agent, config=lambda _: 3)
    assert isinstance(result.cause, InvalidSetting)


async def test_an_agent_derived_from_theirs_is_one(model: Any) -> None:
    class Mine(agents.Agent):  # type: ignore[misc]
        pass

    assert (await result_of(Mine(name="mine", model=model))).result["agent"] == "mine"


async def test_the_context_of_the_payload_is_that_of_the_run_and_max_turns_is_kept(
    model: Any, double: OpenAIDouble
) -> None:
    seen: list[Any] = []

    @agents.function_tool  # type: ignore[untyped-decorator]
    def look(context: agents.RunContextWrapper[Any], text: str) -> str:
        """Look."""
        seen.append(context.context)
        return text

    agent = agents.Agent(name="sample", model=model, tools=[look])
    payload = {"messages": "Which river?", "context": {"user": "Ada"}}
    result = await result_of(agent, payload, config={"max_turns": 2})
    assert seen == [{"user": "Ada"}] * 2
    assert isinstance(result.cause, agents.MaxTurnsExceeded)
    assert len(double.requests) == 2


async def test_a_structured_output_is_plain_data(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseModel):
        river: str

    monkeypatch.setattr("tests.frameworks.openai_double.ANSWER", '{"river": "Danube"}')
    agent = agents.Agent(name="sample", model=model, output_type=Answer)
    assert (await result_of(agent)).result["output"] == {"river": "Danube"}


async def test_a_session_for_each_conversation_keeps_what_was_said(model: Any, double: OpenAIDouble) -> None:
    double.calls = 1
    sessions: dict[str, Any] = {}

    class Memory(agents.SessionABC):  # type: ignore[misc]
        session_settings = None

        def __init__(self, session_id: str) -> None:
            self.session_id = session_id
            self.items: list[Any] = []

        async def get_items(self, limit: int | None = None) -> list[Any]:  # noqa: ARG002
            return list(self.items)

        async def add_items(self, items: list[Any]) -> None:
            self.items += items

        async def pop_item(self) -> Any:
            return self.items.pop()

        async def clear_session(self) -> None:
            self.items.clear()

    def config(task: Task) -> dict[str, Any]:
        return {"session": sessions.setdefault(str(task.thread_id), Memory(str(task.thread_id)))}

    agent = agents.Agent(name="sample", model=model)
    for thread in ("a", "b", "a"):
        assert (await result_of(agent, thread, config=config, thread_id=thread)).success
    said = [[each["content"] for each in call.body["messages"] if each["role"] == "user"] for call in double.requests]
    assert said == [["a"], ["b"], ["a", "a"]]


async def test_a_tool_that_needs_an_approval_fails_the_task(model: Any) -> None:
    @agents.function_tool(needs_approval=True)  # type: ignore[untyped-decorator]
    def pay(text: str) -> str:
        """Pay."""
        return text

    result = await result_of(agents.Agent(name="sample", model=model, tools=[pay]))
    assert isinstance(result.cause, ApprovalNeeded)
    assert str(result.cause).startswith("The agent of worker 'agent' waits for an approval of 'pay'")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancelled_run_leaves_no_asyncio_task(model: Any, double: OpenAIDouble, *, stream: bool) -> None:
    double.hold()
    async with BackpressureSupervisor() as supervisor:
        before = asyncio.all_tasks()
        agent = agents.Agent(name="sample", model=model)
        supervisor.register_worker("agent", handler=agent, task_types=["ask"], config={"stream": stream})
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await double.until_requests(1)
        ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
        kept = {each.get_name() for each in asyncio.all_tasks() - before if "agents" in str(each.get_coro())}
        assert not kept


async def test_headers_tell_a_gateway_the_priority_of_the_task(model: Any, double: OpenAIDouble) -> None:
    def config(task: Task) -> dict[str, Any]:
        headers = {"x-forebay-priority": task.priority.name.lower()}
        return {"run_config": agents.RunConfig(model_settings=agents.ModelSettings(extra_headers=headers))}

    agent = agents.Agent(name="sample", model=model)
    result = await result_of(agent, config=config, priority=Priority.HIGH)
    assert result.result["output"] == ANSWER
    assert double.requests[0].headers["x-forebay-priority"] == "high"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancelled_run_lasts_until_its_model_has_stopped(*, stream: bool) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    class Slow(agents.Model):  # type: ignore[misc]
        async def get_response(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            await self.hang()

        async def stream_response(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            await self.hang()
            yield None

        async def hang(self) -> None:
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                await leave.wait()

    async with BackpressureSupervisor() as supervisor:
        agent = agents.Agent(name="sample", model=Slow())
        supervisor.register_worker("agent", handler=agent, task_types=["ask"], config={"stream": stream})
        await check_cancelled_run_holds_its_slot(supervisor, entered, leave)
