"""An agent of pydantic-ai as a handler: its input is the payload, its result what ``Agent.run`` returns.

pydantic-ai (2.38) treats a run as follows:

- Cancelling the run cancels its call and its async tools. A *plain* tool runs in a thread, which anyio keeps for other
  runs; the run ends without it if it is cancelled or another tool fails. Here such tools run in threads of the run
  (`RunTasks`), which lasts until they have returned.
- Errors of the client are raised as ``ModelHTTPError`` or ``ModelAPIError``, from the client's own. It retries no call;
  an unbound client of OpenAI makes two retries. A tool that raises ``ModelRetry``, or whose arguments or output do not
  validate, costs another call each time: one by default, ``retries=`` of the agent.
- Context variables reach the tools, plain ones too.
- An agent keeps nothing from run to run: the same one can serve all tasks at once.
- A run that is given messages leaves the agent's ``system_prompt`` out; here it is added to those that have none.
  ``instructions`` are sent always.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from functools import partial
from typing import Any, Final

from pydantic_ai import (
    Agent,
    DeferredToolRequests,
    FunctionToolResultEvent,
    PartDeltaEvent,
    PartStartEvent,
    RetryPromptPart,
    TextPart,
    TextPartDelta,
    ToolReturnPart,
)
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.capabilities import ReinjectSystemPrompt
from pydantic_core import to_jsonable_python

from forebay.adapters.chat import ApprovalNeeded, ChatUsage, chat_handler
from forebay.adapters.handler import Config, Handler
from forebay.adapters.pydantic_ai.run_input import InputReader, RunInput, plain_messages
from forebay.adapters.run_tasks import run_threads
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

_MODULES: Final = ("pydantic_ai._agent_graph", "pydantic_ai._tool_execution")


class ToolResultNeeded(ForebayError, RuntimeError):
    """The agent of worker {worker!r} waits for a result of {tool!r}: run it in a function that gives results."""


def handler(agent: Any, *, worker: str, config: Config | None) -> Handler:
    """Return the handler that runs tasks on `agent`.

    `config` has the options of ``Agent.run`` by their names, or is a callable that makes them for a task. With
    ``stream=True``, calls are streamed, and the text is progress as it arrives; each step is in any case, unless the
    agent or `config` has an ``event_stream_handler``.

    Raises:
        InvalidHandler: `agent` is another object of pydantic-ai.
        InvalidSetting: `config` has an option that ``Agent.run`` does not have.
    """
    if not isinstance(agent, AbstractAgent):
        hint = "pass an Agent of pydantic-ai, or an async function that takes the Task and calls this object"
        raise InvalidHandler(worker=worker, type=type(agent).__name__, hint=hint)
    parse = InputReader(agent.deps_type).read
    run = partial(_run, agent, worker)
    return chat_handler(run, worker=worker, config=config, options=_OPTIONS, parse=parse, modules=_MODULES)


async def _run(agent: Any, worker: str, given: RunInput, options: dict[str, Any]) -> Any:
    if given.deps is not None:
        options["deps"] = given.deps
    if given.lacks_system_prompt:
        own = options.get("capabilities") or ()
        options["capabilities"] = [*own, ReinjectSystemPrompt(id="forebay_system_prompt")]
    watch = options.pop("event_stream_handler", None) or agent.event_stream_handler
    if options.pop("stream", False):
        watch = watch or _report_events
    arguments = {"user_prompt": given.prompt, "message_history": given.history, "infer_name": False, **options}
    with Agent.using_thread_executor(run_threads()):
        if watch is not None:
            result = await agent.run(event_stream_handler=watch, **arguments)
        else:
            result = await _run_by_steps(agent, arguments)
    return _result(agent, worker, result)


async def _run_by_steps(agent: Any, arguments: dict[str, Any]) -> Any:
    """Do what ``Agent.run`` does, and report each step as progress. A capability that did would cost 10 % of a run."""
    async with agent.iter(**arguments) as run:
        node = run.next_node
        while run.result is None and not agent.is_end_node(node):
            following = await run.next(node)
            if agent.is_model_request_node(node):
                progress({"step": "model", "agent": agent.name})
            if agent.is_call_tools_node(node) and agent.is_model_request_node(following):
                for part in following.request.parts:
                    _report_tool(agent, part)
            node = following
    return run.result


async def _report_events(context: Any, events: AsyncIterable[Any]) -> None:
    """Report the text of one call as it arrives, and the steps of a streamed run."""
    agent, called = context.agent, False
    async for event in events:
        if isinstance(event, PartStartEvent):
            called = True
            if isinstance(event.part, TextPart) and event.part.content:
                progress({"text": event.part.content})
        elif isinstance(event, PartDeltaEvent):
            if isinstance(event.delta, TextPartDelta):
                progress({"text": event.delta.content_delta})
        elif isinstance(event, FunctionToolResultEvent):
            _report_tool(agent, event.part)
    if called:
        progress({"step": "model", "agent": agent.name})


def _report_tool(agent: Any, part: Any) -> None:
    if isinstance(part, ToolReturnPart | RetryPromptPart) and part.tool_name is not None:
        progress({"step": "tool", "agent": agent.name, "tool": part.tool_name})


def _result(agent: Any, worker: str, result: Any) -> dict[str, Any]:
    """Return what a run has produced as plain data."""
    output, used = result.output, result.usage
    if isinstance(output, DeferredToolRequests):
        if output.approvals:
            raise ApprovalNeeded(worker=worker, tool=output.approvals[0].tool_name)
        raise ToolResultNeeded(worker=worker, tool=output.calls[0].tool_name)
    return {
        "output": to_jsonable_python(output),
        "messages": plain_messages(result.all_messages()),
        "agent": agent.name,
        "usage": ChatUsage(used.requests, used.input_tokens, used.output_tokens).as_dict(),
    }
