"""What only the adapter of Microsoft Agent Framework does."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Never

import pytest
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import ANSWER, OpenAIDouble
from tests.frameworks.waiting import until

if "agent_framework" not in INSTALLED:
    pytest.skip("it runs in an environment of its own: scripts/test.sh makes it", allow_module_level=True)

from agent_framework import (
    Agent,
    AgentResponse,
    AgentSession,
    BaseAgent,
    Content,
    Executor,
    FunctionInvocationContext,
    InMemoryCheckpointStorage,
    Message,
    Workflow,
    WorkflowBuilder,
    WorkflowContext,
    chat_middleware,
    handler,
    response_handler,
    tool,
    workflow,
)
from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from forebay import BackpressureSupervisor, Priority, Task, TaskStatus, Upstream
from forebay.adapters import agent_framework, as_handler
from forebay.adapters.chat import ApprovalNeeded
from forebay.errors import InvalidHandler, InvalidSetting, NotBindable, NotGuardable, UnusableTask
from forebay.events import TaskProgress


@pytest.fixture
async def openai(double: OpenAIDouble) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="sk-test", base_url=double.url) as client:
        yield client


@pytest.fixture
def client(openai: AsyncOpenAI) -> Any:
    return OpenAIChatCompletionClient(model="gpt-4o-mini", async_client=openai)


def note(text: str) -> str:
    """Take a note."""
    return f"noted {text}"


@tool(approval_mode="always_require")  # type: ignore[untyped-decorator]
def pay(text: str) -> str:
    """Pay."""
    return text


class Shout(Executor):  # type: ignore[misc]
    """Takes a text."""

    @handler  # type: ignore[untyped-decorator]
    async def shout(self, text: str, context: WorkflowContext[Never, str]) -> None:
        await context.yield_output(text.upper())


class Ask(Executor):  # type: ignore[misc]
    """Asks a person."""

    @handler  # type: ignore[untyped-decorator]
    async def ask(self, text: str, context: WorkflowContext) -> None:
        await context.request_info(request_data=text, response_type=str)

    @response_handler  # type: ignore[untyped-decorator]
    async def answer(self, original: str, response: str, context: WorkflowContext[Never, str]) -> None: ...


def team_of(client: Any, *, only_second: bool = False, **settings: Any) -> Workflow:
    """Return a workflow of two agents: the first makes three calls, the second one."""
    first = Agent(client=client, name="first", tools=[note])
    second = Agent(client=client, name="second")
    if only_second:
        settings["output_from"] = [second]
    return WorkflowBuilder(start_executor=first, **settings).add_edge(first, second).build()


async def result_of(agent: Any = None, payload: Any = "Which river?", **fields: Any) -> Any:
    settings = {name: fields.pop(name) for name in ("factory", "config") if name in fields}
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=agent, task_types=["ask"], **settings)
        return await (await supervisor.submit(Task("ask", payload, **fields)))


# --- what is registered ----------------------------------------------------------------------------------------------


def test_another_object_of_the_framework_is_rejected_with_advice(client: Any) -> None:
    agent = Agent(client=client, name="sample")
    for made, advice in (
        (client, r"Agent\(client=...\)"),
        (pay, "give it to an Agent"),
        (WorkflowBuilder(start_executor=agent), "pass factory="),
        (Shout("shout"), "pass an Agent"),
    ):
        with pytest.raises(InvalidHandler, match=advice):
            as_handler(made)


def test_clients_and_tools_are_not_bound_or_guarded_and_the_error_says_what_is(client: Any) -> None:
    upstream = Upstream("key")
    for made in (client, Agent(client=client)):
        with pytest.raises(NotBindable, match=r"async_client=upstream.bind\(AsyncOpenAI\(\)\)"):
            upstream.bind(made)
    with pytest.raises(NotGuardable, match=r"'FunctionTool'.*tool\(upstream.guard\(function\)\)"):
        upstream.guard(pay)


async def test_a_tool_of_a_guarded_function_is_one_of_that_function(client: Any) -> None:
    upstream = Upstream("search")
    guarded = tool(upstream.guard(note))
    assert (guarded.name, guarded.parameters()["required"]) == ("note", ["text"])
    assert (await result_of(Agent(client=client, tools=[guarded]))).result["output"] == ANSWER
    assert upstream.statistics().accounts[0].sent == 2


def test_a_functional_workflow_is_rejected_with_advice() -> None:
    async def pipeline(text: str) -> str:
        return text

    with pytest.warns(Warning, match="experimental"):
        definition = workflow(pipeline)
    for made in (definition, definition.build()):
        with pytest.raises(InvalidHandler, match="an async function that takes the Task"):
            as_handler(made)


@pytest.mark.parametrize("as_agent", [False, True])
def test_a_workflow_is_taken_from_a_factory_only(client: Any, *, as_agent: bool) -> None:
    team = team_of(client)
    with pytest.raises(InvalidHandler, match="keeps state from run to run: pass factory="):
        as_handler(team.as_agent() if as_agent else team)


async def test_workflows_that_share_what_they_remember_are_not_run(client: Any, double: OpenAIDouble) -> None:
    agent = Agent(client=client, name="sample")
    one = WorkflowBuilder(start_executor=agent).build()
    for factory in (WorkflowBuilder(start_executor=agent).build, lambda: one):
        cause = (await result_of(factory=factory)).cause
        assert isinstance(cause, InvalidHandler)
        assert "makes its agents and executors" in str(cause)
    assert not double.requests


async def test_an_agent_may_be_shared_by_workflows(client: Any, double: OpenAIDouble) -> None:
    double.calls = 1
    agent = Agent(client=client, name="sample")
    async with BackpressureSupervisor() as supervisor:
        factory = WorkflowBuilder(start_executor=agent).build
        supervisor.register_worker(
            "agent", factory=lambda: WorkflowBuilder(start_executor=agent).build(), task_types=["ask"]
        )
        for number in range(3):
            await supervisor.run(Task("ask", f"river {number}"))
    assert factory() is not None
    assert [len(each.body["messages"]) for each in double.requests] == [1, 1, 1]


async def test_an_agent_of_your_own_runs_with_the_options_that_it_takes() -> None:
    class Echo(BaseAgent):  # type: ignore[misc]
        async def run(self, messages: Any = None, *, stream: bool = False, session: Any = None) -> AgentResponse:  # noqa: ARG002
            return AgentResponse(messages=[Message("assistant", [messages[-1].text.upper()])])

    echo = Echo(name="echo")
    result = (await result_of(echo, "river")).result
    assert (result["output"], result["agent"], result["usage"]["requests"]) == ("RIVER", "echo", 1)
    with pytest.raises(InvalidSetting, match=r"tools.*takes session, stream"):
        as_handler(echo, config={"tools": []})
    with pytest.raises(UnusableTask, match="takes no function_invocation_kwargs"):
        await result_of(echo, {"messages": "river", "context": {"user": "Ada"}})


def test_an_option_that_there_is_not_is_rejected(client: Any) -> None:
    with pytest.raises(InvalidSetting, match=r"max_turns.*takes .*function_invocation_kwargs.*session"):
        as_handler(Agent(client=client), config={"max_turns": 3})


# --- input and output ------------------------------------------------------------------------------------------------


async def test_messages_of_the_chat_api_arrive_as_they_are(client: Any, double: OpenAIDouble) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "note", "arguments": '{"text": "a"}'}}
    image = {"type": "image_url", "image_url": {"url": "https://example.com/river.png"}}
    given: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Which?"}, image]},
        {"role": "assistant", "content": "One moment.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noted a"},
        {"role": "user", "content": "Well?"},
    ]
    assert (await result_of(Agent(client=client), given)).result["output"] == ANSWER
    text, picture, *others = double.requests[0].body["messages"]
    assert text["content"] == "Which?"
    assert picture["content"][0]["image_url"]["url"] == "https://example.com/river.png"
    assert others == given[1:]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "without a role"},
        {"role": "user", "content": ["no part"]},
        {"role": "tool", "content": "of no call"},
        {"role": "assistant", "tool_calls": [{"name": "note"}]},
        {"contents": [{"type": "text", "text": "without a role"}]},
    ],
)
async def test_any_other_message_is_refused_when_it_is_submitted(client: Any, message: Any) -> None:
    with pytest.raises(UnusableTask, match="item 1 is another dict"):
        await result_of(Agent(client=client), [{"role": "user", "content": "Which?"}, message])


CONTENTS = [
    Content.from_text("x"),
    Content.from_text("x", additional_properties={"a": 1}),
    Content.from_text("x", annotations=[{"type": "citation", "title": "t"}], raw_representation=object()),
    Content.from_text_reasoning(text="why", protected_data="secret"),
    Content.from_function_call(call_id="a", name="note", arguments="{}"),
    Content.from_function_call(call_id="a", name="note", arguments={"text": "n"}),
    Content.from_function_call(call_id="a", name="note", arguments="{}", informational_only=True),
    Content.from_function_result(call_id="a", result="n"),
    Content.from_function_result(call_id="a", result={"n": [1]}),
    Content.from_function_result(call_id="a", result="n", exception="secret"),
    Content.from_uri("https://rivers.example/danube.png", media_type="image/png"),
    Content.from_usage({"input_token_count": 1}),
    Content.from_error(message="no", error_code="1"),
]


@pytest.mark.parametrize(
    "message",
    [
        *[Message("assistant", [content]) for content in CONTENTS],
        Message("tool", CONTENTS, author_name="sample", message_id="m1"),
        Message("user", ["x"], additional_properties={"a": 1}, raw_representation=object()),
        Message("user", []),
    ],
)
def test_messages_are_plain_data_as_the_framework_makes_it(message: Message) -> None:
    made = agent_framework._plain([message])
    assert made == [to_jsonable_python(message.to_dict())]
    assert Message.from_dict(made[0]).to_dict() == message.to_dict()


async def test_a_structured_output_is_plain_data(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseModel):
        river: str

    monkeypatch.setattr("tests.frameworks.openai_double.ANSWER", '{"river": "Danube"}')
    for stream in (False, True):
        config = {"options": {"response_format": Answer}, "stream": stream}
        assert (await result_of(Agent(client=client), config=config)).result["output"] == {"river": "Danube"}


@pytest.mark.parametrize("is_workflow", [False, True])
async def test_the_context_of_the_payload_reaches_the_tools(client: Any, *, is_workflow: bool) -> None:
    seen: list[Any] = []

    def look(text: str, context: FunctionInvocationContext) -> str:
        """Look."""
        seen.append((context.kwargs["user"], context.kwargs["unit"]))
        return text

    agent = Agent(client=client, name="sample", tools=[look])
    given: dict[str, Any] = {"handler": agent}
    if is_workflow:
        given = {"factory": lambda: WorkflowBuilder(start_executor=agent).build()}
    payload = {"messages": "Which river?", "context": {"user": "Ada"}}
    config = {"function_invocation_kwargs": {"unit": "km", "user": "all"}}
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", task_types=["ask"], config=config, **given)
        await supervisor.run(Task("ask", payload))
    assert seen == [("Ada", "km")] * 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_agent", [False, True])
async def test_the_result_of_a_workflow_has_what_all_its_agents_did(
    client: Any, double: OpenAIDouble, *, stream: bool, as_agent: bool
) -> None:
    def factory() -> Any:
        team = team_of(client)
        return team.as_agent() if as_agent else team

    result = (await result_of(factory=factory, config={"stream": stream})).result
    assert (result["output"], result["agent"]) == (ANSWER, "second")
    assert [each["role"] for each in result["messages"]] == [
        *("user", "assistant", "tool", "assistant", "tool", "assistant", "assistant")
    ]
    inputs, outputs = double.tokens
    assert result["usage"] == {"requests": 4, "input_tokens": inputs, "output_tokens": outputs}


async def test_the_usage_of_a_workflow_has_that_of_agents_whose_output_is_not_its_own(
    client: Any, double: OpenAIDouble
) -> None:
    result = (await result_of(factory=lambda: team_of(client, only_second=True))).result
    assert [each["role"] for each in result["messages"]] == ["user", "assistant"]
    assert (result["usage"]["requests"], result["usage"]["input_tokens"]) == (4, double.tokens[0])


async def test_a_workflow_that_takes_no_messages_takes_the_payload() -> None:
    def factory() -> Workflow:
        return WorkflowBuilder(start_executor=Shout("shout")).build()

    result = (await result_of(factory=factory, payload="river")).result
    assert (result["output"], result["messages"], result["agent"]) == ("RIVER", [], "shout")
    with pytest.raises(UnusableTask, match="of one of the types str"):
        await result_of(factory=factory, payload=[{"role": "user", "content": "river"}])


async def test_a_responses_client_is_metered_and_goes_on_from_its_result(
    openai: AsyncOpenAI, double: OpenAIDouble
) -> None:
    upstream = Upstream("key", provider="openai")
    client = OpenAIChatClient(model="gpt-4o-mini", async_client=upstream.bind(openai))
    agent = Agent(client=client, name="sample", tools=[note])
    result = (await result_of(agent)).result
    inputs, outputs = double.tokens
    assert result["output"] == ANSWER
    assert result["usage"] == {"requests": 3, "input_tokens": inputs, "output_tokens": outputs}
    (account,) = upstream.statistics().accounts
    assert (account.sent, account.input_tokens, account.output_tokens) == (3, inputs, outputs)
    further = [*result["messages"], {"role": "user", "content": "And where?"}]
    assert (await result_of(agent, further)).result["output"] == ANSWER
    assert [item["type"] for item in double.requests[3].body["input"]] == [
        *("message", "function_call", "function_call_output", "function_call", "function_call_output"),
        *("message", "message"),
    ]


# --- runs ------------------------------------------------------------------------------------------------------------


async def test_a_session_for_each_conversation_keeps_what_was_said(client: Any, double: OpenAIDouble) -> None:
    double.calls = 1
    sessions: dict[str, AgentSession] = {}

    def config(task: Task) -> dict[str, Any]:
        return {"session": sessions.setdefault(str(task.thread_id), AgentSession())}

    agent = Agent(client=client, name="sample")
    for thread in ("a", "b", "a"):
        assert (await result_of(agent, thread, config=config, thread_id=thread)).success
    assert (await result_of(agent, "none")).success
    said = [[each["content"] for each in call.body["messages"] if each["role"] == "user"] for call in double.requests]
    assert said == [["a"], ["b"], ["a", "a"], ["none"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["agent", "workflow", "workflow as agent"])
async def test_a_tool_that_needs_an_approval_fails_the_task(client: Any, kind: str, *, stream: bool) -> None:
    agent = Agent(client=client, name="sample", tools=[pay])

    def factory() -> Any:
        team = WorkflowBuilder(start_executor=agent).build()
        return team if kind == "workflow" else team.as_agent()

    given = {"agent": agent} if kind == "agent" else {"factory": factory}
    cause = (await result_of(config={"stream": stream}, **given)).cause
    assert isinstance(cause, ApprovalNeeded)
    assert str(cause).startswith("The agent of worker 'agent' waits for an approval of 'pay'")


async def test_a_workflow_that_asks_a_person_fails_the_task() -> None:
    result = await result_of(factory=lambda: WorkflowBuilder(start_executor=Ask("asker")).build())
    assert isinstance(result.cause, ApprovalNeeded)
    assert "'asker'" in str(result.cause)


def _is_idle(supervisor: BackpressureSupervisor) -> bool:
    return supervisor.workers["agent"].current_tasks == 0


async def _progress_of(**settings: Any) -> list[Any]:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", task_types=["ask"], **settings)
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        return [event.value async for event in ticket.events() if isinstance(event, TaskProgress)]


async def test_calls_and_tools_are_progress_beside_middleware_of_your_own(client: Any) -> None:
    calls = []

    @chat_middleware  # type: ignore[untyped-decorator]
    async def mine(context: Any, call_next: Callable[[], Awaitable[None]]) -> None:  # noqa: ARG001
        calls.append(1)
        await call_next()

    agent = Agent(client=client, name="sample", tools=[note])
    model, took = {"step": "model", "agent": "sample"}, {"step": "tool", "agent": "sample", "tool": "note"}
    assert await _progress_of(handler=agent, config={"middleware": [mine]}) == [model, took, model, took, model]
    assert len(calls) == 3


async def test_the_executors_and_the_text_of_a_streamed_workflow_are_progress(client: Any) -> None:
    values = await _progress_of(factory=lambda: team_of(client), config={"stream": True})
    first, second = ({"step": "executor", "executor": name} for name in ("first", "second"))
    texts = [{"text": "The "}, {"text": "Danube."}]
    assert values == [*texts, first, *texts, second]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_workflow", [False, True])
async def test_a_cancelled_run_leaves_no_asyncio_task(
    client: Any, double: OpenAIDouble, *, stream: bool, is_workflow: bool
) -> None:
    double.hold()
    agent = Agent(client=client, name="sample", tools=[note])
    given: dict[str, Any] = {"factory": lambda: team_of(client)} if is_workflow else {"handler": agent}
    async with BackpressureSupervisor() as supervisor:
        before = asyncio.all_tasks()
        supervisor.register_worker("agent", task_types=["ask"], config={"stream": stream}, **given)
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await double.until_requests(1)
        ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        await until(partial(_is_idle, supervisor))
        await double.until(lambda double: double.requests[0].status == 499)
        left = {each.get_name() for each in asyncio.all_tasks() - before if "agent_framework" in str(each.get_coro())}
        assert not left
        double.release()
        result = await supervisor.run(Task("ask", "Which sea?"))
        assert result["output"] == ANSWER
        assert all("river" not in str(each.body) for each in double.requests[1:])


async def test_an_async_tool_of_a_cancelled_run_stops_and_a_plain_one_that_fails_then_is_not_reported(
    client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    entered, stopped, leave = threading.Event(), asyncio.Event(), threading.Event()

    async def wait(text: str) -> str:
        """Wait."""
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return text

    def fail(text: str) -> str:
        """Fail."""
        entered.set()
        assert leave.wait(20)
        raise ValueError(text)

    for tool_function in (wait, fail):
        entered.clear()
        async with BackpressureSupervisor() as supervisor:
            agent = Agent(client=client, tools=[tool_function])
            supervisor.register_worker("agent", handler=agent, task_types=["ask"])
            ticket = await supervisor.submit(Task("ask", "Which river?"))
            await asyncio.get_running_loop().run_in_executor(None, entered.wait, 20)
            ticket.cancel()
            assert (await ticket).status is TaskStatus.CANCELLED
            leave.set()
            await until(partial(_is_idle, supervisor))
    assert stopped.is_set()
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_checkpoints_of_a_workflow_are_stored(client: Any) -> None:
    storage = InMemoryCheckpointStorage()
    result = await result_of(factory=lambda: team_of(client, name="team"), config={"checkpoint_storage": storage})
    assert result.success
    assert len(await storage.list_checkpoints(workflow_name="team")) > 2


async def test_headers_tell_a_gateway_the_priority_of_the_task(client: Any, double: OpenAIDouble) -> None:
    def config(task: Task) -> dict[str, Any]:
        return {"client_kwargs": {"extra_headers": {"x-forebay-priority": task.priority.name.lower()}}}

    for given in ({"agent": Agent(client=client)}, {"factory": lambda: team_of(client)}):
        assert (await result_of(config=config, priority=Priority.HIGH, **given)).success
    assert {each.headers["x-forebay-priority"] for each in double.requests} == {"high"}
