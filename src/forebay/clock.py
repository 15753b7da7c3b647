"""Loop time, wall time, random numbers and identifiers: the only module that takes them from the machine.

Loop time (``loop.time()``, monotonic seconds) measures; wall time (epoch seconds) is for times that are sent or stored,
since it may be set back or forward at any moment. In an event loop in virtual time both are virtual, so no other module
may ask the machine.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Callable

_running_loop = asyncio._get_running_loop  # noqa: SLF001 - public by `__all__`; returns None where there is no loop


def wall_time() -> float:
    """Return epoch seconds: of the running event loop if it keeps its own (a virtual one), else of the machine."""
    loop = _running_loop()
    if loop is None:
        return time.time()
    virtual = getattr(loop, "wall_time", None)
    return time.time() if virtual is None else float(virtual())


def is_virtual(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether `loop` keeps virtual time, so that no thread may watch it by real time."""
    return bool(getattr(loop, "virtual", False))


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop, if there is one."""
    return _running_loop()


def running_virtual_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop if it keeps virtual time; two calls of `now` compare only under the same one."""
    loop = _running_loop()
    return loop if loop is not None and is_virtual(loop) else None


def monotonic() -> float:
    """Return the machine's monotonic seconds, for threads that watch a loop from outside."""
    return time.monotonic()


def now() -> float:
    """Return monotonic seconds: of the running event loop if it keeps virtual time, else of the machine.

    So an object that is shared by several loops and plain threads has one clock for all of them.
    """
    loop = _running_loop()
    if loop is None:
        return time.monotonic()
    return loop.time() if getattr(loop, "virtual", False) else time.monotonic()  # `is_virtual` inlined: a hot path


def _find_suspension_clocks() -> tuple[int, int] | None:
    """Return the clock that counts while the machine is suspended, and the one that does not; None without both."""
    for counting, standing in (("CLOCK_BOOTTIME", "CLOCK_MONOTONIC"), ("CLOCK_MONOTONIC_RAW", "CLOCK_UPTIME_RAW")):
        if hasattr(time, counting) and hasattr(time, standing):  # the first on Linux, the second on macOS
            return getattr(time, counting), getattr(time, standing)
    return None


_suspension_clocks = _find_suspension_clocks()


def suspension() -> float:
    """Return the seconds for which the machine was suspended since it started, which `now` does not count.

    It is 0 where `now` counts them (Windows). A virtual machine whose own clocks are stopped does not know of it.
    """
    loop = _running_loop()
    if loop is not None and is_virtual(loop):
        return float(getattr(loop, "suspension", 0.0))
    if _suspension_clocks is None:
        return 0.0
    counting, standing = _suspension_clocks
    total = time.clock_gettime(counting)  # first: a thread that is delayed here must not look like a suspension
    return total - time.clock_gettime(standing)


def new_random(seed: int | None = None) -> random.Random:
    """Return a generator of random numbers, seeded with `seed`, or by the operating system."""
    return random.Random(seed)  # noqa: S311 - jitter, not secrets


_random = new_random()
os.register_at_fork(after_in_child=_random.seed)  # a forked worker must not draw the same numbers as its parent


def draw() -> float:
    """Return a random number in [0, 1), from the running event loop's own generator if it is virtual (seeded)."""
    loop = _running_loop()
    if loop is None:
        return _random.random()
    return draw_function(loop)() if is_virtual(loop) else _random.random()


def draw_function(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """Return a function that draws from [0, 1) for code that runs on `loop`; a virtual loop has a seeded generator."""
    generator = loop.random if is_virtual(loop) else new_random()  # type: ignore[attr-defined]
    draw: Callable[[], float] = generator.random
    return draw


def secret_bytes(size: int) -> bytes:
    """Return random bytes that nobody can guess, from the operating system, also in virtual time."""
    return os.urandom(size)


class _IdGenerator:
    """Process-unique identifiers: a random prefix and a counter, at a tenth of the cost of a uuid4.

    The first 16 million sort in the order in which they were made: a simulation is the same, whatever ran before it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._prefix = os.urandom(8).hex() + "-"
        self._next = itertools.count().__next__

    def new(self) -> str:
        return f"{self._prefix}{self._next():06x}"


_ids = _IdGenerator()
new_id = _ids.new
os.register_at_fork(after_in_child=_ids.reset)  # a forked worker must not repeat its parent's ids
