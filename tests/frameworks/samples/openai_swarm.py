"""OpenAI Swarm: an agent with a function, on the sync client or the async one."""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any

import swarm
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion
from tests.frameworks.openai_double import completion
from tests.frameworks.sample import MODEL, Connect, Facts, InProcess, Sample, Tool


def make(kind: type[Any], connect: Connect, tool: Tool, **config: Any) -> dict[str, Any]:
    """Return the arguments of `register_worker`."""
    return {"handler": _agent(tool), "config": {"client": connect(kind), **config}}


def in_process(tool: Tool) -> InProcess:
    """Return an agent whose client answers in process: two calls of the tool, and then text."""
    agent = _agent(tool)
    client: Any = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=_create)))

    async def run(text: str) -> Any:
        messages = [{"role": "user", "content": text}]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, lambda: swarm.Swarm(client).run(agent, messages))

    return InProcess(arguments={"handler": agent, "config": {"client": client}}, ready=lambda: run)


def _agent(tool: Tool) -> Any:
    return swarm.Agent(name="sample", model=MODEL, instructions="Take notes.", functions=[tool])


def _create(**request: Any) -> Any:
    return ChatCompletion.model_validate(completion(request, calls=3))


def _facts(stops_at: str) -> Facts:
    return Facts(stops_at=stops_at, calls_if_direct=3, counts_usage=True, threads_left=0, progress="steps")


SAMPLES = [
    Sample(name="openai-swarm", make=partial(make, OpenAI), facts=_facts("next call"), in_process=in_process),
    Sample(name="openai-swarm async", make=partial(make, AsyncOpenAI), facts=_facts("at once")),
]
