"""What only the adapter of CrewAI does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, ClassVar

import pytest
from tests.frameworks import openai_double
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import ANSWER, OpenAIDouble
from tests.frameworks.waiting import until

if "crewai" not in INSTALLED:
    pytest.skip("it runs in an environment of its own: scripts/test.sh makes it", allow_module_level=True)

from crewai import LLM, Agent, Crew
from crewai import Task as CrewTask
from crewai.events.event_bus import crewai_event_bus
from crewai.flow import Flow, listen, start
from crewai.llms.base_llm import BaseLLM
from crewai.llms.hooks import BaseInterceptor
from crewai.project import CrewBase
from crewai.tools import BaseTool
from crewai.tools import tool as as_tool
from openai import RateLimitError
from pydantic import BaseModel
from tests.frameworks.samples import crewai as sample

from forebay import BackpressureSupervisor, Overloaded, Quota, Task, TaskStatus, Upstream
from forebay.adapters import as_handler
from forebay.errors import AlreadyBound, InvalidHandler, InvalidSetting, NotBindable, NotGuardable, UnusableTask
from forebay.events import TaskProgress
from forebay.retry import Retry


@pytest.fixture
async def llm(double: OpenAIDouble) -> AsyncIterator[Any]:
    made = LLM("openai/gpt-4o-mini", api_key="sk-test", base_url=double.url)
    with made._client:
        async with made._async_client:
            yield made


def agent_of(llm: Any, role: str = "sample", **fields: Any) -> Any:
    return Agent(**{"role": role, "goal": "Take notes", "backstory": "You know rivers.", "llm": llm, **fields})


def crew_of(llm: Any, *descriptions: str, agent: Any = None, **fields: Any) -> Any:
    agents = [agent or agent_of(llm, f"agent {number}") for number, _ in enumerate(descriptions)]
    tasks = [
        CrewTask(description=each, expected_output="A river", agent=agent)
        for each, agent in zip(descriptions, agents, strict=True)
    ]
    return Crew(agents=agents, tasks=tasks, **fields)


@contextlib.asynccontextmanager
async def supervisor_of(handler: Any = None, **settings: Any) -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=handler, task_types=["ask"], **settings)
        yield supervisor


async def result_of(handler: Any = None, payload: Any = "Which river?", **settings: Any) -> Any:
    async with supervisor_of(handler, **settings) as supervisor:
        return await (await supervisor.submit(Task("ask", payload)))


def upstream_of(**settings: Any) -> Upstream:
    return Upstream("key", provider="openai", **settings)


def prompts(double: OpenAIDouble) -> list[str]:
    return [sample.asked(each.text) for each in double.requests]


# --- what is registered ----------------------------------------------------------------------------------------------


@CrewBase
class Team:
    agents_config: ClassVar[dict[str, Any]] = {}
    tasks_config: ClassVar[dict[str, Any]] = {}

    def crew(self) -> Any: ...


class Notes(Flow):  # type: ignore[misc]
    @start()  # type: ignore[untyped-decorator]
    def ask(self) -> Any:
        return self.state.get("topic", "nothing")


class SomeCrew(Crew):  # type: ignore[misc]
    pass


def take(text: str) -> str:
    """Take a note."""
    return text


def log(_: Any) -> None:
    """Return nothing, as a callback that only looks does."""


def shorten(_: Any) -> str:
    return "short"


def with_topic(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "topic": "rivers"}


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (
            lambda llm: CrewTask(description="Look", expected_output="A river", agent=agent_of(llm)),
            "put it into a Crew",
        ),
        (lambda llm: llm, "make an Agent with it"),
        (lambda _: as_tool("note")(take), "give it to an Agent"),
        (lambda _: Team(), "pass the Crew that its crew"),
        (lambda _: Notes, "it is a class: pass factory="),
        (lambda llm: SomeCrew(agents=[agent_of(llm)], tasks=[]), "write a copy"),
    ],
)
async def test_an_object_of_crewai_that_cannot_be_run_is_rejected_with_advice(llm: Any, make: Any, advice: str) -> None:
    with pytest.raises(InvalidHandler, match=advice):
        as_handler(make(llm))


async def test_a_crew_that_asks_a_person_at_the_terminal_is_rejected(llm: Any) -> None:
    crew = crew_of(llm, "Look")
    crew.tasks[0].human_input = True
    with pytest.raises(InvalidHandler, match="human_input=True"):
        as_handler(crew)


@pytest.mark.parametrize("part", ["crew", "agent", "agent in a crew"])
async def test_a_limit_of_crewai_that_counts_for_one_copy_is_rejected(llm: Any, part: str) -> None:
    limited = agent_of(llm, max_rpm=None if part == "crew" else 5)
    handler = limited if part == "agent" else crew_of(llm, "Look", agent=limited)
    if part == "crew":
        handler.max_rpm = 5
    with pytest.raises(InvalidHandler, match=r"max_rpm= counts the calls of one copy.*Quota"):
        as_handler(handler)


async def test_an_agent_of_a_task_that_the_crew_does_not_have_is_rejected(llm: Any) -> None:
    task = CrewTask(description="Look", expected_output="A river", agent=agent_of(llm, backstory="Outside."))
    with pytest.raises(InvalidHandler, match="the agent of a task is not one of its agents"):
        as_handler(Crew(agents=[agent_of(llm)], tasks=[task]))


async def test_a_task_of_a_context_that_the_crew_does_not_have_is_rejected(llm: Any) -> None:
    crew, other = crew_of(llm, "Look"), crew_of(llm, "Elsewhere")
    crew.tasks[0].context = other.tasks
    with pytest.raises(InvalidHandler, match="a task in the context of another is not one of its tasks"):
        as_handler(crew)


async def test_a_factory_that_returns_one_flow_twice_fails_its_task_with_advice() -> None:
    result = await result_of(factory=partial(lambda flow: flow, Notes()), payload={})
    assert isinstance(result.cause, InvalidHandler)
    assert "let it make a new one each time" in str(result.cause)


def test_a_flow_needs_a_factory() -> None:
    with pytest.raises(InvalidHandler, match="keeps state from run to run: pass factory="):
        as_handler(Notes())


@pytest.mark.parametrize("make", [lambda llm: crew_of(llm, "Look"), agent_of])
async def test_an_option_that_there_is_not_is_rejected(llm: Any, make: Any) -> None:
    with pytest.raises(InvalidSetting, match=r"inputz.*takes input"):
        as_handler(make(llm), config={"inputz": {}})


# --- inputs ----------------------------------------------------------------------------------------------------------


async def test_a_dict_is_the_inputs_of_a_crew(llm: Any, double: OpenAIDouble) -> None:
    double.calls = 1
    crew = crew_of(llm, "Look at {topic} in {place}", "Write about {topic}")
    result = await result_of(crew, {"topic": "rivers"}, config={"inputs": {"place": "Europe", "topic": "lakes"}})
    assert prompts(double) == ["Look at rivers in Europe", "Write about rivers"]
    assert result.result["agent"] == "agent 1"
    assert [each["agent"] for each in result.result["tasks"]] == ["agent 0", "agent 1"]
    assert result.result["usage"]["requests"] == 2
    assert crew.tasks[0].description == "Look at {topic} in {place}"
    assert crew.tasks[0].output is None


async def test_a_context_has_the_inputs_that_belong_to_messages(llm: Any, double: OpenAIDouble) -> None:
    double.calls = 1
    crew = crew_of(llm, "{message} It is about {topic}.")
    assert (await result_of(crew, {"messages": "Which river?", "context": {"topic": "Europe"}})).success
    assert prompts(double) == ["Which river? It is about Europe."]


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({}, "inputs without 'place', 'topic'"),
        (None, "inputs without 'place', 'topic'"),
        ({"topic": "rivers"}, "inputs without 'place'"),
        ("Which river?", "no task of the crew has a {message}"),
    ],
)
async def test_an_input_that_is_missing_is_refused_when_the_task_is_submitted(
    llm: Any, payload: Any, said: str
) -> None:
    async with supervisor_of(crew_of(llm, "Look at {topic} in {place}")) as supervisor:
        with pytest.raises(UnusableTask, match="a dict of its inputs 'place', 'topic'") as refused:
            await supervisor.submit(Task("ask", payload))
    assert said in str(refused.value)


async def test_an_input_of_the_file_of_an_output_is_asked_for(llm: Any) -> None:
    crew = crew_of(llm, "Look")
    crew.tasks[0].output_file = "{topic}.md"
    async with supervisor_of(crew) as supervisor:
        with pytest.raises(UnusableTask, match="inputs without 'topic'"):
            await supervisor.submit(Task("ask", {}))


@pytest.mark.parametrize("value", [object(), b"rivers", {"deep": [{1, 2}]}])
async def test_an_input_that_crewai_cannot_fill_in_is_refused_when_the_task_is_submitted(llm: Any, value: Any) -> None:
    given = (
        (crew_of(llm, "Look at {topic}"), {"topic": value}),
        (agent_of(llm), {"messages": "Which?", "context": {"topic": value}}),
    )
    for handler, payload in given:
        async with supervisor_of(handler) as supervisor:
            with pytest.raises(UnusableTask, match="an input that is no plain data: Invalid value for key 'topic'"):
                await supervisor.submit(Task("ask", payload))


async def test_a_crew_that_makes_its_inputs_itself_is_asked_for_none(llm: Any, double: OpenAIDouble) -> None:
    double.calls = 1
    crew = crew_of(llm, "Look at {topic}", before_kickoff_callbacks=[with_topic])
    assert (await result_of(crew, None)).success
    assert prompts(double) == ["Look at rivers"]


async def test_a_context_fills_in_the_role_of_an_agent(llm: Any, double: OpenAIDouble) -> None:
    double.calls = 1
    payload = {"messages": "Which river?", "context": {"place": "Europe"}}
    result = await result_of(agent_of(llm, "Guide to {place}"), payload)
    assert result.result["agent"] == "Guide to Europe"
    assert "You are Guide to Europe." in double.requests[0].body["messages"][0]["content"]


async def test_a_flow_has_its_inputs_as_its_state_and_returns_it() -> None:
    result = await result_of(factory=Notes, payload={"topic": "rivers"})
    assert result.result["output"] == "rivers"
    assert result.result["state"]["topic"] == "rivers"
    assert (await result_of(factory=Notes, payload={})).result["output"] == "nothing"


async def test_what_is_no_plain_data_in_the_state_of_a_flow_is_left_out() -> None:
    class Locked(Flow):  # type: ignore[misc]
        @start()  # type: ignore[untyped-decorator]
        def ask(self) -> Any:
            self.state.update(lock=threading.Lock(), topic="rivers")
            return "done"

    result = await result_of(factory=Locked, payload={})
    assert result.success, result.error
    assert result.result["output"] == "done"
    assert (result.result["state"]["lock"], result.result["state"]["topic"]) == (None, "rivers")


async def test_the_state_of_a_flow_may_be_a_model() -> None:
    class Topic(BaseModel):
        topic: str = ""

    class Typed(Flow[Topic]):  # type: ignore[misc]
        @start()  # type: ignore[untyped-decorator]
        def ask(self) -> Any:
            return self.state.topic

    result = await result_of(factory=Typed, payload={"topic": "rivers"})
    assert result.success, result.error
    assert result.result["state"]["topic"] == "rivers"


@pytest.mark.parametrize(("callback", "value", "said"), [(log, None, "null"), (shorten, "short", "short")])
async def test_what_a_callback_makes_of_the_output_is_the_output(
    llm: Any, double: OpenAIDouble, callback: Any, value: Any, said: str
) -> None:
    double.calls = 1
    result = await result_of(crew_of(llm, "{message}", after_kickoff_callbacks=[callback]))
    assert result.success, result.error
    assert result.result["output"] == value
    assert result.result["messages"][-1]["content"] == said
    assert result.result["tasks"] == [{"name": "Which river?", "agent": "agent 0", "output": ANSWER}]


async def test_a_flow_that_streams_by_itself_returns_its_output() -> None:
    result = await result_of(factory=partial(Notes, stream=True), payload={"topic": "rivers"})
    assert result.result["output"] == "rivers"


async def test_a_structured_output_is_plain_data(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class River(BaseModel):
        name: str

    monkeypatch.setattr("tests.frameworks.openai_double.ANSWER", json.dumps({"name": "Danube"}))
    result = await result_of(agent_of(llm), config={"response_format": River})
    assert result.result["output"] == {"name": "Danube"}
    crew = crew_of(llm, "{message}")
    crew.tasks[0].output_pydantic = River
    assert (await result_of(crew)).result["output"] == {"name": "Danube"}


# --- one crew for many tasks -----------------------------------------------------------------------------------------


async def test_usage_is_that_of_one_run(llm: Any, double: OpenAIDouble) -> None:
    async with supervisor_of(sample.make(lambda _: llm, take)["handler"]) as supervisor:
        for _ in range(3):
            assert (await supervisor.run(Task("ask", "Which river?")))["usage"]["requests"] == 3
    assert llm.get_token_usage_summary().successful_requests == 0
    assert double.answered == 9


async def test_the_outputs_of_a_task_are_not_stored_for_the_next_crew(
    llm: Any, double: OpenAIDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    double.calls = 1
    crew, stored = crew_of(llm, "{message}"), list[Any]()
    kind = "crewai.memory.storage.kickoff_task_outputs_storage.KickoffTaskOutputsSQLiteStorage"
    for name in ("add", "delete_all", "update"):
        monkeypatch.setattr(f"{kind}.{name}", lambda *args, **kwargs: stored.append((args, kwargs)))
    assert (await result_of(crew)).success
    assert stored == []


async def test_agents_of_one_role_stay_apart_in_a_copy(llm: Any, double: OpenAIDouble) -> None:
    double.calls = 1
    agents = [agent_of(llm, backstory=f"You know {each}.") for each in ("rivers", "lakes")]
    tasks = [CrewTask(description="Look", expected_output="A river", agent=each) for each in agents]
    assert (await result_of(Crew(agents=agents, tasks=tasks), {})).success
    told = [each.body["messages"][0]["content"] for each in double.requests]
    assert ["You know rivers." in told[0], "You know lakes." in told[1]] == [True, True]


async def test_the_context_of_a_task_is_the_output_of_the_very_task_that_it_names(
    llm: Any, double: OpenAIDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def completion(body: Any, *, calls: int) -> Any:
        answer = made(body, calls=calls)
        answer["choices"][0]["message"]["content"] = body["messages"][0]["content"].split("You are ")[1][:4]
        return answer

    made = openai_double.completion
    monkeypatch.setattr(openai_double, "completion", completion)
    double.calls = 1
    agents = [agent_of(llm, role) for role in ("AAAA", "BBBB", "CCCC")]
    first, second = (CrewTask(description="Look", expected_output="A view", agent=each) for each in agents[:2])
    last = CrewTask(description="Judge", expected_output="A view", agent=agents[2], context=[first])
    assert (await result_of(Crew(agents=agents, tasks=[first, second, last]), {})).success
    asked = json.dumps(double.requests[-1].body)
    assert ["AAAA" in asked, "BBBB" in asked] == [True, False]


@pytest.mark.parametrize("own", [[], [Notes]])
async def test_crewai_keeps_nothing_of_a_task_in_the_context_that_registers_its_worker(
    llm: Any, double: OpenAIDouble, own: list[Any]
) -> None:
    double.calls = 1
    crewai_event_bus.reset_runtime_state()
    kept = [make() for make in own]
    async with supervisor_of(factory=Notes) as supervisor:
        supervisor.register_worker("crew", handler=crew_of(llm, "{message}"), task_types=["crew"])
        state = crewai_event_bus.runtime_state
        at_first = list(state.root) if state else []
        for kind, payload in (("crew", "Which river?"), ("ask", {})):
            assert (await (await supervisor.submit(Task(kind, payload)))).success
        assert crewai_event_bus.runtime_state is state
        assert bool(at_first) == bool(kept)
        assert (list(state.root) if state else []) == at_first
    crewai_event_bus.reset_runtime_state()


async def test_a_planner_and_a_manager_are_bound_and_counted(
    llm: Any, double: OpenAIDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"list_of_plans_per_task": [{"task_number": 1, "task": "Look", "plan": "Look at a map."}]}
    monkeypatch.setattr("tests.frameworks.openai_double.ANSWER", json.dumps(plan))
    upstream = upstream_of()
    bound = upstream.bind(llm)
    planned = crew_of(bound, "{message}", planning=True, planning_llm=bound)
    managed = crew_of(bound, "{message}", process="hierarchical", manager_llm=bound)
    double.calls = 1
    for crew in (planned, managed):
        before = double.answered
        result = await result_of(crew)
        assert result.success, result.error
        assert result.result["usage"]["requests"] == double.answered - before
    (account,) = upstream.statistics().accounts
    assert (account.input_tokens, account.output_tokens) == double.tokens


# --- stopping --------------------------------------------------------------------------------------------------------


async def _cancel(supervisor: BackpressureSupervisor, double: OpenAIDouble, requests: int = 1) -> None:
    """Cancel a task that has made so many requests, the last of which is not answered."""
    ticket = await supervisor.submit(Task("ask", "Which river?"))
    await double.until_requests(requests)
    ticket.cancel()
    assert (await ticket).status is TaskStatus.CANCELLED


async def test_all_calls_of_a_run_stop_at_once(llm: Any, double: OpenAIDouble) -> None:
    crew = crew_of(llm, "{message}", "{message}", "{message}")
    for task in crew.tasks[:2]:
        task.async_execution = True
    double.hold()
    async with supervisor_of(crew) as supervisor:
        await _cancel(supervisor, double, 2)
        await double.until(lambda double: [each.status for each in double.requests] == [499, 499])
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
    assert len(double.requests) == 2


async def test_a_task_that_a_failed_crew_has_left_behind_makes_no_further_call(llm: Any, double: OpenAIDouble) -> None:
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    @as_tool("note")  # type: ignore[untyped-decorator]
    def stuck(text: str) -> str:
        """Hang."""
        entered.set()
        assert leave.wait(20)
        left.set()
        return text

    class Broken(BaseLLM):  # type: ignore[misc]
        def call(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            assert entered.wait(20)
            raise ValueError("enough")

    crew = crew_of(llm, "{message}", "{message}", "{message}")
    crew.agents[0].llm, crew.agents[1].tools = Broken(model="broken"), [stuck]
    for task in crew.tasks[:2]:
        task.async_execution = True
    result = await result_of(crew)
    assert result.error == "ValueError: enough"
    left_behind = [each for each in threading.enumerate() if each.name.endswith("(run)") and each.daemon]
    leave.set()
    await asyncio.get_running_loop().run_in_executor(None, left.wait, 20)
    made = len(double.requests)
    assert left_behind
    for thread in left_behind:
        await asyncio.get_running_loop().run_in_executor(None, thread.join, 20)
    assert len(double.requests) == made


async def test_an_llm_of_your_own_stops_at_its_next_call() -> None:
    entered, leave, calls = threading.Event(), threading.Event(), []

    class Mine(BaseLLM):  # type: ignore[misc]
        def call(self, messages: Any, *args: Any, from_agent: Any = None, **kwargs: Any) -> Any:  # noqa: ARG002
            self._invoke_before_llm_call_hooks(messages, from_agent)
            calls.append(messages)
            entered.set()
            assert leave.wait(20)
            return "The Danube."

    async with supervisor_of(crew_of(Mine(model="mine"), "{message}", "{message}")) as supervisor:
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await asyncio.get_running_loop().run_in_executor(None, entered.wait, 20)
        ticket.cancel()
        await ticket
        assert supervisor.workers["agent"].current_tasks == 1
        leave.set()
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
    assert len(calls) == 1


async def test_no_tool_is_called_after_a_cancellation() -> None:
    entered, leave, noted = threading.Event(), threading.Event(), list[str]()

    class Mine(BaseLLM):  # type: ignore[misc]
        def supports_function_calling(self) -> bool:
            return True

        def call(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            entered.set()
            assert leave.wait(20)
            return [{"id": "1", "type": "function", "function": {"name": "note", "arguments": '{"text": "one"}'}}]

    @as_tool("note")  # type: ignore[untyped-decorator]
    def note(text: str) -> str:
        """Take a note."""
        noted.append(text)
        entered.clear()
        return text

    agent = agent_of(Mine(model="mine"), tools=[note], max_iter=1)
    async with supervisor_of(agent) as supervisor:
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        await asyncio.get_running_loop().run_in_executor(None, entered.wait, 20)
        ticket.cancel()
        await ticket
        leave.set()
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
        assert noted == []
        leave.set()
        await supervisor.submit(Task("ask", "Which river?"))
        await until(lambda: noted == ["one"])


async def test_an_async_method_of_a_flow_stops_at_once() -> None:
    entered, ended = threading.Event(), []

    class Waiting(Flow):  # type: ignore[misc]
        @start()  # type: ignore[untyped-decorator]
        async def wait(self) -> None:
            try:
                entered.set()
                await asyncio.Event().wait()
            finally:
                ended.append("wait")

        @listen(wait)  # type: ignore[untyped-decorator]
        def go_on(self) -> None:
            ended.append("go_on")

    async with supervisor_of(factory=Waiting) as supervisor:
        ticket = await supervisor.submit(Task("ask", {}))
        await asyncio.get_running_loop().run_in_executor(None, entered.wait, 20)
        ticket.cancel()
        await ticket
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
    assert ended == ["wait"]


async def test_an_interceptor_of_blocking_clients_sees_the_requests(double: OpenAIDouble) -> None:
    class Interceptor(BaseInterceptor):  # type: ignore[misc]
        def on_outbound(self, message: Any) -> Any:
            message.headers["x-seen"] = "yes"
            return message

        def on_inbound(self, message: Any) -> Any:
            return message

    made = LLM("openai/gpt-4o-mini", api_key="sk-test", base_url=double.url, interceptor=Interceptor())
    with made._client:
        result = await result_of(crew_of(made, "{message}"))
        assert result.success, result.error
    assert double.requests[0].headers["x-seen"] == "yes"


async def test_a_call_that_waits_for_the_upstream_leaves_its_queue(llm: Any, double: OpenAIDouble) -> None:
    upstream = upstream_of(max_concurrent=1)
    double.hold()
    async with supervisor_of(crew_of(upstream.bind(llm), "{message}"), max_concurrent=2) as supervisor:
        first = await supervisor.submit(Task("ask", "first"))
        await double.until_requests(1)
        second = await supervisor.submit(Task("ask", "second"))
        await until(lambda: upstream.statistics().accounts[0].queued == 1)
        second.cancel()
        await until(lambda: upstream.statistics().accounts[0].queued == 0)
        double.release()
        assert (await first).success
    assert prompts(double) == ["first"]


class Awaiting(Flow):  # type: ignore[misc]
    llm: Any = None
    stream_calls: bool = False

    @start()  # type: ignore[untyped-decorator]
    async def ask(self) -> Any:
        if not self.stream_calls:
            return await self.llm.acall("Which river?")
        chunks = await self.llm._async_client.chat.completions.create(
            model="gpt-4o-mini", messages=[{"role": "user", "content": "Which river?"}], stream=True
        )
        return "".join([each.choices[0].delta.content or "" async for each in chunks if each.choices])


@pytest.mark.parametrize("fields", [{}, {"stream_calls": True}])
async def test_flows_await_a_bound_llm_one_after_another(
    llm: Any, double: OpenAIDouble, fields: dict[str, bool]
) -> None:
    double.calls = 1
    upstream = upstream_of()
    bound = upstream.bind(llm)
    async with supervisor_of(factory=partial(Awaiting, llm=bound, **fields)) as supervisor:
        for _ in range(3):
            result = await (await supervisor.submit(Task("ask", {})))
            assert result.success, result.error
            assert result.result["output"] == ANSWER
    (account,) = upstream.statistics().accounts
    assert (account.sent, account.succeeded, account.in_flight) == (double.answered, 3, 0)


async def test_a_call_that_a_flow_awaits_stops_at_once(llm: Any, double: OpenAIDouble) -> None:
    upstream = upstream_of()
    bound = upstream.bind(llm)
    double.hold()
    async with supervisor_of(factory=partial(Awaiting, llm=bound)) as supervisor:
        await _cancel(supervisor, double)
        await double.until(lambda double: [each.status for each in double.requests] == [499])
        await until(lambda: supervisor.workers["agent"].current_tasks == 0)
    assert upstream.statistics().accounts[0].in_flight == 0


# --- bind ------------------------------------------------------------------------------------------------------------


async def test_a_bound_llm_repeats_no_throttled_call_and_its_agent_no_failed_task(
    llm: Any, double: OpenAIDouble
) -> None:
    upstream = upstream_of()
    double.refuse(429, x_should_retry="false")  # so that the upstream makes one attempt
    bound = upstream.bind(llm)
    assert not (await result_of(crew_of(bound, "{message}"))).success
    assert len(double.requests) == 1
    with pytest.raises(RateLimitError):
        await bound.acall("Which river?")
    assert len(double.requests) == 2


async def test_the_retries_of_an_agent_are_made_if_it_says_so(llm: Any, double: OpenAIDouble) -> None:
    upstream = upstream_of(retry=Retry(max_attempts=1))
    double.refuse(500)
    bound = upstream.bind(llm)
    assert not (await result_of(crew_of(bound, "{message}", agent=agent_of(bound, max_retry_limit=1)))).success
    assert len(double.requests) == 2


async def test_a_crew_whose_calls_are_rejected_ends_as_overloaded_within_its_execution_time(
    llm: Any, double: OpenAIDouble
) -> None:
    upstream = upstream_of(quotas=[Quota(requests=1, per="day")])
    bound = upstream.bind(llm)
    crew = crew_of(bound, "{message}", "{message}", agent=agent_of(bound, max_execution_time=60))
    result = await result_of(crew)
    assert isinstance(result.cause, Overloaded)
    assert len(double.requests) == 1


async def test_a_bound_llm_is_a_copy_with_usage_of_its_own(llm: Any, double: OpenAIDouble) -> None:
    upstream = upstream_of()
    bound = upstream.bind(llm)
    assert isinstance(bound, type(llm))
    assert bound is not llm
    assert upstream.bind(bound) is bound
    with pytest.raises(AlreadyBound):
        Upstream("other", provider="openai").bind(bound)
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(None, bound.call, "Which river?") == ANSWER
    assert bound.get_token_usage_summary().successful_requests == 1
    assert llm.get_token_usage_summary().successful_requests == 0
    assert upstream.statistics().accounts[0].sent == double.answered == 1


def test_an_llm_without_a_key_cannot_be_bound_before_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = LLM("openai/gpt-4o-mini")
    with pytest.raises(NotBindable, match="it has no clients yet: give it an api_key"):
        upstream_of().bind(made)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    assert upstream_of().bind(made)._client.max_retries == 0


async def test_a_guarded_tool_stays_one(llm: Any) -> None:
    upstream = Upstream("wiki")
    assert (await result_of(agent_of(llm, tools=[upstream.guard(as_tool("note")(take))]))).success
    assert upstream.statistics().accounts[0].sent == 2

    class Mine(BaseTool):  # type: ignore[misc]
        name: str = "note"
        description: str = "Take a note."

        def _run(self, text: str) -> str:
            return text

    with pytest.raises(NotGuardable, match="Guard what its _run"):
        upstream.guard(Mine())


async def test_what_else_is_bound_is_refused_with_advice(llm: Any) -> None:
    class Mine(BaseLLM):  # type: ignore[misc]
        def call(self, *args: Any, **kwargs: Any) -> Any: ...

    upstream = upstream_of()
    with pytest.raises(NotBindable, match="those over OpenAI's and Anthropic's SDKs"):
        upstream.bind(Mine(model="mine"))
    with pytest.raises(NotBindable, match=r"Agent\(llm=upstream.bind"):
        upstream.bind(crew_of(llm, "Look"))


# --- progress --------------------------------------------------------------------------------------------------------


async def test_each_step_is_progress_with_its_agent(llm: Any) -> None:
    async with supervisor_of(sample.make(lambda _: llm, take)["handler"]) as supervisor:
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        values = [event.value async for event in ticket.events() if isinstance(event, TaskProgress)]
    model, tool = {"step": "model", "agent": "sample"}, {"step": "tool", "agent": "sample", "tool": "note"}
    assert values == [model, tool, model, tool, model]


async def test_a_crew_that_streams_by_itself_is_one_that_streams(llm: Any) -> None:
    async with supervisor_of(crew_of(llm, "{message}", stream=True)) as supervisor:
        ticket = await supervisor.submit(Task("ask", "Which river?"))
        values = [event.value async for event in ticket.events() if isinstance(event, TaskProgress)]
        assert (await ticket).success
    assert "".join(each.get("text", "") for each in values) == ANSWER
    assert not llm.stream


async def test_headers_tell_a_gateway_the_priority_of_the_task(double: OpenAIDouble) -> None:
    headers = {"x-forebay-priority": "high"}
    made = LLM("openai/gpt-4o-mini", api_key="sk-test", base_url=double.url, default_headers=headers)
    with made._client:
        async with made._async_client:
            assert (await result_of(crew_of(made, "{message}"))).success
    assert double.requests[0].headers["x-forebay-priority"] == "high"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_clients_of_another_event_loop_are_not_used_in_this_one(double: OpenAIDouble) -> None:
    made = LLM("openai/gpt-4o-mini", api_key="sk-test", base_url=double.url)
    run = partial(result_of, crew_of(made, "{message}"))
    with made._client:
        assert asyncio.run(run()).success
        result = asyncio.run(run())
        assert result.success, result.error
    del made, run
    gc.collect()  # the connection of the first loop, which nothing can close any more
