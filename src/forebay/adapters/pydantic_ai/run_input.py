"""The input of a run: messages as pydantic-ai has them, and the deps.

A payload may mix two forms of messages: OpenAI's, with a ``role``, and pydantic-ai's own, with a ``kind``, in which the
messages of a result are. Its own lose nothing: thoughts and their signatures, files, what a provider adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Final, NamedTuple

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic_ai import (
    BinaryContent,
    ImageUrl,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_core import to_json

from forebay.adapters.chat import chat_input
from forebay.errors import UnusableTask
from forebay.task import Task

_EXPECTED: Final = (
    "the input of the agent of worker {worker!r}: a list of messages, each of OpenAI's chat completions (a 'role' of"
    " system, developer, user, assistant or tool; a 'content' of text and images; 'tool_calls'), or from a result"
)


class RunInput(NamedTuple):
    """The input of a run.

    Attributes:
        prompt: the content of a payload that is one message of a user; None for any other.
        history: the messages of any other; the run goes on from the last one.
        lacks_system_prompt: whether pydantic-ai would not send that of the agent: it does so in a new conversation.
        deps: an instance of the type that the agent has for them, or a dict; None if the payload has no context.
    """

    prompt: Any
    history: list[Any] | None
    lacks_system_prompt: bool
    deps: Any


class InputReader:
    """Reads payloads for one agent.

    Args:
        deps_type: the type of its deps.
    """

    def __init__(self, deps_type: Any) -> None:
        self._deps_type = deps_type
        self._deps = _adapter_of(deps_type)

    def read(self, task: Task, worker: str) -> RunInput:
        """Return the input of a run.

        Raises:
            UnusableTask: the payload, a message or the context cannot be used.
        """
        given = chat_input(task, worker)
        messages, deps = list(_read_messages(given.messages, worker)), self._read_deps(given.context)
        match messages:
            case [ModelRequest(parts=[UserPromptPart(content=content)])]:
                return RunInput(content, None, lacks_system_prompt=False, deps=deps)
        return RunInput(None, messages, lacks_system_prompt=not any(map(_has_system_prompt, messages)), deps=deps)

    def _read_deps(self, context: dict[str, Any] | None) -> Any:
        if context is None or self._deps_type is NoneType:
            return context
        name = getattr(self._deps_type, "__name__", str(self._deps_type))
        if self._deps is None:
            expected = f"without 'context': a {name} cannot be made of it, give it by config={{'deps': ...}}"
            raise UnusableTask(field="payload", value="dict with 'context'", expected=expected)
        try:
            return self._deps.validate_python(context)
        except ValidationError as error:
            where = ".".join(str(step) for step in error.errors()[0]["loc"]) or "value"
            value = f"dict whose 'context' has an unusable {where!r}"
            raise UnusableTask(field="payload", value=value, expected=f"with the fields of a {name}") from None


def _read_messages(messages: Sequence[Mapping[str, Any]], worker: str) -> Iterator[Any]:
    tools: dict[str, str] = {}  # their names, by the id of a call
    for number, message in enumerate(messages):
        try:
            yield _read_own(message) if "kind" in message else _READERS[message["role"]](message, tools)
        except (TypeError, LookupError, ValueError, AttributeError):
            value, expected = f"a list whose item {number} cannot be read", _EXPECTED.format(worker=worker)
            raise UnusableTask(field="payload", value=value, expected=expected) from None  # its cause shows contents


def plain_messages(messages: Sequence[Any]) -> Any:
    """Return pydantic-ai's messages as plain data."""
    return ModelMessagesTypeAdapter.dump_python(list(messages), mode="json")


def _adapter_of(deps_type: Any) -> Any:
    """Return what makes deps of a context; None if nothing can."""
    try:
        return TypeAdapter(deps_type)
    except PydanticSchemaGenerationError:
        return None


def _has_system_prompt(message: Any) -> bool:
    return any(isinstance(part, SystemPromptPart) for part in message.parts)


def _read_own(message: Mapping[str, Any]) -> Any:
    return ModelMessagesTypeAdapter.validate_json(to_json([message]))[0]  # in JSON bytes are base64


def _read_system(message: Mapping[str, Any], _: dict[str, str]) -> Any:
    return ModelRequest([SystemPromptPart(_text(message["content"]))])


def _read_user(message: Mapping[str, Any], _: dict[str, str]) -> Any:
    content = message["content"]
    return ModelRequest([UserPromptPart(content if isinstance(content, str) else [_part(each) for each in content])])


def _read_assistant(message: Mapping[str, Any], tools: dict[str, str]) -> Any:
    content = message.get("content")
    parts: list[Any] = [TextPart(_text(content))] if content else []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        tools[call["id"]] = function["name"]
        parts.append(ToolCallPart(function["name"], function["arguments"], call["id"]))
    return ModelResponse(parts)


def _read_tool(message: Mapping[str, Any], tools: dict[str, str]) -> Any:
    call = message["tool_call_id"]
    return ModelRequest([ToolReturnPart(tools[call], _text(message["content"]), call)])


_READERS: Final = {
    "system": _read_system,
    "developer": _read_system,
    "user": _read_user,
    "assistant": _read_assistant,
    "tool": _read_tool,
}


def _text(content: Any) -> str:
    """Return the text of a content, which is text or parts."""
    return content if isinstance(content, str) else "".join(each["text"] for each in content)


def _part(part: Mapping[str, Any]) -> Any:
    if part["type"] == "text":
        return part["text"]
    if part["type"] != "image_url":
        raise LookupError
    url: str = part["image_url"]["url"]
    return BinaryContent.from_data_uri(url) if url.startswith("data:") else ImageUrl(url)
