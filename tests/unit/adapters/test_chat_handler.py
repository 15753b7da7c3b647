"""The handler of a chat agent: what its adapters share."""

from __future__ import annotations

from typing import Any

import pytest

from forebay import Task
from forebay.adapters.chat import ChatInput, chat_handler
from forebay.adapters.factory import handler_from_factory
from forebay.adapters.handler import Handler
from forebay.errors import Overloaded, UnusableTask


def handler_that_raises(error: BaseException, cause: BaseException | None) -> Handler:
    async def run(given: ChatInput, options: dict[str, Any]) -> None:  # noqa: ARG001
        raise error from cause

    return chat_handler(run, worker="agent", config=None, options=frozenset())


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


async def test_an_overloaded_behind_an_exception_of_a_framework_is_raised() -> None:
    overloaded = Overloaded("requests per day", limited_by="key", load=1.0, retry_after=7.0)
    for cause in (overloaded, raised_from(ValueError("client"), overloaded)):
        with pytest.raises(Overloaded) as raised:
            await handler_that_raises(RuntimeError("agent"), cause).call(Task("ask", "Which river?"))
        assert raised.value is overloaded


@pytest.mark.parametrize("cause", [None, ValueError("client")])
async def test_any_other_exception_is_raised_as_it_is(cause: BaseException | None) -> None:
    error = RuntimeError("agent")
    with pytest.raises(RuntimeError) as raised:
        await handler_that_raises(error, cause).call(Task("ask", "Which river?"))
    assert raised.value is error
    assert error.__cause__ is cause


async def test_exceptions_that_cause_each_other_are_no_overloaded() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    with pytest.raises(RuntimeError, match="first"):
        await handler_that_raises(first, second).call(Task("ask", "Which river?"))


def test_the_agents_of_a_factory_check_the_payloads() -> None:
    handler = handler_from_factory(lambda: handler_that_raises(RuntimeError(), None))
    assert handler.check is not None
    handler.check(Task("ask", "Which river?"))
    with pytest.raises(UnusableTask, match="a list of messages"):
        handler.check(Task("ask", 7))
