"""Tests in virtual time: minutes pass in milliseconds, and a deadlock is an error."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, overload

from forebay.simulation import simulate

P = ParamSpec("P")
T = TypeVar("T")


@overload
def virtual(test: Callable[P, Coroutine[Any, Any, T]], /) -> Callable[P, T]: ...


@overload
def virtual(*, seed: int = 0, **settings: Any) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, T]]: ...


def virtual(test: Callable[..., Coroutine[Any, Any, Any]] | None = None, /, *, seed: int = 0, **settings: Any) -> Any:
    """Make a plain function of an async one, which runs it in virtual time to a clean end.

    For any test framework, and for none; with arguments, ``@virtual(seed=3)``, they are those of
    `forebay.simulation.simulate`. What that raises, a call raises.
    """
    if test is None:
        return functools.partial(virtual, seed=seed, **settings)

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        return simulate(lambda: test(*args, **kwargs), seed=seed, **settings)

    return run


def now() -> float:
    """Seconds on the running loop's clock: in virtual time, since the test began."""
    return asyncio.get_running_loop().time()


async def run_ready(iterations: int = 10) -> None:
    """Let everything that is ready happen, for so many turns of the loop; no time passes."""
    for _ in range(iterations):
        await asyncio.sleep(0)
