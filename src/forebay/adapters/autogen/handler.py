"""The handler of an agent or a team of AgentChat: its input is the payload, its result what it has said."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Final

from autogen_agentchat.base import ChatAgent, TaskResult, Team
from autogen_agentchat.messages import ModelClientStreamingChunkEvent
from autogen_core import CancellationToken, RoutedAgent

from forebay.adapters.autogen.agent_copies import AgentCopies, CannotCopy, HasRuntime, WasRun
from forebay.adapters.autogen.agent_run import AgentRun
from forebay.adapters.autogen.messages import (
    Conversation,
    chat_messages,
    fault_of,
    model_messages,
    output_of,
    split,
    steps_of,
)
from forebay.adapters.chat import ChatInput, ChatUsage, chat_handler, chat_input
from forebay.adapters.handler import Config, Handler
from forebay.context import progress
from forebay.errors import InvalidHandler, UnusableTask
from forebay.task import Task

_HINT: Final = (
    "pass an agent or a team of AgentChat, such as an AssistantAgent, or an async function that takes the Task and"
    " uses this object"
)
_CORE_HINT: Final = (
    "an agent of autogen-core gets its messages from its runtime: pass an async function that takes the Task and sends"
    " it one"
)
_RUNTIME_HINT: Final = "leave out runtime=: each task has a copy of the team, and the runtime would keep all of them"
_RUN_HINT: Final = "it has been run, and keeps that conversation: pass one that has not"


def handler(agent: Any, *, worker: str, config: Config | None) -> Handler:
    """Return the handler that runs tasks on copies of `agent`, an agent or a team.

    A run has no options. Each step is progress, and if the agents stream their model clients, the text as it arrives.

    Raises:
        InvalidHandler: `agent` is another object of AutoGen, or a team that cannot be copied.
        InvalidSetting: `config` has an option.
    """
    kind = type(agent).__name__
    if not isinstance(agent, ChatAgent | Team):
        hint = _CORE_HINT if isinstance(agent, RoutedAgent) else _HINT
        raise InvalidHandler(worker=worker, type=kind, hint=hint)
    single_use = False
    try:
        try:
            copies = AgentCopies(agent)
        except CannotCopy:
            copies, single_use = AgentCopies(agent, shares_foreign=True), True
    except CannotCopy as error:
        hint = f"it cannot be copied ({error}): pass an async function that makes one and runs it"
        raise InvalidHandler(worker=worker, type=kind, hint=hint) from error
    except (HasRuntime, WasRun) as error:
        hint = _RUNTIME_HINT if isinstance(error, HasRuntime) else _RUN_HINT
        raise InvalidHandler(worker=worker, type=kind, hint=hint) from None
    made = chat_handler(partial(_run, copies), worker=worker, config=config, options=frozenset())
    return replace(made, check=partial(_check, worker), single_use=single_use)


def _check(worker: str, task: Task) -> None:
    fault = fault_of(chat_input(task, worker).messages)
    if fault is not None:
        expected = f"the input of the agent of worker {worker!r}: messages as OpenAI's API takes them"
        raise UnusableTask(field="payload", value=fault, expected=expected)


async def _run(copies: AgentCopies, given: ChatInput, _: Mapping[str, Any]) -> Any:
    return await AgentRun().result(partial(_converse, copies.make(), given.messages))


async def _converse(runner: Any, messages: list[Any], token: CancellationToken) -> dict[str, Any]:
    """Run an agent or a team to its end, and return what it has produced as plain data."""
    is_team = isinstance(runner, Team)
    conversation, usage = Conversation(messages, names=is_team), ChatUsage()
    history, asked = split(messages)
    if history and not await _recall(runner, history, is_team=is_team):
        asked = messages
    ended: Any = None
    stream = runner.run_stream(task=chat_messages(asked) or None, cancellation_token=token, output_task_messages=False)
    async with aclosing(stream):
        async for message in stream:
            if isinstance(message, TaskResult):
                ended = message
            elif isinstance(message, ModelClientStreamingChunkEvent):
                progress({"text": message.content})
            else:
                _note(message, usage)
                if is_team or message.source == runner.name:  # not what an agent inside of it says
                    conversation.add(message)
    if not is_team and conversation.last is None:  # the answer is in the name of an agent inside of it
        conversation.add(ended.messages[-1])
    result = {
        "output": output_of(conversation.last),
        "messages": conversation.messages,
        "agent": runner.name if conversation.last is None else conversation.last.source,
        "usage": usage.as_dict(),
    }
    return result | ({"stop_reason": ended.stop_reason} if is_team else {})


def _note(message: Any, usage: ChatUsage) -> None:
    """Count the call behind a message, and report it."""
    used = message.models_usage
    if used is not None:
        usage.requests += 1
        usage.input_tokens += used.prompt_tokens
        usage.output_tokens += used.completion_tokens
    for step in steps_of(message):
        progress(step)


async def _recall(runner: Any, history: list[Any], *, is_team: bool) -> bool:
    """Put the messages of an earlier run into an agent or a team; return whether it can keep them."""
    state = await runner.save_state()
    if not is_team and "llm_context" not in state:
        return False
    await runner.load_state(_with_history(state, history, None))
    return True


def _with_history(state: Mapping[str, Any], history: list[Any], agent: str | None) -> dict[str, Any]:
    """Return a saved state with messages after those that it has, also in the agents of a team."""
    made = dict(state)
    if "llm_context" in made:
        context = dict(made["llm_context"])
        context["messages"] = [*context.get("messages", ()), *_dumped(model_messages(history, agent))]
        made["llm_context"] = context
    if "message_thread" in made:
        said = [message.dump() for message in chat_messages(history)]
        made["message_thread"] = [*made["message_thread"], *said]
    if "agent_states" in made:
        made["agent_states"] = {
            name: _with_history(inner, history, name) for name, inner in made["agent_states"].items()
        }
    if "agent_state" in made:
        made["agent_state"] = _with_history(made["agent_state"], history, agent)
    return made


def _dumped(messages: list[Any]) -> list[Any]:
    return [message.model_dump() for message in messages]
