"""as_handler: the objects that may be registered, and the advice for the others."""

from __future__ import annotations

import asyncio
import functools
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, ClassVar

import pytest

from forebay.adapters import FRAMEWORKS, Handler, as_handler, detect
from forebay.adapters.detect import Framework
from forebay.adapters.factory import handler_from_factory
from forebay.errors import InvalidHandler, InvalidSetting
from forebay.task import Task

TASK = Task("echo", {"n": 1})


async def in_the_loop(task: Task) -> object:
    return task.payload


def in_a_thread(task: Task) -> object:
    return task.payload


class Service:
    async def answer(self, task: Task) -> object:
        return task.payload

    def answer_plainly(self, task: Task) -> object:
        return task.payload

    @staticmethod
    async def ask(task: Task) -> object:
        return task.payload


class AsyncAgent:
    async def __call__(self, task: Task) -> object:
        return task.payload


class PlainAgent:
    def __call__(self, task: Task) -> object:
        return task.payload


async def with_model(model: str, task: Task) -> object:
    return model, task.payload


def returns_an_awaitable(task: Task) -> Awaitable[object]:
    return in_the_loop(task)


# --- accepted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "obj",
    [
        in_the_loop,
        Service().answer,
        Service.ask,
        AsyncAgent(),
        functools.partial(with_model, "small"),
        functools.partial(functools.partial(with_model), "small"),
        functools.partial(AsyncAgent()),
    ],
)
async def test_an_async_callable_runs_in_the_loop(obj: Any) -> None:
    handler = as_handler(obj)
    assert not handler.blocking
    assert await handler.call(TASK) in ({"n": 1}, ("small", {"n": 1}))


@pytest.mark.parametrize(
    "obj", [in_a_thread, Service().answer_plainly, PlainAgent(), functools.partial(in_a_thread), len]
)
def test_any_other_callable_runs_in_a_thread(obj: Any) -> None:
    handler = as_handler(obj)
    assert handler.blocking
    assert handler.call is obj


async def test_a_plain_callable_that_returns_an_awaitable_is_left_to_the_engine() -> None:
    handler = as_handler(returns_an_awaitable)
    assert handler.blocking
    assert await handler.call(TASK) == {"n": 1}


def test_a_handler_is_returned_as_it_is() -> None:
    handler = Handler(call=in_a_thread, on_cancel=print)
    assert as_handler(handler) is handler


def test_an_object_with_the_hook_is_asked_for_its_handler() -> None:
    handler = Handler(call=in_the_loop)

    class Fleet:
        def __call__(self) -> None: ...

        def __forebay_handler__(self) -> Handler:
            return handler

    assert as_handler(Fleet()) is handler


def test_the_hook_outranks_the_framework_of_the_class() -> None:
    handler = Handler(call=in_the_loop)

    class Graph:
        __module__ = "langgraph.graph"

    class Wrapped(Graph):
        def __forebay_handler__(self) -> Handler:
            return handler

    assert as_handler(Wrapped()) is handler


# --- rejected ------------------------------------------------------------------------------------------------------


async def many(task: Task) -> AsyncIterator[object]:
    yield task


def some(task: Task) -> Iterator[object]:
    yield task


class Streams:
    async def __call__(self, task: Task) -> AsyncIterator[object]:
        yield task


@pytest.mark.parametrize(
    ("obj", "type_name", "advice"),
    [
        (None, "NoneType", "pass handler="),
        (AsyncAgent, "AsyncAgent", "pass an instance"),
        (many, "function", "progress()"),
        (some, "function", "progress()"),
        (Streams(), "Streams", "progress()"),
        (functools.partial(many), "partial", "progress()"),
        ("researcher", "str", "with a colon, such as 'package.module:researcher'"),
        ("agents.team.researcher", "str", "import what it names and pass that"),
        ("agents.team.researcher", "str", "with a colon, such as 'agents.team:researcher'"),
        (object(), "object", "takes the Task"),
        (object(), "object", "a supported framework (agent-framework, openai-agents, autogen-agentchat, crewai, lan"),
    ],
)
def test_an_object_that_cannot_be_run_is_rejected_with_advice(obj: Any, type_name: str, advice: str) -> None:
    with pytest.raises(InvalidHandler) as caught:
        as_handler(obj, worker="writer")
    message = str(caught.value)
    assert message.startswith(f"'writer' has a handler of type {type_name}, which Forebay cannot run: ")
    assert advice in message


def test_a_coroutine_is_rejected_without_a_warning_that_it_was_never_awaited() -> None:
    with pytest.raises(InvalidHandler, match="without parentheses"):
        as_handler(in_the_loop(TASK))


async def test_a_running_asyncio_task_is_rejected() -> None:
    with pytest.raises(InvalidHandler, match="the function that was called"):
        as_handler(asyncio.ensure_future(in_the_loop(TASK)))


def test_a_hook_that_returns_something_else_is_rejected() -> None:
    class Fleet:
        def __forebay_handler__(self) -> object:
            return in_the_loop

    with pytest.raises(InvalidHandler, match="returned a function"):
        as_handler(Fleet())


def test_the_error_survives_pickling() -> None:
    with pytest.raises(InvalidHandler) as caught:
        as_handler(7, worker="writer")
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert str(copy) == str(caught.value)
    assert copy.worker == "writer"


@pytest.mark.parametrize("obj", [in_the_loop, in_a_thread, Handler(call=in_the_loop)])
def test_a_config_for_a_handler_that_takes_none_is_rejected_and_not_shown(obj: Any) -> None:
    with pytest.raises(InvalidSetting, match="config='dict'") as caught:
        as_handler(obj, config={"configurable": {"api_key": "hush"}})
    assert "hush" not in str(caught.value)


# --- frameworks ----------------------------------------------------------------------------------------------------


def test_an_agent_is_detected_by_the_package_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Adapter:
        @staticmethod
        def handler(obj: Any, *, worker: str, config: Any) -> Handler:
            made.append((obj, worker, config))
            return Handler(call=in_the_loop)

    class Agent:
        __module__ = "crew.agents.base"

        def __call__(self) -> None: ...

    class MyAgent(Agent): ...

    monkeypatch.setitem(FRAMEWORKS, "crew", Framework("crew", "forebay.adapters.crew"))
    monkeypatch.setattr(detect, "import_module", {"forebay.adapters.crew": Adapter}.__getitem__)
    agent = MyAgent()
    as_handler(agent, worker="writer", config={"verbose": False})
    assert made == [(agent, "writer", {"verbose": False})]


def test_an_agent_that_keeps_state_is_taken_from_a_factory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapter:
        @staticmethod
        def handler(obj: Any, *, worker: str, config: Any) -> Handler:  # noqa: ARG004 - as an adapter's
            return Handler(call=in_the_loop, single_use=True)

    class Crew:
        __module__ = "crew.team"

    monkeypatch.setitem(FRAMEWORKS, "crew", Framework("crew", "forebay.adapters.crew"))
    monkeypatch.setattr(detect, "import_module", {"forebay.adapters.crew": Adapter}.__getitem__)
    with pytest.raises(InvalidHandler, match="keeps state from run to run: pass factory="):
        as_handler(Crew())
    assert not handler_from_factory(Crew).single_use


def test_an_agent_that_keeps_state_is_not_taken_twice_from_a_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapter:
        @staticmethod
        def handler(obj: Any, *, worker: str, config: Any) -> Handler:  # noqa: ARG004 - as an adapter's
            return Handler(call=in_the_loop, single_use=obj.keeps_state)

    class Crew:
        __module__ = "crew.team"

        def __init__(self, keeps_state: object) -> None:
            self.keeps_state = keeps_state

    monkeypatch.setitem(FRAMEWORKS, "crew", Framework("crew", "forebay.adapters.crew"))
    monkeypatch.setattr(detect, "import_module", {"forebay.adapters.crew": Adapter}.__getitem__)
    agents = {keeps_state: Crew(keeps_state) for keeps_state in (True, False)}
    handlers = {key: handler_from_factory(functools.partial(agents.get, key)) for key in agents}
    with pytest.raises(InvalidHandler, match="let it make a new one each time"):
        handlers[True].call(TASK)
    handlers[False].call(TASK).close()


def test_what_a_factory_sets_for_its_first_agent_is_not_seen_by_later_tasks() -> None:
    noted: ContextVar[str] = ContextVar("noted", default="nothing")

    def make() -> Any:
        noted.set("an agent")
        return in_the_loop

    handler_from_factory(make)
    assert noted.get() == "nothing"


def test_a_framework_that_is_installed_in_part_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Agent:
        __module__ = "crew.agents"

    monkeypatch.setitem(FRAMEWORKS, "crew", Framework("crew", "forebay.adapters.nothing"))
    with pytest.raises(InvalidHandler, match=r"the package 'forebay\.adapters\.nothing' is not installed"):
        as_handler(Agent(), worker="writer")


def test_the_agents_of_a_factory_check_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapter:
        @staticmethod
        def handler(obj: Any, *, worker: str, config: Any) -> Handler:  # noqa: ARG004
            return Handler(call=in_the_loop, check=obj.check, single_use=True)

    class Flow:
        __module__ = "crew.flow"
        checked: ClassVar[list[Task]] = []

        def check(self, task: Task) -> None:
            self.checked.append(task)

    monkeypatch.setitem(FRAMEWORKS, "crew", Framework("crew", "forebay.adapters.crew"))
    monkeypatch.setattr(detect, "import_module", {"forebay.adapters.crew": Adapter}.__getitem__)
    with pytest.raises(InvalidHandler, match="keeps state from run to run: pass factory="):
        as_handler(Flow())
    made = handler_from_factory(Flow)
    assert made.check is not None
    made.check(TASK)
    assert Flow.checked == [TASK]


@pytest.mark.parametrize("package", ["agent_framework", "agents", "crewai", "pydantic_ai", "swarm"])
def test_a_package_of_yours_with_the_name_of_a_framework_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    class Agent:
        __module__ = f"{package}.team"

        def __call__(self, task: Task) -> None: ...

    monkeypatch.setattr(detect, "import_module", lambda name: pytest.fail(f"{name} is imported"))
    assert as_handler(Agent()).blocking
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    assert as_handler(Agent()).blocking


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (("run", "ainvoke"), "async def run_agent(task):\n        return await agent.ainvoke(task.payload)\n"),
        (("kickoff",), "    def run_agent(task):\n        return agent.kickoff(task.payload)\n"),
        ((), "    def run_agent(task):\n        return agent.run(task.payload)\n"),
    ],
)
def test_an_agent_of_no_supported_framework_is_rejected_with_the_function_that_runs_it(
    names: tuple[str, ...], source: str
) -> None:
    async def awaited(self: Any, payload: Any) -> None: ...

    def plain(self: Any, payload: Any) -> None: ...

    kind = type("Crew", (), {name: awaited if name.startswith("a") else plain for name in names})
    with pytest.raises(InvalidHandler) as caught:
        as_handler(kind(), worker="writer")
    message = str(caught.value)
    assert source in message
    assert message.endswith("supervisor.register_worker('writer', handler=run_agent, ...)")


def test_the_function_that_runs_an_agent_of_a_factory_makes_one_and_passes_its_stream_on() -> None:
    class Crew:
        async def run(self, text: str) -> AsyncIterator[str]:
            yield text

    with pytest.raises(InvalidHandler) as caught:
        handler_from_factory(Crew, worker="writer")
    assert (
        "async def run_agent(task):\n        async for part in Crew(...).run(task.payload):\n"
        "            progress(part)\n        return part\n"
    ) in str(caught.value)


def test_a_method_of_an_agent_is_refused_and_one_of_your_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Agent:
        __module__ = "crew.agents"

        async def run(self, text: Any) -> None: ...

    Agent.run.__module__ = "crew.agents"

    class MyAgent(Agent):
        async def run_task(self, task: Task) -> None: ...

    monkeypatch.setitem(FRAMEWORKS, "crew", Framework("crew", "forebay.adapters.crew"))
    with pytest.raises(InvalidHandler, match="a method of an agent of crew, which takes no Task: pass the agent"):
        as_handler(MyAgent().run, worker="writer")
    assert not as_handler(MyAgent().run_task).blocking


@pytest.mark.parametrize("config", [7, "fast", in_the_loop])
def test_a_config_that_is_neither_a_mapping_nor_a_plain_callable_is_rejected(config: Any) -> None:
    class Agent:
        __module__ = "langgraph.somewhere"

    with pytest.raises(InvalidSetting, match="config"):
        as_handler(Agent(), config=config)


def test_no_framework_is_imported_before_one_of_its_agents_is_met() -> None:
    program = (
        "import sys; from forebay.adapters import as_handler; as_handler(lambda task: 1);"
        f"print([name for name in {list(FRAMEWORKS)!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
