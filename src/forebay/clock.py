"""Loop time, wall time, chance and identity: the one door by which they enter.

Loop time (``loop.time()``, monotonic seconds) measures; wall time (epoch seconds) is for what travels or is stored.
Under a virtual-time loop both are virtual, so nothing else may ask the machine.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Callable

_running_loop = asyncio._get_running_loop  # noqa: SLF001 - public by `__all__`; raises nothing where there is none


def wall_time() -> float:
    """Epoch seconds: of the running event loop if it keeps its own (a virtual one), else of the machine."""
    loop = _running_loop()
    if loop is None:
        return time.time()
    virtual = getattr(loop, "wall_time", None)
    return time.time() if virtual is None else float(virtual())


def is_virtual(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether `loop` keeps virtual time, so that no thread may watch it by real time."""
    return bool(getattr(loop, "virtual", False))


def monotonic() -> float:
    """Monotonic seconds of the machine, for threads that watch a loop from outside."""
    return time.monotonic()


def now() -> float:
    """Monotonic seconds: of the running event loop if it keeps time of its own (a virtual one), else of the machine.

    So a thing that is shared by several loops and plain threads has one clock for all.
    """
    loop = _running_loop()
    if loop is None:
        return time.monotonic()
    return loop.time() if getattr(loop, "virtual", False) else time.monotonic()  # `is_virtual`, and asked all the time


def new_random(seed: int | None = None) -> random.Random:
    """A source of draws: seeded if asked, else from the operating system."""
    return random.Random(seed)  # noqa: S311 - jitter, not secrets


_random = new_random()
os.register_at_fork(after_in_child=_random.seed)  # a forked worker must not draw what its parent draws


def draw() -> float:
    """A draw from [0, 1): of the running event loop if that has chance of its own (a virtual one), from its seed."""
    loop = _running_loop()
    if loop is None:
        return _random.random()
    return draw_function(loop)() if is_virtual(loop) else _random.random()


def draw_function(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """Draws from [0, 1) for what runs on `loop`: a virtual one has chance of its own, drawn from its seed."""
    source = loop.random if is_virtual(loop) else new_random()  # type: ignore[attr-defined]
    draw: Callable[[], float] = source.random
    return draw


class _IdGenerator:
    """Process-unique identifiers: a random prefix and a counter, a tenth of the price of a uuid4."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._prefix = os.urandom(8).hex()
        self._next = itertools.count().__next__

    def new(self) -> str:
        return f"{self._prefix}-{self._next():x}"


_ids = _IdGenerator()
new_id = _ids.new
os.register_at_fork(after_in_child=_ids.reset)  # a forked worker must not repeat its parent's ids
