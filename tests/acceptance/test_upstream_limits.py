"""Limits that users give to an upstream: a limit object for one account, or a callable that makes one for each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.task_plane import virtual

from forebay import Quota, Upstream
from forebay.errors import InvalidSetting
from forebay.interfaces import Outcome
from forebay.limit import Grant, Limit, VegasLimit


class RecordingLimit(Limit):
    """A limit of a user: three calls at a time."""

    def __init__(self) -> None:
        super().__init__(initial_limit=3)
        self.outcomes: list[Outcome] = []

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        del now, grant, slowdown
        self.outcomes.append(outcome)


async def peak_of(upstream: Upstream, calls: int, model: str = "") -> int:
    """Make calls together, and return how many were in flight at most."""

    async def call() -> None:
        async with upstream.call(model):
            await asyncio.sleep(1.0)

    await asyncio.gather(*(call() for _ in range(calls)))
    return upstream.core.accounts.account(model).account.peak_in_flight


@virtual
async def test_a_callable_makes_a_limit_for_each_account() -> None:
    made: list[RecordingLimit] = []

    def make() -> RecordingLimit:
        made.append(RecordingLimit())
        return made[-1]

    upstream = Upstream("llm", limit=make, models={"a*": [], "b*": []})
    assert [await peak_of(upstream, 5, model) for model in ("a1", "a2", "b1")] == [3, 3, 3]
    assert [len(limit.outcomes) for limit in made] == [10, 5]


@virtual
async def test_one_limit_object_does_not_serve_a_second_api_key() -> None:
    upstream = Upstream("llm", limit=RecordingLimit())
    assert upstream.statistics().accounts == ()
    upstream.declared().load()  # the load of an account that is not open yet takes nothing
    account = upstream.core.accounts.account("gpt", "key-1")
    assert upstream.core.accounts.account("gpt", "key-1") is account
    with pytest.raises(InvalidSetting, match="a callable, such as VegasLimit: another API key has an account"):
        upstream.core.accounts.account("gpt", "key-2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 5}, "a limit, such as VegasLimit"),
        ({"limit": "vegas"}, "a limit, such as VegasLimit"),
        ({"limit": VegasLimit(), "max_concurrent": 5}, "left out if max_concurrent is given"),
        ({"limit": VegasLimit(), "models": {"a*": [Quota(requests=1, per="minute")]}}, "a callable if models is given"),
    ],
)
def test_a_limit_that_does_not_fit_is_rejected_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=f"'llm' was given limit=.*{message}"):
        Upstream("llm", **settings)


def test_a_callable_that_returns_something_else_is_rejected_at_the_first_call() -> None:
    upstream = Upstream("llm", limit=lambda: 5)  # type: ignore[arg-type,return-value]
    with pytest.raises(InvalidSetting, match="the callable returned something else"), upstream.call():
        pass
