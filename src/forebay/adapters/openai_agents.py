"""An agent of the OpenAI Agents SDK as a handler: its input is the payload, its result what ``Runner.run`` returns.

The SDK (openai-agents 0.24) treats a run as follows:

- Cancelling the run cancels its call and its async tools, and ends it without them. A *plain* tool runs in the event
  loop's default executor; cancelling leaves its thread running. Here the run waits for all of them (`RunTasks`).
- Errors of the client reach the caller as they are. The runner retries no call unless ``ModelSettings.retry`` says so;
  an unbound client makes two retries of its own.
- Context variables reach the tools, plain ones too.
- An agent keeps nothing from run to run: the same one can serve all tasks at once. Memory is a ``session``, which
  belongs to one conversation: give one for each task by a callable ``config``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from agents import Agent, ModelSettings, RunConfig, RunHooks, Runner
from pydantic_core import to_jsonable_python

from forebay.adapters.chat import ApprovalNeeded, ChatInput, ChatUsage, chat_handler, chat_input
from forebay.adapters.chat_messages import check_messages
from forebay.adapters.handler import Config, Handler
from forebay.context import progress
from forebay.errors import InvalidHandler
from forebay.task import Task

if TYPE_CHECKING:
    from agents.result import RunResultBase, RunResultStreaming

_OPTIONS: Final = frozenset(
    {
        *("run_config", "context", "max_turns", "hooks", "error_handlers", "session", "stream"),
        *("previous_response_id", "auto_previous_response_id", "conversation_id"),
    }
)
_MODULES: Final = ("agents.run", "agents.tool")


def handler(agent: Any, *, worker: str, config: Config | None) -> Handler:
    """Return the handler that runs tasks on `agent`.

    `config` has the options of ``Runner.run`` by their names, or is a callable that makes them for a task. With
    ``stream=True``, calls are streamed, and the text is progress as it arrives; otherwise each step is.

    Raises:
        InvalidHandler: `agent` is another object of the SDK.
        InvalidSetting: `config` has an option that ``Runner.run`` does not have.
    """
    if not isinstance(agent, Agent):
        hint = "pass an Agent of the OpenAI Agents SDK, or an async function that takes the Task and calls this object"
        raise InvalidHandler(worker=worker, type=type(agent).__name__, hint=hint)
    run = partial(_run, agent, worker)
    return chat_handler(run, worker=worker, config=config, options=_OPTIONS, parse=_parse, modules=_MODULES)


def _parse(task: Task, worker: str) -> ChatInput:
    """Return the input of a run, its messages as items of the SDK; a result's are such items already."""
    given = chat_input(task, worker)
    check_messages([each for each in given.messages if not _is_item(each)], worker)
    return given._replace(messages=[item for each in given.messages for item in _items(each)])


def _is_item(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("type"), str)


def _items(message: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the items of a message of the chat API, which the SDK takes if they have a role and a content alone."""
    if _is_item(message):
        yield message
        return
    role, content = message["role"], message.get("content")
    if role == "tool":
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())
        yield {"type": "function_call_output", "call_id": message["tool_call_id"], "output": text}
        return
    calls = message.get("tool_calls") or ()
    if content or not calls:
        yield {"role": role, "content": "" if content is None else content}
    for call in calls:
        function = call["function"]
        arguments = {"name": function["name"], "arguments": function["arguments"]}
        yield {"type": "function_call", "call_id": call["id"], **arguments}


async def _run(agent: Any, worker: str, given: ChatInput, options: dict[str, Any]) -> Any:
    if given.context is not None:
        options["context"] = given.context
    if options.pop("stream", False):
        options["run_config"] = _with_usage(options.get("run_config"))
        streamed = Runner.run_streamed(agent, given.messages, **options)
        await _stream(streamed)
        return _result(streamed, worker)
    options.setdefault("hooks", _StepProgress())
    return _result(await Runner.run(agent, given.messages, **options), worker)


def _with_usage(run_config: Any) -> Any:
    """Return a run's configuration that asks for the usage of streams, unless it says otherwise."""
    given = RunConfig(**run_config) if isinstance(run_config, Mapping) else run_config or RunConfig()
    settings = ModelSettings(include_usage=True).resolve(given.model_settings)
    return replace(given, model_settings=settings)


async def _stream(streamed: RunResultStreaming) -> None:
    """Pass the events of a run on as progress, and wait until it has really ended, also if this is cancelled."""
    try:
        async for event in streamed.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                progress({"text": event.data.delta})
            elif event.type == "run_item_stream_event":
                progress({"step": event.name, "agent": event.item.agent.name})
    finally:
        running = streamed.run_loop_task
        if running is not None and not running.done():
            await asyncio.wait([running])  # cancelled by then; once more would cut its cleaning up short


def _result(run: RunResultBase, worker: str) -> dict[str, Any]:
    """Return what a run has produced as plain data."""
    if run.interruptions:
        raise ApprovalNeeded(worker=worker, tool=run.interruptions[0].name)
    used = run.context_wrapper.usage
    usage = ChatUsage(used.requests, used.input_tokens, used.output_tokens)
    return {
        "output": to_jsonable_python(run.final_output),
        "messages": to_jsonable_python(run.to_input_list()),
        "agent": run.last_agent.name,
        "usage": usage.as_dict(),
    }


class _StepProgress(RunHooks):  # type: ignore[misc]  # without its package it has no type
    """Reports each step of a run as progress."""

    async def on_llm_end(self, context: Any, agent: Any, response: Any) -> None:  # noqa: ARG002 - the SDK's
        progress({"step": "model", "agent": agent.name})

    async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: Any) -> None:  # noqa: ARG002
        progress({"step": "tool", "agent": agent.name, "tool": tool.name})

    async def on_handoff(self, context: Any, from_agent: Any, to_agent: Any) -> None:  # noqa: ARG002
        progress({"step": "handoff", "agent": from_agent.name, "to": to_agent.name})
