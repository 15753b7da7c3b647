"""An agent or a workflow of Microsoft Agent Framework as a handler: its input is the payload.

The framework (agent-framework-core 1.23) treats a run as follows:

- Cancelling the run cancels its calls, its async tools and the executors of a workflow. A *plain* tool runs in the
  event loop's default executor; cancelling leaves its thread running. Here the run waits for all of them (`RunTasks`).
- An error of a client is wrapped in a ``ChatClientException``, with the client's own as ``__cause__``. It retries no
  call; an unbound client of OpenAI makes two retries. An exception of a tool is told to the model.
- Context variables reach the tools and the executors, plain tools too.
- An agent keeps nothing from run to run: the same one can serve all tasks at once. Memory is a ``session``, which
  belongs to one conversation: give one for each task by a callable ``config``.
- A workflow runs one thing at a time, and keeps what its executors and its agents were told, also by a run that was
  cancelled: each task needs one of its own. A builder that builds twice gives both the same executors.
- A workflow whose calls are not streamed tells its events at its end. The usage that `AgentResponse` sums up for a
  workflow is that of its outputs, and in a stream that of the last call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, Final
from weakref import WeakSet

from agent_framework import (
    AgentExecutor,
    AgentExecutorResponse,
    AgentResponse,
    AgentResponseUpdate,
    BaseAgent,
    BaseChatClient,
    ChatMiddleware,
    Content,
    FunctionalWorkflow,
    FunctionalWorkflowAgent,
    FunctionalWorkflowDefinition,
    FunctionMiddleware,
    FunctionTool,
    Message,
    Workflow,
    WorkflowAgent,
    WorkflowBuilder,
    WorkflowExecutor,
    WorkflowMessage,
)
from pydantic_core import to_jsonable_python

from forebay.adapters.chat import ApprovalNeeded, ChatInput, ChatUsage, chat_handler, chat_input
from forebay.adapters.handler import Config, Handler
from forebay.context import progress
from forebay.errors import InvalidHandler, UnusableTask
from forebay.task import Task

# Of the signature of `run`: its input, and what goes on with an earlier run.
_NO_OPTIONS: Final = frozenset({"messages", "message", "responses", "checkpoint_id", "include_status_events"})
_FACTORY: Final = "pass factory=, a function without arguments that makes its agents and executors, and builds it"
_HINTS: Final[list[tuple[Any, str]]] = [
    (BaseChatClient, "pass an Agent that has it: Agent(client=...)"),
    (FunctionTool, "give it to an Agent, or pass the function that it was made from"),
    (WorkflowBuilder, _FACTORY),
    (
        (FunctionalWorkflow, FunctionalWorkflowAgent, FunctionalWorkflowDefinition),
        "pass an async function that takes the Task and awaits the run of a workflow that it builds",
    ),
]
_MODULES: Final = ("agent_framework._tools", "agent_framework._workflows")
_MESSAGE: Final = Message("user", ["any"])
_PLAIN_FIELDS: Final = frozenset(
    {"type", "role", "author_name", "message_id", "text", "call_id", "name", "arguments", "result", "hosted", "id"}
)
_CONTENTS: Final = frozenset({"contents", "items"})

#: The workflows of handlers, and their executors that have a state.
_claimed: WeakSet[Any] = WeakSet()


def handler(agent: Any, *, worker: str, config: Config | None) -> Handler:
    """Return the handler that runs tasks on `agent`, an agent or a workflow.

    `config` has the options of its ``run`` by their names, or is a callable that makes them for a task. With
    ``stream=True``, calls are streamed, and the text is progress as it arrives. Each step of an agent is progress.

    Raises:
        InvalidHandler: `agent` is another object of the framework.
        InvalidSetting: `config` has an option that its ``run`` does not have.
    """
    for kind, hint in _HINTS:
        if isinstance(agent, kind):
            raise InvalidHandler(worker=worker, type=type(agent).__name__, hint=hint)
    if not isinstance(agent, BaseAgent | Workflow):
        hint = "pass an Agent, or factory= that builds a Workflow, or an async function that takes the Task"
        raise InvalidHandler(worker=worker, type=type(agent).__name__, hint=hint)
    options = _options(agent)
    run: Callable[..., Any] = partial(_run_agent, agent, worker, options)
    parse: Callable[..., Any] = partial(_messages, options)
    workflow = agent.workflow if isinstance(agent, WorkflowAgent) else agent
    single_use = isinstance(workflow, Workflow)
    if single_use:
        _claim(workflow, worker)
    if isinstance(agent, Workflow):
        run = partial(_run_workflow, agent, worker)
        if not _takes(agent, [_MESSAGE]):
            parse = partial(_workflow_input, agent)
    return chat_handler(
        run, worker=worker, config=config, options=options, parse=parse, single_use=single_use, modules=_MODULES
    )


def _claim(workflow: Any, worker: str) -> None:
    """Check that a workflow and its executors that remember what they were told are in no other handler."""
    stateful = [each for each in workflow.executors.values() if isinstance(each, AgentExecutor | WorkflowExecutor)]
    for each in (workflow, *stateful):
        if each in _claimed:
            hint = f"its {type(each).__name__} is in use for another task: {_FACTORY}"
            raise InvalidHandler(worker=worker, type=type(workflow).__name__, hint=hint)
    _claimed.update((workflow, *stateful))


def _options(agent: Any) -> frozenset[str]:
    """Return the names of the options that ``agent.run`` takes."""
    parameters = inspect.signature(agent.run).parameters
    named = {name for name, each in parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD}
    return frozenset(named | {"stream"}) - _NO_OPTIONS


# --- input -----------------------------------------------------------------------------------------------------------


def _messages(options: frozenset[str], task: Task, worker: str) -> ChatInput:
    """Return the input of a task, its messages as those of the framework."""
    given = chat_input(task, worker)
    if given.context is not None and "function_invocation_kwargs" not in options:
        expected = f"left out: the run of the agent of worker {worker!r} takes no function_invocation_kwargs"
        raise UnusableTask(field="the context of the payload", value="dict", expected=expected)
    messages = []
    for number, each in enumerate(given.messages):
        try:
            messages.append(_message(each))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            expected = (
                f"the input of the agent of worker {worker!r}: messages of OpenAI's chat API, or of the framework"
            )
            value = f"a list whose item {number} is another dict ({type(error).__name__})"
            raise UnusableTask(field="payload", value=value, expected=expected) from error
    return ChatInput(messages, given.context)


def _message(given: Mapping[str, Any]) -> Message:
    """Return the message of a dict: one of OpenAI's chat API, or what ``Message.to_dict`` has made."""
    if "contents" in given:
        return Message.from_dict(dict(given))
    content, contents = given.get("content"), []
    if given["role"] == "tool":
        result = Content.from_function_result(call_id=given["tool_call_id"], result=content)
        return Message("tool", [result])
    if isinstance(content, str):
        contents.append(Content.from_text(content))
    else:
        contents += [_part(part) for part in content or ()]
    for call in given.get("tool_calls") or ():
        function = call["function"]
        name, arguments = function["name"], function.get("arguments")
        contents.append(Content.from_function_call(call_id=call["id"], name=name, arguments=arguments))
    return Message(given["role"], contents)


def _part(part: Mapping[str, Any]) -> Content:
    if "image_url" in part:
        image = part["image_url"]
        url = image if isinstance(image, str) else image["url"]
        return Content.from_uri(url, media_type=None if url.startswith("data:") else "image/*")
    return Content.from_text(part["text"])


def _workflow_input(workflow: Any, task: Task, worker: str) -> Any:
    """Return the input of a workflow that takes no messages: the payload as it is."""
    if _takes(workflow, task.payload):
        return task.payload
    names = ", ".join(getattr(each, "__name__", str(each)) for each in workflow.input_types)
    expected = f"the input of the workflow of worker {worker!r}, of one of the types {names}"
    raise UnusableTask(field="payload", value=type(task.payload).__name__, expected=expected)


def _takes(workflow: Any, value: Any) -> bool:
    """Return whether the first executor of a workflow takes a value."""
    message = WorkflowMessage(data=value, source_id="forebay")
    return bool(workflow.get_start_executor().can_handle(message))


# --- runs ------------------------------------------------------------------------------------------------------------


async def _run_agent(agent: Any, worker: str, takes: frozenset[str], given: ChatInput, options: dict[str, Any]) -> Any:
    _add_context(given, options)
    counted, name = ChatUsage(), agent.name or agent.id
    if "middleware" in takes:
        options["middleware"] = [*(options.get("middleware") or ()), _ModelSteps(name, counted), _ToolSteps(name)]
    if options.pop("stream", False):
        stream, tokens = agent.run(given.messages, stream=True, **options), _StreamTokens()
        async for update in stream:
            _report(update)
            tokens.add(update)
        response = await stream.get_final_response()
        used = ChatUsage(_calls(response), *tokens.total())
    else:
        response = await agent.run(given.messages, **options)
        used = _usage(response)
    _check_approvals(worker, _requests(response))
    last = response.messages[-1] if response.messages else None
    return {
        "output": _output(response),
        "messages": _plain([*given.messages, *response.messages]),
        "agent": (last and last.author_name) or name,
        "usage": (counted if counted.requests else used).as_dict(),
    }


async def _run_workflow(workflow: Any, worker: str, given: Any, options: dict[str, Any]) -> Any:
    messages: list[Message] = []
    if isinstance(given, ChatInput):
        messages = list(given.messages)
        _add_context(given, options)
        given = given.messages
    if options.pop("stream", False):
        events = []
        async for event in workflow.run(given, stream=True, **options):
            events.append(event)
            _report_event(event)
    else:
        events = await workflow.run(given, **options)
    asked = [each for each in events if each.type == "request_info"]
    _check_approvals(worker, (_asked(each.data) or each.source_executor_id for each in asked))
    output, last, usage = None, workflow.name, ChatUsage()
    for last, each in _outputs(events):  # noqa: B007 - the last one is in the result
        produced = _messages_of(each)
        messages += produced
        output = _output(each) if isinstance(each, AgentResponse) else produced[-1].text if produced else _plain(each)
    for event in events:
        if event.type == "executor_completed":
            for sent in event.data or ():
                if isinstance(sent, AgentExecutorResponse):
                    _add(usage, _usage(sent.agent_response))
    return {"output": output, "messages": _plain(messages), "agent": last, "usage": usage.as_dict()}


def _add_context(given: ChatInput, options: dict[str, Any]) -> None:
    if given.context is not None:
        options["function_invocation_kwargs"] = {**(options.get("function_invocation_kwargs") or {}), **given.context}


def _outputs(events: Any) -> Iterator[tuple[str, Any]]:
    """Yield the executors and the outputs of a run, the pieces of a streamed response as one."""
    outputs = ((event.executor_id, event.data) for event in events if event.type == "output")
    for executor, group in groupby(outputs, itemgetter(0)):
        pieces: list[AgentResponseUpdate] = []
        for _, data in group:
            if isinstance(data, AgentResponseUpdate):
                pieces.append(data)
            else:
                yield executor, data
        if pieces:
            yield executor, AgentResponse.from_updates(pieces)


# --- progress and usage ----------------------------------------------------------------------------------------------


class _ModelSteps(ChatMiddleware):  # type: ignore[misc]  # without its package it has no type
    """Reports the calls of a run as progress, and counts them."""

    def __init__(self, agent: str, usage: ChatUsage) -> None:
        self._agent, self._usage = agent, usage

    async def process(self, context: Any, call_next: Callable[[], Any]) -> None:
        """Make a call."""
        await call_next()
        if context.stream:
            context.stream_result_hooks.append(self._count)
        else:
            self._count(context.result)

    def _count(self, response: Any) -> Any:
        _add(self._usage, ChatUsage(1, *_tokens(response.usage_details)))
        progress({"step": "model", "agent": self._agent})
        return response


class _ToolSteps(FunctionMiddleware):  # type: ignore[misc]
    """Reports the tools of a run as progress."""

    def __init__(self, agent: str) -> None:
        self._agent = agent

    async def process(self, context: Any, call_next: Callable[[], Any]) -> None:
        """Call a tool."""
        await call_next()
        progress({"step": "tool", "agent": self._agent, "tool": context.function.name})


def _report(update: Any) -> None:
    if update.text:
        progress({"text": update.text})


def _report_event(event: Any) -> None:
    if event.type == "output" and isinstance(event.data, AgentResponseUpdate):
        _report(event.data)
    elif event.type == "executor_completed":
        progress({"step": "executor", "executor": event.executor_id})


class _StreamTokens:
    """The tokens of a streamed run: each agent in it reports its sum so far, which begins again when it runs again."""

    def __init__(self) -> None:
        self._ended = (0, 0)
        self._latest: dict[str | None, tuple[int, int]] = {}  # by the name of the agent

    def add(self, update: Any) -> None:
        """Count what an update reports."""
        for content in update.contents:
            if content.type == "usage":
                tokens, before = _tokens(content.usage_details), self._latest.get(update.author_name, (0, 0))
                if content.merge_mode != "replace" or tokens <= before:
                    self._ended = _sum(self._ended, before)
                self._latest[update.author_name] = tokens

    def total(self) -> tuple[int, int]:
        """Return the input and output tokens so far."""
        return _sum(self._ended, *self._latest.values())


def _usage(response: Any) -> ChatUsage:
    return ChatUsage(_calls(response), *_tokens(response.usage_details))


def _calls(response: Any) -> int:
    """Return the calls of a response: the answer of each is a message of the assistant."""
    return sum(message.role == "assistant" for message in response.messages)


def _tokens(details: Mapping[str, Any] | None) -> tuple[int, int]:
    """Return the input and output tokens of the framework's usage."""
    found = details or {}
    return found.get("input_token_count") or 0, found.get("output_token_count") or 0


def _sum(*tokens: tuple[int, int]) -> tuple[int, int]:
    return sum(each[0] for each in tokens), sum(each[1] for each in tokens)


def _add(usage: ChatUsage, more: ChatUsage) -> None:
    usage.requests += more.requests
    usage.input_tokens += more.input_tokens
    usage.output_tokens += more.output_tokens


# --- results ---------------------------------------------------------------------------------------------------------


def _check_approvals(worker: str, asked: Iterator[str]) -> None:
    """Check that nobody is asked for an approval or an answer."""
    for name in asked:
        raise ApprovalNeeded(worker=worker, tool=name)


def _requests(response: Any) -> Iterator[str]:
    return (_asked(content) or content.type for content in response.user_input_requests)


def _asked(content: Any) -> str | None:
    """Return the name of the tool that a content asks about."""
    if not isinstance(content, Content):
        return None
    name: str | None = (content.function_call or content).name
    return name


def _output(response: Any) -> Any:
    """Return the structured value of a response, or its last text."""
    value = response.value
    if value is not None:
        return to_jsonable_python(value)
    return response.messages[-1].text if response.messages else None


def _messages_of(data: Any) -> list[Message]:
    if isinstance(data, AgentResponse):
        return list(data.messages)
    many = data if isinstance(data, list) else [data]
    return list(many) if all(isinstance(each, Message) for each in many) else []


def _plain(data: Any) -> Any:
    """Return plain data."""
    if isinstance(data, list):
        return [_plain(each) for each in data]
    if isinstance(data, Message | Content):
        return _plain_fields(data) or to_jsonable_python(data.to_dict())
    return to_jsonable_python(data)


def _plain_fields(data: Any) -> dict[str, Any] | None:
    """Return what ``to_dict`` does, in a tenth of its time; None if a field is none of those that most have."""
    kind = type(data)
    if kind is not Message and kind is not Content:
        return None
    made: dict[str, Any] = {"type": "message"} if kind is Message else {}
    for name, value in data.__dict__.items():
        if value is None or name == "raw_representation":
            continue
        if name in _PLAIN_FIELDS and type(value) in (str, bool):
            made[name] = value
        elif name in _CONTENTS and type(value) is list:
            made[name] = _plain(value)
        elif name == "additional_properties" and value == {}:
            made[name] = {}
        elif value is not False or name != "informational_only":
            return None
    return made
