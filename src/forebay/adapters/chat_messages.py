"""Messages of OpenAI's chat API, checked before a task that has them is admitted: an agent fails on any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from forebay.adapters.chat import ChatInput, chat_input
from forebay.errors import UnusableTask
from forebay.task import Task

ROLES: Final = ("user", "assistant", "tool", "system", "developer")


def checked_input(task: Task, worker: str) -> ChatInput:
    """Return what a payload asks for: see `chat_input`, and `check_messages`.

    Raises:
        UnusableTask: it is something else.
    """
    given = chat_input(task, worker)
    check_messages(given.messages, worker)
    return given


def check_messages(messages: Sequence[Mapping[str, Any]], worker: str) -> None:
    """Check that messages are such as the chat API takes.

    Raises:
        UnusableTask: one is not.
    """
    for number, message in enumerate(messages):
        fault = _fault(message)
        if fault is not None:
            expected = (
                f"the input of the agent of worker {worker!r}: a list of messages as OpenAI's chat API takes them"
            )
            raise UnusableTask(
                field="payload", value=f"a list whose item {number} has {fault}", expected=expected
            ) from None


def _fault(message: Mapping[str, Any]) -> str | None:  # noqa: PLR0911 - one for each
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or role not in ROLES:
        return f"no role of {', '.join(ROLES)}"
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        return "no 'tool_call_id'"
    if not isinstance(message.get("name"), str | None):
        return "a 'name' that is not text"
    if calls is not None and not (isinstance(calls, list | tuple) and all(map(_is_call, calls))):
        return "'tool_calls' that are not calls, each with an 'id' and a 'function' with 'name' and 'arguments'"
    if content is None and role == "assistant":
        return None
    if isinstance(content, str):
        return None if _is_sendable(content) else "a 'content' that is not Unicode text"
    if isinstance(content, list | tuple) and all(map(_is_part, content)):
        return None
    return "a 'content' that is neither text nor a list of parts, each with a 'type'"


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return False
    return all(isinstance(each, str) for each in (call.get("id"), function.get("name"), function.get("arguments")))


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return False
    return part["type"] != "text" or (isinstance(part.get("text"), str) and _is_sendable(part["text"]))


def _is_sendable(text: str) -> bool:
    """Return whether a text can be sent: half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
