"""A Crew, an Agent or a Flow of CrewAI as a handler: its input is the payload, its result what ``kickoff`` returns.

CrewAI (1.15) treats a run as follows:

- It blocks. Even ``akickoff`` makes its calls by the blocking client, in threads, where they go on when it is
  cancelled. So a run has a thread here, with the loops and threads that CrewAI starts in it. The requests of the LLMs
  of a crew or an agent that are over OpenAI's or Anthropic's SDK are made in the event loop of the supervisor, by the
  async client that CrewAI gives such an LLM and does not use: a cancelled run stops in the middle of one. Any other
  LLM, such as that of a flow or of a tool, stops at its next call.
- An agent of a crew repeats a failed task twice, and an LLM a throttled call twice, on top of its client's retries.
  Both are off where the LLM is bound.
- A crew keeps inputs and outputs, an LLM its usage, a flow its state: a task runs on a copy, or on a flow of its own.
- The outputs of the last crew are kept in a file of the machine, for which crews at once wait. Those of tasks are not.
- Errors of the client reach the caller as they are. Context variables reach the tools, which run in further threads.
- Before each call, OpenAI is asked to count the tokens of the input, by a request of its own. Other addresses are not.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from crewai import Agent, Crew, Flow
from crewai import Task as CrewTask
from crewai.crews.crew_output import CrewOutput
from crewai.events.event_bus import crewai_event_bus
from crewai.flow.async_feedback.types import HumanFeedbackPending
from crewai.hooks import HookAborted, InterceptionPoint
from crewai.hooks.dispatch import scoped_hooks
from crewai.llms.base_llm import BaseLLM
from crewai.tools import BaseTool
from crewai.utilities.message_utils import message_content_text
from crewai.utilities.string_utils import interpolate_only
from crewai.utilities.task_output_storage_handler import TaskOutputStorageHandler
from pydantic_core import PydanticSerializationError, to_jsonable_python

from forebay.adapters.agent_thread import AgentThread
from forebay.adapters.blocking_client import in_loop
from forebay.adapters.chat import ChatInput, ChatUsage, chat_handler, chat_input
from forebay.adapters.chat_messages import check_messages, checked_input
from forebay.adapters.handler import Config, Handler
from forebay.context import progress
from forebay.errors import InvalidHandler, UnusableTask
from forebay.task import Task
from forebay.upstream.httpx_binding.crewai_llm import is_bound, make_clients

_CREW_OPTIONS: Final = frozenset({"inputs", "input_files", "stream"})
_AGENT_OPTIONS: Final = frozenset({"response_format", "input_files", "stream"})
_FLOW_OPTIONS: Final = frozenset({"inputs", "input_files", "restore_from_state_id"})
_MESSAGE: Final = "message"  # the input for text and for the last message of a list
_PLACEHOLDER: Final = re.compile(r"\{([A-Za-z_][A-Za-z0-9_-]*)}")  # as CrewAI fills them in
_TEXTS: Final = ("description", "expected_output", "output_file", "role", "goal", "backstory")
_LEFT_OUT: Final = ("apps", "mcps")  # of a copy of an agent
_COPYING: Final = threading.Lock()  # a new crew opens a file of the machine, for which crews wait by polling
_HINTS: Final = (
    (type, "it is a class: pass factory=, a callable that makes one for each task"),
    (CrewTask, "put it into a Crew: Crew(agents=[...], tasks=[...])"),
    (BaseLLM, "make an Agent with it: Agent(llm=...)"),
    (BaseTool, "give it to an Agent: Agent(tools=[...])"),
)
_EXPECTED: Final = (
    "the input of the crew or flow of worker {worker!r}: a dict of its inputs{names}; or, for its input 'message',"
    " text, a list of messages, each a dict such as {{'role': 'user', 'content': '...'}}, or a dict with such"
    " 'messages' and a 'context', a dict of further inputs"
)


def handler(agent: Any, *, worker: str, config: Config | None) -> Handler:
    """Return the handler that runs tasks on copies of a Crew or an Agent, or one task on a Flow.

    `config` has the options of ``kickoff`` by their names, or is a callable that makes them for a task. Its ``inputs``
    stand for those that a payload leaves out. With ``stream=True`` the text of calls is progress as it arrives.

    Raises:
        InvalidHandler: `agent` is another object of CrewAI, or a crew that needs a person or cannot be copied.
        InvalidSetting: `config` has an option that there is not.
    """
    if isinstance(agent, Crew):
        _check_crew(agent, worker)
        given = None if callable(config) else frozenset((config or {}).get("inputs") or ())
        read = partial(_crew_input, names=_names_of(agent), given=given)
        return chat_handler(partial(_run_crew, agent), worker=worker, config=config, options=_CREW_OPTIONS, parse=read)
    if isinstance(agent, Agent):
        _check_limits(agent, (agent,), worker)
        run = partial(_run_agent, agent)
        return chat_handler(run, worker=worker, config=config, options=_AGENT_OPTIONS, parse=_agent_input)
    if isinstance(agent, Flow):
        run = partial(_run_flow, agent)
        once = chat_handler(run, worker=worker, config=config, options=_FLOW_OPTIONS, parse=_inputs)
        return replace(once, single_use=True, blocking=True)  # making a flow blocks: it opens a memory
    hint = "pass a Crew or an Agent of CrewAI, or factory= for a Flow"
    if callable(getattr(agent, "crew", None)):  # its class has @CrewBase
        hint = "pass the Crew that its crew() returns"
    hint = next((advice for kind, advice in _HINTS if isinstance(agent, kind)), hint)
    raise InvalidHandler(worker=worker, type=type(agent).__name__, hint=hint)


def _check_crew(crew: Crew, worker: str) -> None:
    hint = None
    if type(crew) is not Crew and type(crew).copy is Crew.copy:
        hint = "its copy(), of which each task gets one, makes a plain Crew: write a copy() for its class"
    elif any(task.human_input for task in crew.tasks):
        hint = "a task of it has human_input=True, which asks at the terminal: leave that out"
    elif any(task.agent is not None and _index(crew.agents, task.agent) is None for task in crew.tasks):
        hint = "the agent of a task is not one of its agents, which are what a copy has: Crew(agents=[...]) with all"
    elif any(_index(crew.tasks, each) is None for task in crew.tasks for each in _context_of(task)):
        hint = "a task in the context of another is not one of its tasks, which are what a copy has: put it into tasks"
    if hint:
        raise InvalidHandler(worker=worker, type=type(crew).__name__, hint=hint)
    _check_limits(crew, (crew, *crew.agents, crew.manager_agent), worker)


def _check_limits(agent: Any, parts: Iterable[Any], worker: str) -> None:
    """Check that CrewAI's own limit is off: each copy would count for itself, and wait where nothing can cancel it."""
    if any(getattr(part, "max_rpm", None) for part in parts):
        hint = (
            "max_rpm= counts the calls of one copy, and each task has its own: leave it out, and limit all of them by"
            " Upstream(quotas=[Quota(requests=..., per='minute')])"
        )
        raise InvalidHandler(worker=worker, type=type(agent).__name__, hint=hint)


def _context_of(task: CrewTask) -> Sequence[CrewTask]:
    """Return the tasks whose outputs a task is given; none if it does not say which."""
    return task.context if isinstance(task.context, list) else ()


def _index(parts: Sequence[Any], part: Any) -> int | None:
    """Return where an object itself is in a sequence, and not one that equals it; None if it is not in it."""
    return next((number for number, each in enumerate(parts) if each is part), None)


# --- payloads ---


def _names_of(crew: Crew) -> frozenset[str] | None:
    """Return the names of the inputs that a crew needs; None if it makes some itself."""
    if crew.before_kickoff_callbacks:
        return None
    texts = (getattr(part, name, None) or "" for part in (*crew.tasks, *crew.agents) for name in _TEXTS)
    return frozenset(name for text in texts for name in _PLACEHOLDER.findall(text))


def _inputs(task: Task, worker: str, names: frozenset[str] | None = None) -> ChatInput:
    """Return the inputs of a payload as the context, with its messages, if it has some.

    Raises:
        UnusableTask: it is something else.
    """
    payload = {} if task.payload is None else task.payload
    if isinstance(payload, Mapping) and "messages" not in payload:
        wrong = next((key for key in payload if not isinstance(key, str)), None)
        if wrong is not None:
            raise _unusable(worker, names, f"a dict with a key that is a {type(wrong).__name__}")
        return ChatInput([], dict(payload))
    given = chat_input(task, worker, _expected(names))
    check_messages(given.messages, worker)
    asked = next((each for each in reversed(given.messages) if each.get("role") == "user"), given.messages[-1])
    text = message_content_text(asked)
    return ChatInput(given.messages, {**(given.context or {}), _MESSAGE: text, "messages": given.messages})


def _crew_input(task: Task, worker: str, *, names: frozenset[str] | None, given: frozenset[str] | None) -> ChatInput:
    """Return the inputs of a payload for a crew.

    Args:
        task: whose payload it is.
        worker: the worker's name, for messages.
        names: of the inputs that the crew needs; None if that is not known.
        given: the names of those that the config has; None if it is made for each task.

    Raises:
        UnusableTask: it is something else, or an input is missing.
    """
    found = _inputs(task, worker, names)
    inputs = found.context or {}
    if inputs.pop("messages", None) is not None and len(found.messages) > 1:
        said = [each for each in found.messages if each.get("role") in ("user", "assistant") and each.get("content")]
        inputs["crew_chat_messages"] = json.dumps([{**each, "content": message_content_text(each)} for each in said])
    if names is not None and found.messages and _MESSAGE not in names:
        raise _unusable(worker, names, "text or messages, for which no task of the crew has a {message}")
    missing = () if names is None or given is None else sorted(names - inputs.keys() - given)
    if missing:
        raise _unusable(worker, names, f"inputs without {', '.join(map(repr, missing))}")
    if names is not None and (wrong := _not_plain(inputs)):
        raise _unusable(worker, names, wrong)
    return ChatInput(found.messages, inputs)


def _agent_input(task: Task, worker: str) -> ChatInput:
    """Return the messages of a payload, and the context that fills the placeholders of an agent.

    Raises:
        UnusableTask: it is something else.
    """
    given = checked_input(task, worker)
    if wrong := _not_plain(given.context or {}):
        expected = f"plain values in the 'context' of a task of worker {worker!r}, which fill the agent's placeholders"
        raise UnusableTask(field="payload", value=wrong, expected=expected)
    return given


def _not_plain(inputs: Mapping[str, Any]) -> str | None:
    """Return what is wrong with values that CrewAI cannot fill in; None if it can."""
    try:
        interpolate_only(None, dict(inputs))
    except ValueError as error:
        return f"an input that is no plain data: {error}"
    return None


def _unusable(worker: str, names: frozenset[str] | None, value: str) -> UnusableTask:
    return UnusableTask(field="payload", value=value, expected=_expected(names).format(worker=worker))


def _expected(names: frozenset[str] | None) -> str:
    return _EXPECTED.replace("{names}", f" {', '.join(map(repr, sorted(names)))}" if names else "")


# --- runs ---


async def _run_crew(crew: Crew, given: ChatInput, options: dict[str, Any]) -> Any:
    run, streams = _Run(), options.pop("stream", crew.stream)
    inputs = {**(options.pop("inputs", None) or {}), **(given.context or {})}

    def kickoff() -> dict[str, Any]:
        copied = run.copy_of(crew, streams=streams)
        output = copied.kickoff(inputs=inputs, **options)
        if isinstance(output, CrewOutput):
            value = output.pydantic if output.pydantic is not None else output.json_dict
            value, said = to_jsonable_python(output.raw if value is None else value), output.raw
            done = output.tasks_output
        else:  # what an after_kickoff callback made of it
            value, said = _plain_and_said(output)
            done = [task.output for task in copied.tasks if task.output is not None]
        return {
            "output": value,
            "messages": to_jsonable_python([*given.messages, {"role": "assistant", "content": said}]),
            "agent": done[-1].agent,
            "tasks": [{"name": each.name, "agent": each.agent, "output": each.raw} for each in done],
            "usage": run.usage().as_dict(),
        }

    return await run.do(kickoff)


async def _run_agent(agent: Agent, given: ChatInput, options: dict[str, Any]) -> Any:
    run, streams = _Run(), options.pop("stream", False)

    def kickoff() -> dict[str, Any]:
        copied = run.agent_of(agent, streams=streams)
        if given.context:
            copied.interpolate_inputs(given.context)
        output = copied.kickoff(given.messages, **options)
        return {
            "output": output.raw if output.pydantic is None else to_jsonable_python(output.pydantic),
            "messages": to_jsonable_python([*given.messages, *_new_messages(given.messages, output.messages)]),
            "agent": output.agent_role,
            "usage": run.usage().as_dict(),
        }

    return await run.do(kickoff)


async def _run_flow(flow: Any, given: ChatInput, options: dict[str, Any]) -> Any:
    run = _Run()
    inputs = {**(options.pop("inputs", None) or {}), **(given.context or {})}
    flow.stream = False
    _forget(flow)

    async def kickoff() -> Any:
        with run.thread.stopping(_CurrentTask()):
            return await flow.kickoff_async(inputs=inputs, **options)

    value = await run.do(lambda: asyncio.run(kickoff()))
    if isinstance(value, HumanFeedbackPending):
        raise value
    output, said = _plain_and_said(getattr(value, "raw", value))  # of a crew or an agent
    used = flow.usage_metrics
    return {
        "output": output,
        "messages": to_jsonable_python([*given.messages, {"role": "assistant", "content": said}]),
        "agent": flow.name or type(flow).__name__,
        "state": {str(name): _plain_or_none(each) for name, each in dict(flow.state).items()},
        "usage": ChatUsage(used.successful_requests, used.prompt_tokens, used.completion_tokens).as_dict(),
    }


def _forget(flow: Any) -> None:
    """Take a flow out of the run that CrewAI notes in this context, which a flow of yours may have begun.

    That run is for good, and a flow that a task makes joins it.
    """
    state = crewai_event_bus.runtime_state
    if state is not None:
        with crewai_event_bus._instance_lock:  # noqa: SLF001 - under which others join
            state.root[:] = [each for each in state.root if each is not flow]


def _plain_and_said(output: Any) -> tuple[Any, str]:
    """Return an output as plain data and as the text of a message."""
    value = to_jsonable_python(output)
    return value, value if isinstance(value, str) else json.dumps(value)


def _plain_or_none(value: Any) -> Any:
    """Return a value as plain data; None for an object such as a lock or a client, for which no work is thrown away."""
    try:
        return to_jsonable_python(value)
    except (PydanticSerializationError, ValueError):
        return None


def _new_messages(given: list[Any], messages: list[Any]) -> list[Any]:
    """Return the messages of an agent's run that follow those it was given; CrewAI puts one of its own before them."""
    carried = [each for each in given if each.get("content") or each.get("tool_calls")]
    own = len([each for each in messages if each["role"] == "system"]) > len(
        [each for each in carried if each.get("role") == "system"]
    )
    return messages[len(carried) + own :]


class _Run:
    """One run: its thread, and its LLMs, which stop with it and are counted."""

    def __init__(self) -> None:
        self.thread = AgentThread()
        self._llms: list[BaseLLM] = []

    async def do(self, kickoff: Callable[[], Any]) -> Any:
        """Return what `kickoff` returns in the thread of the run, with hooks that stop and report its steps."""

        def hooked() -> Any:
            hooks = {
                InterceptionPoint.PRE_MODEL_CALL: [self._begin_model],
                InterceptionPoint.PRE_TOOL_CALL: [self._check_stop],
                InterceptionPoint.POST_TOOL_CALL: [_report_tool],
            }
            crewai_event_bus.reset_runtime_state()  # of the context: a run would add its copies to it, for good
            with scoped_hooks(hooks):
                return kickoff()

        return await self.thread.run(hooked)

    def copy_of(self, crew: Crew, *, streams: bool) -> Crew:
        """Return a copy of a crew for this run."""
        with _COPYING:
            copied = crew.copy()
        if hasattr(copied, "_task_output_handler"):
            copied._task_output_handler = _NoTaskOutputs()  # noqa: SLF001 - see there
        copied.stream = False
        for agent, original in zip(copied.agents, crew.agents, strict=True):
            self._prepare(agent, original, streams=streams)
        if copied.manager_agent is not None:
            self._prepare(copied.manager_agent, crew.manager_agent, streams=streams)
        self._own(copied.manager_llm, streams=streams)
        if isinstance(crew.planning_llm, BaseLLM):  # the copy has one with other clients
            copied.planning_llm = self._own(copy.copy(crew.planning_llm), streams=streams)
        for task, original_task in zip(copied.tasks, crew.tasks, strict=True):
            number = _index(crew.agents, original_task.agent)
            if number is not None:  # CrewAI finds it by its role, which others may share
                task.agent = copied.agents[number]
            if context := _context_of(original_task):  # CrewAI finds these by their texts, which others may share
                task.context = [copied.tasks[_index(crew.tasks, each)] for each in context]
        return copied

    def agent_of(self, agent: Agent, *, streams: bool) -> Agent:
        """Return a copy of an agent for this run."""
        copied = agent.copy()
        self._prepare(copied, agent, streams=streams)
        return copied

    def usage(self) -> ChatUsage:
        """Return what the LLMs of the run have used."""
        usage = ChatUsage()
        for llm in self._llms:
            used = llm.get_token_usage_summary()
            usage.requests += used.successful_requests
            usage.input_tokens += used.prompt_tokens
            usage.output_tokens += used.completion_tokens
        return usage

    def _prepare(self, copied: Any, original: Any, *, streams: bool) -> None:
        self._own(copied.llm, streams=streams)
        for name in _LEFT_OUT:
            setattr(copied, name, getattr(original, name, None))
        if is_bound(copied.llm) and "max_retry_limit" not in original.model_fields_set:
            copied.max_retry_limit = 0  # the upstream retries

    def _own(self, llm: Any, *, streams: bool) -> Any:
        """Make a copied LLM one of this run, and return it; leave anything else as it is."""
        if isinstance(llm, BaseLLM):
            llm._token_usage = dict.fromkeys(llm._token_usage, 0)  # noqa: SLF001 - a copy shares it with its original
            make_clients(llm)
            client, async_client = (getattr(llm, name, None) for name in ("_client", "_async_client"))
            sends_as_it_is = getattr(llm, "interceptor", None) is None  # one may be for blocking clients only
            if client is not None and async_client is not None and sends_as_it_is:
                llm._client = in_loop(client, async_client, self.thread)  # noqa: SLF001
            if streams:
                llm.stream = True
            kind: Any = type(llm)
            object.__setattr__(llm, "__class__", _of_a_run(kind))
            self._llms.append(llm)
        return llm

    def _check_stop(self, _: object) -> None:
        """Raise the exception by which CrewAI stops, unless the run goes on."""
        if self.thread.stopped:
            raise _stopped()

    def _begin_model(self, context: Any) -> None:
        self._check_stop(context)
        progress({"step": "model", "agent": getattr(context.agent, "role", None)})


def _report_tool(context: Any) -> None:
    progress({"step": "tool", "agent": getattr(context.agent, "role", None), "tool": context.tool_name})


@functools.cache
def _of_a_run(kind: Any) -> Any:
    """Return a class of LLMs that stop as CrewAI does, and whose streamed text is progress."""

    def call(self: Any, *args: Any, **how: Any) -> Any:
        try:
            return kind.call(self, *args, **how)
        except asyncio.CancelledError as stop:  # which threads of CrewAI do not pass on to those that wait for them
            raise _stopped() from stop

    def _emit_stream_chunk_event(self: Any, chunk: str, *args: Any, **how: Any) -> None:
        if chunk and how.get("tool_call") is None:
            progress({"text": chunk})
        kind._emit_stream_chunk_event(self, chunk, *args, **how)  # noqa: SLF001 - listeners get chunks in no order

    call._crewai_rate_limit_wrapped = True  # type: ignore[attr-defined]  # noqa: SLF001 - as that of its base is
    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "call": call}
    return type(kind)(kind.__name__, (kind,), {**members, "_emit_stream_chunk_event": _emit_stream_chunk_event})


def _stopped() -> HookAborted:
    """Return the exception by which CrewAI stops."""
    return HookAborted("the task has ended or was cancelled", "forebay")


class _NoTaskOutputs(TaskOutputStorageHandler):  # type: ignore[misc]  # without its package it has no type
    """Keeps no outputs of a run. CrewAI writes those of the last crew of the machine to a file, locked by polling."""

    def __init__(self) -> None: ...

    def update(self, task_index: int, log: Any) -> None:
        """Store nothing."""

    def reset(self) -> None:
        """Clear nothing."""

    def load(self) -> None:
        """Return None, since nothing is stored."""


class _CurrentTask:
    """The asyncio task that makes it, which can be cancelled from other threads."""

    def __init__(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()

    def cancel(self) -> None:
        """Cancel the task."""
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
