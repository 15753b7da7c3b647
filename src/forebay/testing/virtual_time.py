"""Tests in virtual time without pytest: minutes pass in milliseconds, and a deadlock is an error."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, overload

from forebay.simulation.loop import simulate

P = ParamSpec("P")
T = TypeVar("T")


@overload
def virtual(test: Callable[P, Coroutine[Any, Any, T]], /) -> Callable[P, T]: ...


@overload
def virtual(*, seed: int = 0, **settings: Any) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, T]]: ...


def virtual(test: Callable[..., Coroutine[Any, Any, Any]] | None = None, /, *, seed: int = 0, **settings: Any) -> Any:
    """Turn an async function into a plain one that runs it in virtual time, for any test framework.

    With arguments, as in ``@virtual(seed=3)``, they are those of `forebay.simulation.simulate`. A call raises what
    `simulate` raises.
    """
    if test is None:
        return functools.partial(virtual, seed=seed, **settings)

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        return simulate(lambda: test(*args, **kwargs), seed=seed, **settings)

    return run


def now() -> float:
    """Return the time of the running loop, in seconds: in virtual time, since the test began."""
    return asyncio.get_running_loop().time()


async def run_ready(iterations: int = 10) -> None:
    """Run all ready callbacks, for that many iterations of the event loop; no time passes."""
    for _ in range(iterations):
        await asyncio.sleep(0)
