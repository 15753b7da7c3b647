"""What only the adapter of OpenAI Swarm does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import ANSWER, OpenAIDouble

if "openai_swarm" not in INSTALLED:
    pytest.skip("it runs in an environment of its own: scripts/test.sh makes it", allow_module_level=True)

import swarm
from openai import AsyncOpenAI, OpenAI
from swarm import types as swarm_types

from forebay import BackpressureSupervisor, Priority, Task
from forebay.adapters import as_handler
from forebay.errors import InvalidHandler, InvalidSetting


@pytest.fixture
async def client(double: OpenAIDouble) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="sk-test", base_url=double.url) as client:
        yield client


async def result_of(agent: Any, payload: Any = "Which river?", *, config: Any = None, **fields: Any) -> Any:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", handler=agent, task_types=["ask"], config=config)
        return await (await supervisor.submit(Task("ask", payload, **fields)))


def test_a_swarm_is_rejected_with_advice() -> None:
    with OpenAI(api_key="sk-test") as client, pytest.raises(InvalidHandler, match=r"config=\{'client': client\}"):
        as_handler(swarm.Swarm(client))


@pytest.mark.parametrize("option", ["stream", "clients"])
def test_an_option_that_there_is_not_is_rejected(option: str) -> None:
    with pytest.raises(InvalidSetting, match=f"{option}.*takes .*client"):
        as_handler(swarm.Agent(), config={option: True})


async def test_the_context_of_the_payload_reaches_the_functions_and_comes_back(client: AsyncOpenAI) -> None:
    seen: list[Any] = []

    def look(text: str, context_variables: dict[str, Any]) -> Any:
        seen.append(dict(context_variables))
        return swarm_types.Result(value=text, context_variables={"looked": len(seen)})

    agent = swarm.Agent(name="sample", functions=[look])
    payload = {"messages": "Which river?", "context": {"user": "Ada"}}
    result = await result_of(agent, payload, config={"client": client})
    assert result.success, result.error
    assert seen == [{"user": "Ada"}, {"user": "Ada", "looked": 1}]
    assert result.result["context"] == {"user": "Ada", "looked": 2}


async def test_variables_that_are_no_plain_data_are_left_out_of_the_result(client: AsyncOpenAI) -> None:
    def look(text: str) -> Any:
        return swarm_types.Result(value=text, context_variables={"connection": object(), "raw": b"\xff"})

    payload = {"messages": "Which river?", "context": {"user": "Ada"}}
    result = await result_of(swarm.Agent(functions=[look]), payload, config={"client": client})
    assert result.result["output"] == ANSWER
    assert result.result["context"] == {"user": "Ada"}


async def test_a_handoff_names_the_last_agent(client: AsyncOpenAI, double: OpenAIDouble) -> None:
    double.calls = 2
    other = swarm.Agent(name="other", functions=[])

    def transfer(text: str) -> Any:  # noqa: ARG001 - the double's model gives it
        return other

    result = await result_of(swarm.Agent(name="sample", functions=[transfer]), config={"client": client})
    assert (result.result["agent"], result.result["output"]) == ("other", ANSWER)


async def test_an_exception_of_a_function_fails_the_task(client: AsyncOpenAI) -> None:
    def stop(text: str) -> str:  # noqa: ARG001
        raise ValueError("enough")

    result = await result_of(swarm.Agent(name="sample", functions=[stop]), config={"client": client})
    assert result.error == "ValueError: enough"


async def test_headers_tell_a_gateway_the_priority_of_the_task(client: AsyncOpenAI, double: OpenAIDouble) -> None:
    def config(task: Task) -> dict[str, Any]:
        return {"client": client.with_options(default_headers={"x-forebay-priority": task.priority.name.lower()})}

    assert (await result_of(swarm.Agent(name="sample"), config=config, priority=Priority.HIGH)).success
    assert double.requests[0].headers["x-forebay-priority"] == "high"
