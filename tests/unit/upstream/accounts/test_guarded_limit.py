"""A limit of the user's own that fails: it costs no permit, and its last limit holds."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import pytest
from tests.support.task_plane import virtual

from forebay import Upstream
from forebay.interfaces import Outcome
from forebay.limit import FixedLimit, Grant, Limit
from forebay.upstream.accounts.guarded_limit import GuardedLimit, guarded_limit
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore

METHODS = [
    *("observe", "limit", "reopens_at", "grant", "accepted", "learned_level", "highest_level", "adopt"),
    *("returns_to", "answers", "add_answers"),
]


class OwnLimit(Limit):
    """A limit of three that can be told to fail."""

    def __init__(self) -> None:
        super().__init__(initial_limit=3)
        self.observed = 0

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        assert (now, outcome, slowdown) is not None
        assert isinstance(grant, Grant)
        self.observed += 1


def failing(method: str, error: BaseException) -> OwnLimit:
    """Return a limit whose `method` raises `error`."""

    def fails(*_: Any, **__: Any) -> NoReturn:
        raise error

    limit = OwnLimit()
    setattr(limit, method, fails)
    return limit


@pytest.mark.parametrize("error", [ValueError(), SystemExit(1), GeneratorExit(), RecursionError()], ids=repr)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_shared", [False, True])
@virtual
async def test_a_limit_that_raises_costs_no_permit(method: str, error: BaseException, *, is_shared: bool) -> None:
    store = MemoryLedgerStore() if is_shared else None
    upstream = Upstream("api", limit=failing(method, error), shared=store)
    for _ in range(3):
        async with upstream.call():
            pass
        with pytest.raises(ConnectionError):
            async with upstream.call():
                raise ConnectionError
    (account,) = upstream.statistics().accounts
    assert (account.in_flight, account.queued) == (0, 0)


@pytest.mark.parametrize("wrong", [None, "3", float("nan"), float("inf"), -1])
def test_a_limit_that_is_no_number_of_calls_is_the_one_before(wrong: Any) -> None:
    own = OwnLimit()
    guarded = GuardedLimit(own)
    assert guarded.limit(0.0) == 3
    own.limit = lambda now: wrong  # type: ignore[method-assign]  # noqa: ARG005 - the interface's
    assert guarded.limit(1.0) == 3


def test_every_method_of_a_limit_is_passed_on() -> None:
    public = {name for name, _ in inspect.getmembers(Limit, inspect.isfunction) if not name.startswith("_")}
    assert public == set(METHODS)
    assert public <= set(vars(GuardedLimit))


def test_the_limits_of_this_package_need_no_guard() -> None:
    limit = FixedLimit(3)
    assert guarded_limit(limit) is limit
    assert isinstance(guarded_limit(OwnLimit()), GuardedLimit)


def test_a_limit_of_zero_that_does_not_say_when_it_rises_is_asked_again() -> None:
    own = OwnLimit()
    own.limit = lambda now: 0  # type: ignore[method-assign]  # noqa: ARG005 - the interface's
    guarded = GuardedLimit(own)
    assert guarded.limit(5.0) == 0
    assert guarded.reopens_at(5.0) == 6.0
