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


def chat_handler(
    run: Callable[[ChatInput, dict[str, Any]], Awaitable[Any]],
    *,
    worker: str,
    config: Config | None,
    options: frozenset[str],
) -> Handler:
    """Return the handler of a chat agent, which checks payloads at submission and makes the options of each run.

    Args:
        run: runs the agent once, with the input and the options of a task.
        worker: the worker's name, for messages.
        config: options of its runs, or a callable that makes them for a task.
        options: the names that they may have.

    Raises:
        InvalidSetting: `config` has another name.
    """
    if isinstance(config, Mapping):
        _check_options(config, worker, options)

    async def call(task: Task) -> Any:
        made = config(task) if callable(config) else config or {}
        if callable(config):
            _check_options(made, worker, options)
        return await run(chat_input(task, worker), dict(made))

    return Handler(call=call, check=partial(_check_input, worker))


def chat_input(task: Task, worker: str) -> ChatInput:
    """Return what a payload asks for: text, a list of messages, or a mapping of both and variables.

    Raises:
        UnusableTask: it is something else.
    """
    payload, context = task.payload, None
    if isinstance(payload, Mapping):
        unknown = [key for key in payload if key not in _KEYS]
        if unknown or "messages" not in payload:
            raise _unusable(worker, f"dict with {_listed(unknown)}" if unknown else "dict without 'messages'")
        context = payload.get("context")
        if context is not None and not isinstance(context, Mapping):
            raise _unusable(worker, f"dict whose 'context' is a {type(context).__name__}")
        payload = payload["messages"]
    if isinstance(payload, str):
        payload = [{"role": "user", "content": payload}]
    if not isinstance(payload, list | tuple) or not payload:
        raise _unusable(worker, type(payload).__name__ if payload or payload is None else "no message")
    for number, message in enumerate(payload):
        if not isinstance(message, Mapping):
            raise _unusable(worker, f"a list whose item {number} is a {type(message).__name__}")
    return ChatInput([dict(message) for message in payload], None if context is None else dict(context))


def _check_input(worker: str, task: Task) -> None:
    chat_input(task, worker)


def _unusable(worker: str, value: str) -> UnusableTask:
    return UnusableTask(field="payload", value=value, expected=_EXPECTED.format(worker=worker))


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
