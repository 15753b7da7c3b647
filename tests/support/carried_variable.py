"""A module as a user would write it: a context variable that is carried, and a handler that reads it."""

from __future__ import annotations

from contextvars import ContextVar

from forebay import Task, carry

account: ContextVar[str] = ContextVar("account", default="nobody's")
carry(account)


def read(_: Task) -> str:
    """Return the account of the submitter."""
    return account.get()
