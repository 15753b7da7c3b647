"""An agent of OpenAI Swarm as a handler: its input is the payload, its result what ``Swarm.run`` returns.

Swarm (openai-swarm 0.1) treats a run as follows:

- It blocks: its client is OpenAI's sync one, its loop has no end but that of the conversation. So it runs in a thread.
  A cancelled run stops at its next call, and if its client is an async one, which is then used in the event loop, in
  the middle of a call.
- It counts no usage and reports no steps; both are taken from its calls here.
- Errors of the client reach the caller as they are. Swarm retries nothing; an unbound client makes two retries.
- Context variables reach the functions. An agent keeps nothing from run to run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

from pydantic_core import PydanticSerializationError, to_jsonable_python
from swarm import Agent, Swarm

from forebay.adapters.agent_thread import AgentThread
from forebay.adapters.chat import ChatInput, ChatUsage, chat_handler
from forebay.adapters.chat_messages import checked_input
from forebay.adapters.handler import Config, Handler
from forebay.context import progress
from forebay.errors import InvalidHandler

# Not stream: 0.1.1 fails on chunks without a choice, and reads them by methods that pydantic has deprecated.
_OPTIONS: Final = frozenset({"client", "context_variables", "model_override", "max_turns", "execute_tools", "debug"})


def handler(agent: Any, *, worker: str, config: Config | None) -> Handler:
    """Return the handler that runs tasks on `agent`.

    `config` has the options of ``Swarm.run`` by their names, and the ``client`` of Swarm, OpenAI's sync or async one;
    or is a callable that makes them for a task. Without a client Swarm makes its own. Each call is progress.

    Raises:
        InvalidHandler: `agent` is another object of Swarm.
        InvalidSetting: `config` has an option that there is not.
    """
    if not isinstance(agent, Agent):
        hint = "pass an Agent of Swarm, or a function that takes the Task and calls this object"
        if isinstance(agent, Swarm):
            hint = "pass its Agent, and the client of this Swarm by config={'client': client}"
        raise InvalidHandler(worker=worker, type=type(agent).__name__, hint=hint)
    return chat_handler(partial(_run, agent), worker=worker, config=config, options=_OPTIONS, parse=checked_input)


async def _run(agent: Any, given: ChatInput, options: dict[str, Any]) -> Any:
    if given.context is not None:
        options["context_variables"] = given.context
    thread = AgentThread()
    client, usage = options.pop("client", None), ChatUsage()
    return await thread.run(lambda: _result(agent, _swarm(client, thread, usage), given, options, usage))


def _swarm(client: Any, thread: AgentThread, usage: ChatUsage) -> Any:
    """Return a Swarm whose calls stop with their run and are counted."""
    swarm = Swarm(client)
    completions = SimpleNamespace(create=partial(_create, swarm.client.chat.completions.create, thread, usage))
    swarm.client = SimpleNamespace(chat=SimpleNamespace(completions=completions))
    return swarm


def _create(create: Any, thread: AgentThread, usage: ChatUsage, **request: Any) -> Any:
    """Make one call of a run. Called in its thread."""
    thread.check_stop()
    answer = create(**request)
    if inspect.isawaitable(answer):  # of an async client
        answer = thread.await_in_loop(_awaiting(answer))
    _count(answer, usage)
    progress({"step": "model", "tools": [call.function.name for call in answer.choices[0].message.tool_calls or ()]})
    return answer


async def _awaiting(answer: Any) -> Any:
    return await answer


def _count(answer: Any, usage: ChatUsage) -> None:
    usage.requests += 1
    if answer.usage is not None:
        usage.input_tokens += answer.usage.prompt_tokens
        usage.output_tokens += answer.usage.completion_tokens


def _result(agent: Any, swarm: Any, given: ChatInput, options: Mapping[str, Any], usage: ChatUsage) -> dict[str, Any]:
    """Run `agent` to its end, and return what it has produced as plain data. Called in the thread of the run."""
    response = swarm.run(agent, given.messages, **options)
    last = response.messages[-1] if response.messages else {}
    return {
        "output": last.get("content"),
        "messages": to_jsonable_python([*given.messages, *response.messages]),
        "agent": None if response.agent is None else response.agent.name,
        "context": _plain_values(response.context_variables),
        "usage": usage.as_dict(),
    }


def _plain_values(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables that are plain data: the others, such as a connection, are no reason to lose an answer."""
    made = {}
    for name, value in variables.items():
        try:
            made[str(name)] = to_jsonable_python(value)
        except (PydanticSerializationError, ValueError):
            continue
    return made
