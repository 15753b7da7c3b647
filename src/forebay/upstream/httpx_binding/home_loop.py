"""The event loop in which bound async clients send for an agent's thread that makes loops of its own.

The connections of an async client belong to the loop that opened them. A thread that calls ``asyncio.run`` for each run
would use those of a loop that is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any, Final

#: None: a client sends in the loop that calls it.
HOME_LOOP: Final[ContextVar[asyncio.AbstractEventLoop | None]] = ContextVar("forebay_home_loop", default=None)


def other_loop() -> asyncio.AbstractEventLoop | None:
    """Return the loop to send in, if it is not the running one."""
    home = HOME_LOOP.get()
    return None if home is None or home is asyncio.get_running_loop() else home


async def await_in(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the value of a coroutine that runs in another loop, where a cancellation here cancels it."""
    try:
        sent = asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:  # the loop is closed
        coroutine.close()
        raise
    return await asyncio.wrap_future(sent)
