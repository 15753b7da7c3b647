"""An agent of pydantic-ai as a handler: its input is the payload, its result what ``Agent.run`` returns.

pydantic-ai (2.38) treats a run as follows:

- Cancelling the run cancels its call and its async tools. A *plain* tool runs in a thread, which anyio keeps for other
  runs; cancelled there, the run ends without it. Here such tools run in threads of the run (`ToolThreads`), and a
  cancelled run lasts until they have returned.
- Errors of the client are raised as ``ModelHTTPError`` or ``ModelAPIError``, from the client's own. It retries no call;
  an unbound client of OpenAI makes two retries. A tool that raises ``ModelRetry``, or whose arguments or output do not
  validate, costs another call each time: one by default, ``retries=`` of the agent.
- Context variables reach the tools, plain ones too.
- An agent keeps nothing from run to run: the same one can serve all tasks at once.
- A run that is given messages leaves the agent's ``system_prompt`` out; here it is added to those that have none.
  ``instructions`` are sent always.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from functools import partial
from typing import Any, Final

from pydantic_ai import Agent, PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.capabilities import AbstractCapability, ReinjectSystemPrompt
from pydantic_core import to_jsonable_python

from forebay.adapters.chat import ApprovalNeeded, ChatInput, ChatUsage, chat_handler
from forebay.adapters.handler import Config, Handler
from forebay.adapters.pydantic_ai.run_input import InputReader, plain_messages
from forebay.adapters.pydantic_ai.tool_threads import ToolThreads
from forebay.context import progress
from forebay.errors import ForebayError, InvalidHandler

# Not usage: a count that runs share. Not deferred_tool_results: they answer calls of a run that is not there any more.
_OPTIONS: Final = frozenset(
    {
        *("capabilities", "cancellation_token", "conversation_id", "deps", "event_stream_handler", "instructions"),
        *("metadata", "model", "model_settings", "output_type", "retries", "run_id", "spec", "stream", "toolsets"),
        "usage_limits",
    }
)


class ToolResultNeeded(ForebayError, RuntimeError):
    """The agent of worker {worker!r} waits for a result of {tool!r}: run it in a function that gives results."""


def handler(agent: Any, *, worker: str, config: Config | None) -> Handler:
    """Return the handler that runs tasks on `agent`.

    `config` has the options of ``Agent.run`` by their names, or is a callable that makes them for a task. With
    ``stream=True``, calls are streamed, and the text is progress as it arrives; each step is in any case.

    Raises:
        InvalidHandler: `agent` is another object of pydantic-ai.
        InvalidSetting: `config` has an option that ``Agent.run`` does not have.
    """
    if not isinstance(agent, AbstractAgent):
        hint = "pass an Agent of pydantic-ai, or an async function that takes the Task and calls this object"
        raise InvalidHandler(worker=worker, type=type(agent).__name__, hint=hint)
    reader = InputReader(agent.deps_type, worker)
    run = partial(_run, agent, worker, reader)
    return chat_handler(run, worker=worker, config=config, options=_OPTIONS, check=reader.read)


async def _run(agent: Any, worker: str, reader: InputReader, given: ChatInput, options: dict[str, Any]) -> Any:
    read = reader.read(given)
    if given.context is not None:
        options["deps"] = read.deps
    hooks = (_StreamedRun if options.pop("stream", False) else _Run)(worker)
    own = options.pop("capabilities", None) or ()
    options["capabilities"] = [*own, ReinjectSystemPrompt(id="forebay_system_prompt"), hooks]
    threads = ToolThreads()
    try:
        with Agent.using_thread_executor(threads):
            result = await agent.run(message_history=read.messages, infer_name=False, **options)
    except asyncio.CancelledError:
        await threads.wait()
        raise
    return _result(agent, result)


def _result(agent: Any, result: Any) -> dict[str, Any]:
    """Return what a run has produced as plain data."""
    used = result.usage
    return {
        "output": to_jsonable_python(result.output),
        "messages": plain_messages(result.all_messages()),
        "agent": agent.name,
        "usage": ChatUsage(used.requests, used.input_tokens, used.output_tokens).as_dict(),
    }


class _Run(AbstractCapability[Any]):  # type: ignore[misc]  # without its package it has no type
    """Reports each step of a run as progress, and ends it where it would wait for a person."""

    def __init__(self, worker: str) -> None:
        self._worker = worker

    async def after_model_request(self, ctx: Any, *, request_context: Any, response: Any) -> Any:  # noqa: ARG002
        progress({"step": "model", "agent": ctx.agent.name})
        return response

    async def after_tool_execute(self, ctx: Any, *, call: Any, tool_def: Any, args: Any, result: Any) -> Any:  # noqa: ARG002
        progress({"step": "tool", "agent": ctx.agent.name, "tool": call.tool_name})
        return result

    async def handle_deferred_tool_calls(self, ctx: Any, *, requests: Any) -> None:  # noqa: ARG002
        """End the run if calls are left that no other capability has answered.

        Raises:
            ApprovalNeeded: a tool asks for an approval.
            ToolResultNeeded: a tool is run elsewhere.
        """
        if requests.approvals:
            raise ApprovalNeeded(worker=self._worker, tool=requests.approvals[0].tool_name)
        if requests.calls:
            raise ToolResultNeeded(worker=self._worker, tool=requests.calls[0].tool_name)


class _StreamedRun(_Run):
    """Has the calls of a run streamed, and reports their text as progress, too."""

    async def wrap_run_event_stream(self, ctx: Any, *, stream: AsyncIterable[Any]) -> AsyncIterator[Any]:
        async for event in super().wrap_run_event_stream(ctx, stream=stream):
            text = _text_of(event)
            if text:
                progress({"text": text})
            yield event


def _text_of(event: Any) -> str:
    if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
        return str(event.part.content)
    if isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
        return str(event.delta.content_delta)
    return ""
