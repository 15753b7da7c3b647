"""The payloads and results that the adapters of chat agents share, so that a task can go to any of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from forebay.adapters.handler import Config, Handler
from forebay.adapters.run_tasks import RunTasks
from forebay.errors import ForebayError, InvalidSetting, Overloaded, UnusableTask
from forebay.task import Task

_KEYS: Final = ("messages", "context")
_EXPECTED: Final = (
    "the input of the agent of worker {worker!r}: text, a list of messages, each a dict such as {{'role': 'user',"
    " 'content': '...'}}, or a dict with such 'messages' and a 'context', a dict of variables"
)


_CHAIN: Final = 16  # exceptions that are looked at


class ApprovalNeeded(ForebayError, RuntimeError):
    """The agent of worker {worker!r} waits for an approval of {tool!r}: run it in a function that gives approvals."""


class ChatInput(NamedTuple):
    """The input of one run.

    Attributes:
        messages: of the conversation, each a mapping as OpenAI's API takes it.
        context: variables of the run, by name; None if the payload has none.
    """

    messages: list[Any]
    context: dict[str, Any] | None


def chat_input(task: Task, worker: str, expected: str = _EXPECTED) -> ChatInput:
    """Return what a payload asks for: text, a list of messages, or a mapping of both and variables.

    Args:
        task: whose payload it is.
        worker: the worker's name, for messages.
        expected: what may be given, for messages.

    Raises:
        UnusableTask: it is something else.
    """
    unusable = partial(_unusable, worker, expected)
    payload, context = task.payload, None
    if isinstance(payload, Mapping):
        unknown = [key for key in payload if key not in _KEYS]
        if unknown or "messages" not in payload:
            raise unusable(f"dict with {_listed(unknown)}" if unknown else "dict without 'messages'")
        context = payload.get("context")
        if context is not None and not isinstance(context, Mapping):
            raise unusable(f"dict whose 'context' is a {type(context).__name__}")
        payload = payload["messages"]
    if isinstance(payload, str):
        payload = [{"role": "user", "content": payload}]
    if not isinstance(payload, list | tuple) or not payload:
        raise unusable(type(payload).__name__ if payload or payload is None else "no message")
    for number, message in enumerate(payload):
        if not isinstance(message, Mapping):
            raise unusable(f"a list whose item {number} is a {type(message).__name__}")
    return ChatInput([dict(message) for message in payload], None if context is None else dict(context))


def chat_handler(  # noqa: PLR0913 - what an adapter says
    run: Callable[[Any, dict[str, Any]], Awaitable[Any]],
    *,
    worker: str,
    config: Config | None,
    options: frozenset[str],
    parse: Callable[[Task, str], Any] = chat_input,
    single_use: bool = False,
    modules: tuple[str, ...] = (),
) -> Handler:
    """Return the handler of a chat agent, which checks payloads at submission and makes the options of each run.

    An Overloaded that `run` raises inside an exception of its framework is raised itself.

    Args:
        run: runs the agent once, with the input and the options of a task.
        worker: the worker's name, for messages.
        config: options of its runs, or a callable that makes them for a task.
        options: the names that they may have.
        parse: returns the input of a task for the agent of a worker, or raises UnusableTask.
        single_use: as of Handler.
        modules: as of RunTasks, of a framework that makes asyncio tasks; () for another.

    Raises:
        InvalidSetting: `config` has another name.
    """
    if isinstance(config, Mapping):
        _check_options(config, worker, options)

    async def call(task: Task) -> Any:
        made = config(task) if callable(config) else config or {}
        if callable(config):
            _check_options(made, worker, options)
        given = parse(task, worker)
        try:
            if not modules:
                return await run(given, dict(made))
            async with RunTasks(modules):
                return await run(given, dict(made))
        except Exception as error:
            overloaded = _overloaded_behind(error)
            if overloaded is None:
                raise
        raise overloaded

    def check(task: Task) -> None:
        parse(task, worker)

    return Handler(call=call, check=check, single_use=single_use)


def _overloaded_behind(error: BaseException) -> Overloaded | None:
    """Return the Overloaded that an exception was raised from; None if it is one itself."""
    cause = error.__cause__
    for _ in range(_CHAIN):
        if cause is None or isinstance(error, Overloaded):
            return None
        if isinstance(cause, Overloaded):
            return cause
        cause = cause.__cause__
    return None


def _unusable(worker: str, expected: str, value: str) -> UnusableTask:
    return UnusableTask(field="payload", value=value, expected=expected.format(worker=worker))


def _listed(keys: list[Any]) -> str:
    return ", ".join(repr(key) if isinstance(key, str) else type(key).__name__ for key in keys[:3])


@dataclass(slots=True)
class ChatUsage:
    """The calls of one run, and the tokens that the provider reported for them.

    Attributes:
        requests: calls that were answered.
        input_tokens: of their requests.
        output_tokens: of their answers.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return it as plain data."""
        return {
            "requests": self.requests,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
        }


def _check_options(options: Any, worker: str, allowed: frozenset[str]) -> None:
    names = ", ".join(sorted(allowed)) or "none"
    if not isinstance(options, Mapping):
        expected = f"a mapping, or a plain callable that returns one, with any of: {names}"
        raise InvalidSetting(owner=f"worker {worker!r}", name="config", value=type(options).__name__, expected=expected)
    for name in options:
        if name not in allowed:
            expected = f"left out: the run of its agent takes {names}"
            raise InvalidSetting(
                owner=f"the config of worker {worker!r}", name=str(name), value="...", expected=expected
            )
