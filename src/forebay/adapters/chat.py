"""The payloads and results that the adapters of chat agents share, so that a task can go to any of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from forebay.adapters.handler import Config, Handler
from forebay.errors import InvalidSetting, UnusableTask
from forebay.task import Task

_KEYS: Final = ("messages", "context")
_EXPECTED: Final = (
    "the input of the agent of worker {worker!r}: text, a list of messages, each a dict such as {{'role': 'user',"
    " 'content': '...'}}, or a dict with such 'messages' and a 'context', a dict of variables"
)


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


def chat_handler(
    run: Callable[[ChatInput, dict[str, Any]], Awaitable[Any]],
    *,
    worker: str,
    config: Config | None,
    options: frozenset[str],
    read: Callable[[Task, str], ChatInput] = chat_input,
) -> Handler:
    """Return the handler of a chat agent, which checks payloads at submission and makes the options of each run.

    Args:
        run: runs the agent once, with the input and the options of a task.
        worker: the worker's name, for messages.
        config: options of its runs, or a callable that makes them for a task.
        options: the names that they may have.
        read: returns what the payload of a task asks for, or raises UnusableTask; takes the task and the worker's name.

    Raises:
        InvalidSetting: `config` has another name.
    """
    if isinstance(config, Mapping):
        _check_options(config, worker, options)

    async def call(task: Task) -> Any:
        made = config(task) if callable(config) else config or {}
        if callable(config):
            _check_options(made, worker, options)
        return await run(read(task, worker), dict(made))

    def check(task: Task) -> None:
        read(task, worker)

    return Handler(call=call, check=check)


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
    names = ", ".join(sorted(allowed))
    if not isinstance(options, Mapping):
        expected = f"a mapping, or a plain callable that returns one, with any of: {names}"
        raise InvalidSetting(owner=f"worker {worker!r}", name="config", value=type(options).__name__, expected=expected)
    for name in options:
        if name not in allowed:
            expected = f"left out: the run of its agent takes {names}"
            raise InvalidSetting(
                owner=f"the config of worker {worker!r}", name=str(name), value="...", expected=expected
            )
