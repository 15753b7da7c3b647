"""OpenAI Swarm: an agent with a function, on the sync client or the async one."""

from __future__ import annotations

from functools import partial
from typing import Any

import swarm
from openai import AsyncOpenAI, OpenAI
from tests.frameworks.sample import MODEL, Connect, Facts, Sample, Tool


def make(kind: type[Any], connect: Connect, tool: Tool, **config: Any) -> dict[str, Any]:
    """Return the arguments of `register_worker`."""
    agent = swarm.Agent(name="sample", model=MODEL, instructions="Take notes.", functions=[tool])
    return {"handler": agent, "config": {"client": connect(kind), **config}}


def _facts(stops_at: str) -> Facts:
    return Facts(stops_at=stops_at, calls_if_direct=3, counts_usage=True, threads_left=0, progress="steps")


SAMPLES = [
    Sample(name="openai-swarm", make=partial(make, OpenAI), facts=_facts("next call")),
    Sample(name="openai-swarm async", make=partial(make, AsyncOpenAI), facts=_facts("at once")),
]
