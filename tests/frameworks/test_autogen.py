"""What only the adapter of AutoGen does."""

from __future__ import annotations

import asyncio
import copy
import gc
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import pytest
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import ANSWER, OpenAIDouble
from tests.frameworks.waiting import check_cancelled_run_holds_its_slot, until

if "autogen" not in INSTALLED:
    pytest.skip("it runs in an environment of its own: scripts/test.sh makes it", allow_module_level=True)

import httpx2
from autogen_agentchat.agents import (
    AssistantAgent,
    BaseChatAgent,
    CodeExecutorAgent,
    MessageFilterAgent,
    MessageFilterConfig,
    SocietyOfMindAgent,
)
from autogen_agentchat.agents._code_executor_agent import ApprovalResponse
from autogen_agentchat.base import Response
from autogen_agentchat.conditions import MaxMessageTermination, TextMentionTermination, TimeoutTermination
from autogen_agentchat.messages import BaseChatMessage, TextMessage
from autogen_agentchat.teams import (
    DiGraphBuilder,
    GraphFlow,
    MagenticOneGroupChat,
    RoundRobinGroupChat,
    SelectorGroupChat,
    Swarm,
)
from autogen_agentchat.tools import AgentTool
from autogen_core import CancellationToken, FunctionCall, RoutedAgent, SingleThreadedAgentRuntime
from autogen_core.code_executor import CodeExecutor
from autogen_core.models import CreateResult, RequestUsage
from autogen_core.tools import FunctionTool
from autogen_ext.models.cache import ChatCompletionCache
from autogen_ext.models.openai import AzureOpenAIChatCompletionClient, OpenAIChatCompletionClient
from autogen_ext.models.replay import ReplayChatCompletionClient
from pydantic import BaseModel

from forebay import BackpressureSupervisor, Priority, Task, TaskStatus
from forebay.adapters import as_handler
from forebay.adapters.autogen.agent_copies import AgentCopies
from forebay.context import running_task
from forebay.errors import AlreadyBound, InvalidHandler, InvalidSetting, NotBindable, NotGuardable, UnusableTask
from forebay.retry import Retry
from forebay.upstream import Upstream
from forebay.upstream.sdk_exceptions import find_error_answer

MODEL = "gpt-4o-mini-2024-07-18"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)


def note(text: str) -> str:
    """Take a note."""
    return f"noted {text}"


OPEN: list[Any] = []


@pytest.fixture(autouse=True)
async def closed_clients() -> AsyncIterator[None]:
    """Close the model clients of a test at its end."""
    yield
    while OPEN:
        await OPEN.pop().close()


def client_of(double: OpenAIDouble, **settings: Any) -> Any:
    client = OpenAIChatCompletionClient(**{"model": MODEL, "api_key": "sk-test", "base_url": double.url, **settings})
    OPEN.append(client)
    return client


def assistant(double: OpenAIDouble, *tools: Any, name: str = "sample", client: Any = None, **settings: Any) -> Any:
    made = {"system_message": "Take notes.", "max_tool_iterations": 10, **settings}
    return AssistantAgent(name, client or client_of(double), tools=list(tools), **made)


def said(double: OpenAIDouble, number: int = -1) -> list[tuple[str, Any]]:
    """Return the roles and contents of a request, without that of the system."""
    return [(each["role"], each.get("content")) for each in double.requests[number].body["messages"]][1:]


async def results_of(count: int, **settings: Any) -> list[Any]:
    """Return the results of tasks that run at once."""
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", task_types=["ask"], max_concurrent=count, **settings)
        tickets = [await supervisor.submit(Task("ask", f"river {number}")) for number in range(count)]
        return [await ticket for ticket in tickets]


async def result_of(agent: Any, payload: Any = "Which river?", **fields: Any) -> Any:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=agent, task_types=["ask"])
        return await (await supervisor.submit(Task("ask", payload, **fields)))


class Counter(BaseChatAgent):  # type: ignore[misc]  # without its package it has no type
    """An agent of one's own, which keeps what it was told."""

    produced_message_types = (TextMessage,)

    def __init__(self, name: str = "counter", told: list[str] | None = None) -> None:
        super().__init__(name, "Counts.")
        self.told = told or []

    async def on_messages(self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken) -> Response:  # noqa: ARG002
        for message in messages:
            self.told.append(message.to_model_text())
            await asyncio.sleep(0)
        return Response(chat_message=TextMessage(content=" ".join(self.told), source=self.name))

    async def on_reset(self, cancellation_token: CancellationToken) -> None:  # noqa: ARG002
        self.told.clear()


class Locked(Counter):
    """An agent that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


# --- what is registered ----------------------------------------------------------------------------------------------


class Core(RoutedAgent):  # type: ignore[misc]  # as above
    """An agent of autogen-core."""


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: OpenAIChatCompletionClient(model=MODEL, api_key="sk-test"), "pass an agent or a team of AgentChat"),
        (lambda: FunctionTool(note, description="Notes."), "pass an agent or a team of AgentChat"),
        (lambda: MaxMessageTermination(3), "pass an agent or a team of AgentChat"),
        (SingleThreadedAgentRuntime, "pass an agent or a team of AgentChat"),
        (lambda: AssistantAgent, "it is a class"),
        (lambda: RoundRobinGroupChat([Counter()], runtime=SingleThreadedAgentRuntime()), "leave out runtime="),
        (Locked, "pass factory="),
        (lambda: RoundRobinGroupChat([Locked()]), "pass factory="),
    ],
)
async def test_an_object_that_cannot_be_run_many_times_is_rejected_with_advice(
    make: Callable[[], Any], hint: str
) -> None:
    with pytest.raises(InvalidHandler, match=hint):
        as_handler(make())


async def test_an_agent_of_the_core_is_rejected_with_advice() -> None:
    runtime = SingleThreadedAgentRuntime()
    await Core.register(runtime, "core", lambda: Core("core"))
    agent = await runtime._get_agent(await runtime.get("core"))
    with pytest.raises(InvalidHandler, match="gets its messages from its runtime"):
        as_handler(agent)


async def test_a_team_that_has_been_run_is_rejected_with_advice() -> None:
    team = RoundRobinGroupChat([Counter()], max_turns=1)
    await team.run(task="Which river?")
    with pytest.raises(InvalidHandler, match="it has been run"):
        as_handler(team)


def test_a_run_has_no_options(double: OpenAIDouble) -> None:
    with pytest.raises(InvalidSetting, match=r"max_turns.*takes none"):
        as_handler(assistant(double), config={"max_turns": 3})


# --- each run has a copy ---------------------------------------------------------------------------------------------


async def test_each_run_starts_with_the_conversation_that_was_registered(double: OpenAIDouble) -> None:
    double.calls = 1
    agent = assistant(double)
    await agent.run(task="I am Ada.")
    results = await results_of(2, handler=agent)
    assert all(result.success for result in results)
    assert [said(double, number) for number in (1, 2)] == [
        [("user", "I am Ada."), ("assistant", ANSWER), ("user", f"river {number}")] for number in range(2)
    ]
    assert len(await agent.model_context.get_messages()) == 2


async def test_an_agent_of_ones_own_is_copied_with_its_attributes() -> None:
    agent = Counter(told=["seen"])
    results = await results_of(4, handler=agent)
    assert [result.result["output"] for result in results] == [f"seen river {number}" for number in range(4)]
    assert agent.told == ["seen"]


async def test_a_factory_makes_agents_that_cannot_be_copied() -> None:
    results = await results_of(4, factory=Locked)
    assert [result.result["output"] for result in results] == [f"river {number}" for number in range(4)]
    team = partial(lambda: RoundRobinGroupChat([Locked()], max_turns=1))
    results = await results_of(4, factory=team)
    assert [result.result["output"] for result in results] == [f"river {number}" for number in range(4)]


async def test_an_agent_with_a_code_executor_needs_a_factory() -> None:
    class Executor(CodeExecutor):  # type: ignore[misc]  # as above
        async def execute_code_blocks(self, *args: Any) -> Any: ...
        async def start(self) -> None: ...
        async def stop(self) -> None: ...
        async def restart(self) -> None: ...

    def make() -> Any:
        return CodeExecutorAgent(
            "coder", Executor(), approval_func=lambda _: ApprovalResponse(approved=True, reason="")
        )

    with pytest.raises(InvalidHandler, match="pass factory="):
        as_handler(make())
    (result,) = await results_of(1, factory=make)
    assert result.success, result.error


async def test_an_agent_inside_a_tool_is_copied_too(double: OpenAIDouble) -> None:
    double.calls = 2
    inner = Counter("inner")
    outer = assistant(double, AgentTool(inner, return_value_as_last_message=True))
    results = await results_of(3, handler=outer)
    for number, result in enumerate(results):
        assert result.success, result.error
        messages = result.result["messages"]
        assert [each["role"] for each in messages] == ["user", "assistant", "tool", "assistant"]
        assert messages[2]["content"] == "note 0"
        assert messages[0]["content"] == f"river {number}"
        assert result.result["agent"] == "sample"
    assert inner.told == []


async def test_the_time_of_a_condition_starts_with_the_run() -> None:
    team = RoundRobinGroupChat([Counter()], termination_condition=TimeoutTermination(60) | MaxMessageTermination(3))
    team._termination_condition._conditions[0]._start_time -= 120
    result = await result_of(team)
    assert result.result["stop_reason"] == "Maximum number of messages 3 reached, current message count: 3"


def test_a_copy_has_the_model_client_and_the_tools_of_the_original(double: OpenAIDouble) -> None:
    async def look(text: str) -> str:
        return text

    agent = assistant(double, look)
    made = AgentCopies(agent).make()
    assert made._model_client is agent._model_client
    assert made._model_context is not agent._model_context
    assert made._workbench[0]._tools[0].schema == agent._workbench[0]._tools[0].schema


# --- teams -----------------------------------------------------------------------------------------------------------


async def test_a_handoff_is_progress_and_names_the_last_agent(double: OpenAIDouble) -> None:
    double.calls = 2
    first = assistant(double, name="first", handoffs=["second"])
    second = assistant(double, name="second")
    team = Swarm([first, second], termination_condition=TextMentionTermination("Danube"))
    result = await result_of(team)
    assert result.success, result.error
    assert (result.result["agent"], result.result["output"]) == ("second", ANSWER)
    assert result.result["usage"]["requests"] == 2


async def test_teams_of_all_kinds_run_and_mix_nothing(double: OpenAIDouble) -> None:
    double.calls = 1
    graph = DiGraphBuilder()
    one, two = (assistant(double, name=name) for name in ("one", "two"))
    graph.add_node(one).add_node(two).add_edge(one, two)
    selector = SelectorGroupChat([one, two], client_of(double), selector_func=lambda _: "two", max_turns=1)
    flow = GraphFlow([one, two], graph.build())
    society = SocietyOfMindAgent("society", RoundRobinGroupChat([one], max_turns=1), client_of(double))
    nested = RoundRobinGroupChat([RoundRobinGroupChat([one], max_turns=1), two], max_turns=2)
    for team, last in ((selector, "two"), (flow, "two"), (society, "society"), (nested, "two")):
        for number, result in enumerate(await results_of(3, handler=team)):
            assert result.success, result.error
            told = [each["content"] for each in result.result["messages"] if each["role"] == "user"]
            assert told == [f"river {number}"]
            assert (result.result["agent"], result.result["output"]) == (last, ANSWER)


async def test_a_magentic_team_runs(double: OpenAIDouble) -> None:
    double.calls = 1

    def ledger(is_satisfied: str) -> str:
        return f"""{{"is_request_satisfied": {{"reason": "", "answer": {is_satisfied}}},
            "is_progress_being_made": {{"reason": "", "answer": true}},
            "is_in_loop": {{"reason": "", "answer": false}},
            "instruction_or_question": {{"reason": "", "answer": "Look."}},
            "next_speaker": {{"reason": "", "answer": "one"}}}}"""

    replies = ["facts", "plan", ledger("false"), ledger("true"), "It is the Danube."]
    team = MagenticOneGroupChat([assistant(double, name="one")], ReplayChatCompletionClient(replies))
    result = await result_of(team)
    assert result.success, result.error
    assert result.result["output"] == "It is the Danube."
    assert ANSWER in [each["content"] for each in result.result["messages"]]


async def test_an_error_inside_nested_teams_is_that_of_the_client(double: OpenAIDouble) -> None:
    double.refuse(400, x_request_id="r7")
    inner = RoundRobinGroupChat([assistant(double)], max_turns=1, name="inner")
    result = await result_of(RoundRobinGroupChat([inner], max_turns=1))
    assert result.cause is not None
    found = find_error_answer(result.cause)
    assert found is not None
    assert (found.status, found.headers.get("x-request-id")) == (400, "r7")


async def test_an_error_of_an_agent_of_a_team_is_its_own() -> None:
    class Failing(Counter):
        async def on_messages(self, *_: Any) -> Any:
            raise LookupError("no river")

    result = await result_of(RoundRobinGroupChat([Failing()], max_turns=1))
    assert result.error == "LookupError: no river"


async def test_a_team_goes_on_from_a_conversation(double: OpenAIDouble) -> None:
    double.calls = 1
    one, two = (assistant(double, name=name) for name in ("one", "two"))
    asked: list[Any] = []

    def select(thread: Sequence[Any]) -> str:
        asked.append([message.to_text() for message in thread])
        return "two"

    team = SelectorGroupChat([one, two], client_of(double), selector_func=select, max_turns=1)
    messages = [
        {"role": "user", "content": "Which river?"},
        {"role": "assistant", "name": "one", "content": "The Rhine?"},
        {"role": "assistant", "name": "two", "content": "No, another."},
        {"role": "user", "content": "Which one?"},
    ]
    result = await result_of(team, messages)
    assert result.success, result.error
    assert said(double) == [
        ("user", "Which river?"),
        ("user", "The Rhine?"),
        ("assistant", "No, another."),
        ("user", "Which one?"),
    ]
    assert asked == [["Which river?", "The Rhine?", "No, another.", "Which one?"]]
    assert result.result["messages"] == [*messages, {"role": "assistant", "content": ANSWER, "name": "two"}]


@pytest.mark.parametrize("kind", ["round", "selector", "swarm", "graph", "nested"])
async def test_teams_of_all_kinds_go_on_from_a_conversation(double: OpenAIDouble, kind: str) -> None:
    double.calls = 1
    one, two = (assistant(double, name=name) for name in ("one", "two"))
    ends = MaxMessageTermination(2)
    graph = DiGraphBuilder().add_node(one).add_node(two).add_edge(one, two).build()
    teams = {
        "round": RoundRobinGroupChat([one, two], termination_condition=ends),
        "selector": SelectorGroupChat([one, two], client_of(double), selector_func=lambda _: "one", max_turns=1),
        "swarm": Swarm([one, two], termination_condition=ends),
        "graph": GraphFlow([one, two], graph, termination_condition=ends),
        "nested": RoundRobinGroupChat([RoundRobinGroupChat([one], max_turns=1, name="inner")], max_turns=1),
    }
    first = await result_of(teams[kind])
    again = await result_of(teams[kind], [*first.result["messages"], {"role": "user", "content": "And where?"}])
    assert again.success, again.error
    assert again.result["agent"] == "one"
    assert said(double) == [("user", "Which river?"), ("assistant", ANSWER), ("user", "And where?")]


# --- payload and result ----------------------------------------------------------------------------------------------


async def test_an_agent_goes_on_from_a_conversation_with_its_calls(double: OpenAIDouble) -> None:
    agent = assistant(double, note)
    first = await result_of(agent)
    payload = [*first.result["messages"], {"role": "user", "content": "And where?"}]
    assert (await result_of(agent, payload)).success
    sent = double.requests[3].body["messages"]
    assert [each["role"] for each in sent[1:]] == ["user", *(["assistant", "tool"] * 2), "assistant", "user"]
    assert sent[2]["tool_calls"][0]["function"] == {"name": "note", "arguments": '{"text": "note 0"}'}
    assert sent[3]["content"] == "noted note 0"


async def test_an_agent_without_a_model_context_is_given_the_whole_conversation() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert (await result_of(Counter(), messages)).result["output"] == "a b c"


async def test_a_message_may_be_empty(double: OpenAIDouble) -> None:
    double.calls = 1
    assert (await result_of(assistant(double), [{"role": "user", "content": ""}])).success
    assert said(double) == [("user", "")]


async def test_the_answer_of_an_agent_that_wraps_another_is_that_of_the_other(double: OpenAIDouble) -> None:
    double.calls = 1
    agent = MessageFilterAgent("filter", assistant(double), filter=MessageFilterConfig(per_source=[]))
    result = await result_of(agent)
    assert (result.result["agent"], result.result["output"]) == ("sample", ANSWER)
    assert result.result["messages"][-1] == {"role": "assistant", "content": ANSWER}


async def test_a_message_may_have_images(double: OpenAIDouble) -> None:
    double.calls = 1
    content = [{"type": "text", "text": "Which river?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    assert (await result_of(assistant(double), [{"role": "user", "content": content}])).success
    sent = double.requests[0].body["messages"][1]["content"]
    assert [part["type"] for part in sent] == ["text", "image_url"]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "robot", "content": "Which river?"}, "item 0 has no role of user"),
        ({"content": "Which river?"}, "item 0 has no role of user"),
        ({"role": "user", "content": 7}, "item 0 has content that is not text"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "item 0 has content"),
        ({"role": "user", "content": [{"image_url": {"url": "file:///river.png"}}]}, "item 0 has content"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "item 0 has content"),
        ({"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]}, "item 0 has"),
        ({"role": "user", "content": [{"type": "text", "text": 7}]}, "item 0 has content"),
        ({"role": "user", "content": [{"image_url": {"url": "data:image/png;base64,AAAA"}}]}, "item 0 has content"),
    ],
)
async def test_a_message_that_autogen_cannot_read_is_refused_when_it_is_submitted(
    double: OpenAIDouble, message: Any, fault: str
) -> None:
    with pytest.raises(UnusableTask, match=fault):
        await result_of(assistant(double), [message])


@pytest.mark.filterwarnings("ignore:Pydantic serializer:UserWarning")  # of AutoGen's own client
async def test_a_structured_output_is_plain_data(double: OpenAIDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseModel):
        river: str

    monkeypatch.setattr("tests.frameworks.openai_double.ANSWER", '{"river": "Danube"}')
    result = await result_of(assistant(double, output_content_type=Answer))
    assert result.success, result.error
    assert result.result["output"] == {"river": "Danube"}


async def test_the_context_of_the_payload_is_in_the_task_that_a_tool_sees(double: OpenAIDouble) -> None:
    seen: list[Any] = []

    def look(text: str) -> str:
        """Look."""
        running = running_task()
        seen.append(None if running is None else running.task.payload["context"])
        return text

    payload = {"messages": "Which river?", "context": {"user": "Ada"}}
    assert (await result_of(assistant(double, look), payload)).success
    assert seen == [{"user": "Ada"}] * 2


async def test_headers_tell_a_gateway_the_priority_of_the_task(double: OpenAIDouble) -> None:
    async def tell(request: httpx2.Request) -> None:
        running = running_task()
        assert running is not None
        request.headers["x-forebay-priority"] = running.task.priority.name.lower()

    double.calls = 1
    async with httpx2.AsyncClient(event_hooks={"request": [tell]}) as http_client:
        agent = assistant(double, client=client_of(double, http_client=http_client))
        assert (await result_of(agent, priority=Priority.HIGH)).success
    assert double.requests[0].headers["x-forebay-priority"] == "high"


# --- cancellation ----------------------------------------------------------------------------------------------------


def _team(agent: Any) -> Any:
    return RoundRobinGroupChat([agent], max_turns=1)


def _nested(agent: Any) -> Any:
    return _team(_team(agent))


def _alone(agent: Any) -> Any:
    return agent


@pytest.mark.parametrize("around", [_alone, _team, _nested])
@pytest.mark.parametrize("is_in_tool", [True, False])
async def test_a_cancelled_run_leaves_no_asyncio_task(
    double: OpenAIDouble, around: Callable[[Any], Any], caplog: pytest.LogCaptureFixture, *, is_in_tool: bool
) -> None:
    entered, ended = asyncio.Event(), asyncio.Event()

    async def hang(text: str) -> str:
        """Hang."""
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return text

    async with BackpressureSupervisor() as supervisor:
        before = asyncio.all_tasks()
        agent = around(assistant(double, hang))
        supervisor.register_worker("agent", handler=agent, task_types=["ask"])
        if not is_in_tool:
            double.hold()
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await (entered.wait() if is_in_tool else double.until_requests(1))
        ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
        assert ended.is_set() == is_in_tool
        kept = {str(each.get_coro()) for each in asyncio.all_tasks() - before if "autogen" in str(each.get_coro())}
        assert not kept
    assert len(double.requests) == 1
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda double, one, two: SelectorGroupChat([one, two], client_of(double), max_turns=2),
        lambda double, one, _: MagenticOneGroupChat([one], client_of(double)),
        lambda double, one, _: SocietyOfMindAgent("society", _team(one), client_of(double)),
        lambda double, *_: AssistantAgent("sample", client_of(double, stream_options={}), model_client_stream=True),
    ],
    ids=["selector", "orchestrator", "society", "stream"],
)
async def test_a_cancelled_run_stops_in_the_call_of_any_part(double: OpenAIDouble, make: Any) -> None:
    double.hold()
    one, two = (assistant(double, name=name) for name in ("one", "two"))
    async with BackpressureSupervisor() as supervisor:
        before = asyncio.all_tasks()
        supervisor.register_worker("agent", handler=make(double, one, two), task_types=["ask"])
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await double.until_requests(1)
        ticket.cancel()
        await double.until(lambda double: double.requests[0].status == 499)
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
        kept = {str(each.get_coro()) for each in asyncio.all_tasks() - before if "autogen" in str(each.get_coro())}
        assert not kept
    assert len(double.requests) == 1


@pytest.mark.parametrize("around", [_alone, _team])
async def test_a_cancelled_run_lasts_until_its_tools_have_ended(
    double: OpenAIDouble, around: Callable[[Any], Any]
) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(text: str) -> str:
        """Clean up slowly."""
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            await leave.wait()
        return text

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=around(assistant(double, slow)), task_types=["ask"])
        await check_cancelled_run_holds_its_slot(supervisor, entered, leave)


class Turns(Counter):
    """An agent that notes its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        super().__init__(name)
        self.note = turns.append

    async def on_messages(self, *given: Any) -> Any:
        self.note(self.name)
        return await super().on_messages(*given)


def _calling(turns: list[str], name: str = "calling") -> Any:
    """Return an agent that calls a tool twice, and makes no request."""

    async def look(text: str) -> str:
        """Look."""
        turns.append(text)
        await asyncio.sleep(0)
        return text

    call = CreateResult(
        finish_reason="function_calls",
        content=[FunctionCall(id="1", name="look", arguments='{"text": "look"}')],
        usage=RequestUsage(prompt_tokens=1, completion_tokens=1),
        cached=False,
    )
    info = {"family": "unknown", **dict.fromkeys(("vision", "json_output", "structured_output"), False)}
    client = ReplayChatCompletionClient([call, call, "Done."], model_info={**info, "function_calling": True})
    return AssistantAgent(name, client, tools=[look], max_tool_iterations=10)


def two_agents(turns: list[str]) -> Any:
    """Return a team of two agents that make no request."""
    return RoundRobinGroupChat([Turns("one", turns), Turns("two", turns)], max_turns=3)


def fan(turns: list[str]) -> Any:
    """Return a graph whose first agent is followed by two at once."""
    one, two, three = (Turns(name, turns) for name in ("one", "two", "three"))
    builder = DiGraphBuilder()
    builder.add_node(one).add_node(two).add_node(three).add_edge(one, two).add_edge(one, three)
    return GraphFlow([one, two, three], builder.build())


@pytest.mark.parametrize(
    "make",
    [
        lambda turns: _team(_calling(turns)),
        lambda turns: _nested(_calling(turns)),
        two_agents,
        fan,
        _calling,
    ],
    ids=["team", "nested", "agents", "graph", "alone"],
)
async def test_a_run_that_is_cancelled_at_any_time_ends_and_begins_nothing_more(
    make: Callable[[list[str]], Any], caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    for steps in range(1000):
        turns: list[str] = []
        agent = make(turns)
        running = asyncio.ensure_future(as_handler(agent).call(Task("ask", "Which river?")))
        for _ in range(steps):
            await asyncio.sleep(0)
        if running.done():
            break
        running.cancel()
        await asyncio.sleep(0)  # it is delivered
        begun = len(turns)
        async with asyncio.timeout(5):
            await asyncio.wait([running])
        assert running.cancelled()
        assert (steps, len(turns)) == (steps, begun)
        assert asyncio.all_tasks() == before
    assert steps > 10
    assert (await running)["agent"] in ("calling", "one", "two", "three")
    assert len(turns) > 1
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_a_cancelled_run_does_not_stop_the_task_that_its_tool_has_submitted(double: OpenAIDouble) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()
    inner: list[Any] = []

    class Slow(Counter):
        async def on_messages(self, *_: Any) -> Any:
            entered.set()
            await leave.wait()
            return Response(chat_message=TextMessage(content="here", source=self.name))

    async with BackpressureSupervisor() as supervisor:

        async def delegate(text: str) -> str:
            """Delegate."""
            inner.append(await supervisor.submit(Task("other", text)))
            await asyncio.Event().wait()
            return text

        supervisor.register_worker("agent", handler=assistant(double, delegate), task_types=["ask"])
        other = RoundRobinGroupChat([Slow()], max_turns=1)
        supervisor.register_worker("other", handler=other, task_types=["other"])
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await entered.wait()
        ticket.cancel()
        await ticket
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
        leave.set()
        assert (await inner[0]).success


# --- tools that exit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_tool_that_exits_fails_alone(double: OpenAIDouble, *, is_async: bool) -> None:
    def leave(text: str) -> str:  # noqa: ARG001
        """Leave."""
        sys.exit(3)

    async def leave_async(text: str) -> str:  # noqa: ARG001
        """Leave."""
        sys.exit(3)

    double.calls = 2
    assert (await result_of(assistant(double, leave_async if is_async else leave))).success
    assert said(double)[-1] == ("tool", "the tool raised SystemExit")


async def test_a_tool_that_was_cancelled_by_itself_fails_alone(double: OpenAIDouble) -> None:
    async def look(text: str) -> str:
        """Look."""
        inner = asyncio.ensure_future(asyncio.Event().wait())
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner
        return text

    double.calls = 2
    async with asyncio.timeout(20):
        assert (await result_of(assistant(double, look))).success
    assert said(double)[-1] == ("tool", "what the tool has waited for was cancelled")


async def test_an_agent_that_exits_fails_its_task() -> None:
    class Leaving(Counter):
        async def on_messages(self, *_: Any) -> Any:
            sys.exit(3)

    result = await result_of(Leaving())
    assert result.status is TaskStatus.FAILED


# --- binding ---------------------------------------------------------------------------------------------------------


async def test_a_copy_of_a_bound_model_client_is_bound(double: OpenAIDouble) -> None:
    double.calls = 1
    upstream = Upstream("key", provider="openai")
    client = client_of(double)
    bound = upstream.bind(client)
    assert type(bound) is type(client)
    assert upstream.bind(bound) is bound
    assert client._client.max_retries == 2
    for each in (bound, copy.copy(bound)):
        assert each._client.max_retries == 0
        await assistant(double, client=each).run(task="Which river?")
    assert upstream.statistics().accounts[0].sent == 2
    with pytest.raises(AlreadyBound):
        Upstream("other").bind(bound)
    bound.dump_component()
    await client.close()


async def test_a_model_client_on_a_bound_http_client_is_bound(double: OpenAIDouble) -> None:
    double.refuse(500)
    upstream = Upstream("key", provider="openai", retry=Retry(max_attempts=1))
    async with httpx2.AsyncClient() as http_client:
        client = client_of(double, http_client=upstream.bind(http_client), max_retries=0)
        result = await result_of(assistant(double, client=client))
    assert result.status is TaskStatus.FAILED
    assert (len(double.requests), upstream.statistics().accounts[0].sent) == (1, 1)


async def test_a_cache_before_a_model_client_is_bound(double: OpenAIDouble) -> None:
    double.calls = 1
    upstream = Upstream("key", provider="openai")
    cached = upstream.bind(ChatCompletionCache(client_of(double)))
    assert upstream.bind(cached) is cached
    for _ in range(2):
        await assistant(double, client=cached).run(task="Which river?")
    assert upstream.statistics().accounts[0].sent == 1


def test_an_azure_client_is_bound() -> None:
    client = AzureOpenAIChatCompletionClient(
        model=MODEL, api_key="k", azure_endpoint="https://azure.invalid", api_version="2024-06-01", azure_deployment="d"
    )
    assert Upstream("key").bind(client)._client.max_retries == 0


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (Counter, "bind the model client that it is made with"),
        (lambda: RoundRobinGroupChat([Counter()]), "bind the model client that it is made with"),
        (lambda: FunctionTool(note, description="Notes."), "bind the model client that it is made with"),
        (lambda: ReplayChatCompletionClient([]), "with the base_url of an endpoint"),
    ],
)
def test_what_cannot_be_bound_is_refused_with_advice(make: Callable[[], Any], advice: str) -> None:
    with pytest.raises(NotBindable, match=advice):
        Upstream("key").bind(make())


async def test_the_function_of_a_tool_is_guarded_and_the_tool_is_not(double: OpenAIDouble) -> None:
    upstream = Upstream("search")
    with pytest.raises(NotGuardable, match="Guard the function that it calls"):
        upstream.guard(FunctionTool(note, description="Notes."))
    tool = FunctionTool(upstream.guard(note), description="Notes.")
    assert tool.schema == FunctionTool(note, description="Notes.").schema
    assert (await result_of(assistant(double, tool))).success
    assert upstream.statistics().accounts[0].sent == 2
