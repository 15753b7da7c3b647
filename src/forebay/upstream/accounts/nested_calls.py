"""Calls made while their own caller holds a permit: in a guarded function, or in the block of a call by hand."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar
from typing import Final

from forebay.upstream.call_request import Permit

_NONE: Final[tuple[tuple[Permit, object], ...]] = ()

# Each with the asyncio task, or the thread, that holds it: others that copied the context do not keep it from ending.
_held: ContextVar[tuple[tuple[Permit, object], ...]] = ContextVar("forebay_held_permits", default=_NONE)


def begin_hold(permit: Permit) -> None:
    """Note that the code that runs now holds a permit, until `end_hold`."""
    _held.set((*_held.get(), (permit, _owner())))


def end_hold(permit: Permit) -> None:
    """Note that the code that runs now does not hold a permit any more."""
    _held.set(tuple(pair for pair in _held.get() if pair[0] is not permit))


def find_holder(account: object) -> Permit | None:
    """Return a permit of `account` that is held by the code that runs now, and so while it waits; None if none is."""
    held = _held.get()
    if not held:
        return None
    owner = _owner()
    return next(
        (permit for permit, by in held if permit.account is account and by == owner and not permit.closed), None
    )


def _owner() -> object:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs here
        task = None
    return threading.get_ident() if task is None else task
