"""Messages: between those of OpenAI's API, which payloads and results have, and AutoGen's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from autogen_agentchat.messages import (
    BaseChatMessage,
    HandoffMessage,
    MultiModalMessage,
    StructuredMessage,
    TextMessage,
    ToolCallExecutionEvent,
    ToolCallRequestEvent,
)
from autogen_core import FunctionCall, Image
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    SystemMessage,
    UserMessage,
)
from pydantic_core import to_jsonable_python

_ROLES: Final = ("user", "assistant", "tool", "system", "developer")


def fault_of(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what is wrong with messages of a payload; None if AutoGen can read them."""
    for number, message in enumerate(messages):
        if message.get("role") not in _ROLES:
            return f"a list whose item {number} has no role of {', '.join(_ROLES)}"
        try:
            _content(message)
            _calls(message)
        except (KeyError, OSError, TypeError, ValueError):
            return f"a list whose item {number} has content that is not text, or text and images as data: URLs"
    return None


def split(messages: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the messages that have been answered, and those of the user after them."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "user":
        end -= 1
    return messages[:end], messages[end:]


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return messages as those that agents exchange. Calls of tools and their results are not among them."""
    return [_chat_message(message) for message in messages if _is_said(message)]


def _is_said(message: Mapping[str, Any]) -> bool:
    return bool(message.get("content")) if message["role"] == "assistant" else message["role"] != "tool"


def _chat_message(message: Mapping[str, Any]) -> Any:
    content, source = _content(message), _source(message)
    if isinstance(content, str):
        return TextMessage(content=content, source=source)
    return MultiModalMessage(content=content, source=source)


def model_messages(messages: Sequence[Mapping[str, Any]], agent: str | None) -> list[Any]:
    """Return messages as an agent has them in its model context.

    Args:
        messages: of a conversation.
        agent: its name in a team, where the messages of others are input for it; None: all answers are its own.
    """
    made: list[Any] = []
    names: dict[str, str] = {}  # of the tools that it has called, by the id of the call
    for message in messages:
        role, content = message["role"], _content(message)
        if role in ("system", "developer"):
            made.append(SystemMessage(content=_text(content)))
        elif role == "tool":
            if (call := message.get("tool_call_id")) in names:
                result = FunctionExecutionResult(content=_text(content), name=names[call], call_id=call, is_error=False)
                made.append(FunctionExecutionResultMessage(content=[result]))
        elif role == "assistant" and agent in (None, message.get("name")):
            calls = _calls(message)
            names |= {call.id: call.name for call in calls}
            if calls or content:
                made.append(AssistantMessage(content=calls or _text(content), source=agent or "assistant"))
        elif content:
            made.append(UserMessage(content=content, source=_source(message)))
    return made


def _source(message: Mapping[str, Any]) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", str(message.get("name") or message["role"]))  # AutoGen takes no other name


def _content(message: Mapping[str, Any]) -> str | list[Any]:
    """Return the content of a message, as text or as a list of texts and images.

    Raises:
        KeyError, OSError, TypeError, ValueError: it is something else.
    """
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError
    parts = [Image.from_uri(part["image_url"]["url"]) if "image_url" in part else part["text"] for part in content]
    if not all(isinstance(part, str | Image) for part in parts):
        raise TypeError
    return "\n".join(parts) if all(isinstance(part, str) for part in parts) else parts


def _text(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "\n".join(part for part in content if isinstance(part, str))


def _calls(message: Mapping[str, Any]) -> list[Any]:
    """Return the calls of tools in a message.

    Raises:
        KeyError, TypeError: they are something else.
    """
    calls = [
        FunctionCall(id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    ]
    if not all(isinstance(part, str) for call in calls for part in (call.id, call.name, call.arguments)):
        raise TypeError
    return calls


class Conversation:
    """The messages of a run, as OpenAI's API takes them.

    Args:
        given: the messages of the payload.
        names: whether messages have the names of their agents, as those of a team.
    """

    def __init__(self, given: list[Any], *, names: bool) -> None:
        self.messages: list[Any] = list(given)
        self.last: Any = None
        self._names = names
        self._calls: dict[str, Any] = {}  # whose results are not known yet, by id

    def add(self, message: Any) -> None:
        """Add a message of AutoGen; what a conversation does not have is left out."""
        if isinstance(message, ToolCallRequestEvent):
            self._calls |= {call.id: call for call in message.content}
        elif isinstance(message, ToolCallExecutionEvent):
            self._add_calls(message)
        elif isinstance(message, BaseChatMessage):
            self.last = message
            content = _openai_content(message)
            self.messages.append({"role": "assistant", "content": content} | self._name(message))

    def _add_calls(self, event: Any) -> None:
        """Add the calls and their results in one place: between them, others may have spoken."""
        calls = [call for result in event.content if (call := self._calls.pop(result.call_id, None)) is not None]
        if not calls:
            return
        made = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
        self.messages.append({"role": "assistant", "content": None, "tool_calls": made} | self._name(event))
        ids = {call.id for call in calls}
        self.messages.extend(
            {"role": "tool", "tool_call_id": result.call_id, "content": result.content}
            for result in event.content
            if result.call_id in ids
        )

    def _name(self, message: Any) -> dict[str, str]:
        return {"name": message.source} if self._names else {}


def _openai_content(message: Any) -> Any:
    if isinstance(message, MultiModalMessage):
        return [
            {"type": "text", "text": part} if isinstance(part, str) else to_jsonable_python(part.to_openai_format())
            for part in message.content
        ]
    return message.to_model_text()


def output_of(message: Any) -> Any:
    """Return the content of the last message of a run as plain data: text, or that of a structured one."""
    if isinstance(message, StructuredMessage):
        return to_jsonable_python(message.content)
    return None if message is None else message.to_model_text()


def steps_of(message: Any) -> list[dict[str, Any]]:
    """Return what a message of AutoGen reports as progress."""
    steps: list[dict[str, Any]] = []
    if message.models_usage is not None:
        steps.append({"step": "model", "agent": message.source})
    if isinstance(message, ToolCallExecutionEvent):
        steps.extend({"step": "tool", "agent": message.source, "tool": result.name} for result in message.content)
    if isinstance(message, HandoffMessage):
        steps.append({"step": "handoff", "agent": message.source, "to": message.target})
    return steps
