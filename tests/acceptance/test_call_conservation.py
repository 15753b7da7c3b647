"""Conservation: after any calls, every permit is closed, and all that was reserved is settled or released.

Scripts are drawn at random and run in virtual time: calls made with a context manager, through a guarded function, as
the transports make them, and within tasks; results of every kind; callers who cancel at any step. A failure prints the
script.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_plane import now, run_ready
from tests.support.upstream_checks import check_upstream

from forebay import BackpressureSupervisor, Deadline, Overloaded, Priority, Task
from forebay.breaker import BreakerRules, consecutive_faults
from forebay.interfaces import Charge, Outcome, RateLimitHeaders
from forebay.quota import Budget, Price, Quota
from forebay.retry import Retry
from forebay.simulation import simulate, virtual_loop
from forebay.testing import EventRecord
from forebay.upstream import Upstream
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.call_request import AttemptResult, CallOutcome, Permit
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

MODELS = ("small", "large")
PRICE = 1e4  # dollars for a million tokens: a call of 100 costs one
MAX_OVERSPEND = 3  # a call that costs more than was reserved costs three times as much


class Broken(Exception):
    """The error of a failed call."""


# --- scripts ---

ENDS = ("success", "more", "silent", "fault", "final", "rate", "rate at once", "congested", "unsent", "spent", "bug")


@dataclass(frozen=True)
class Call:
    """One call, and when its caller cancels it."""

    at: float
    way: str  # context manager, guarded, driven, streamed
    ends: tuple[str, ...]  # results of its attempts; the next ones succeed
    seconds: float
    model: str
    tokens: int
    priority: Priority
    tenant: str
    deadline: float | None
    leaves: int | None  # steps of the loop after it began
    leaves_after: float | None  # seconds after it began


CALLS = st.builds(
    Call,
    at=st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 5.0]),
    way=st.sampled_from(["context manager", "guarded", "driven", "driven", "streamed"]),
    ends=st.lists(st.sampled_from(ENDS), max_size=3).map(tuple),
    seconds=st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]),
    model=st.sampled_from(MODELS),
    tokens=st.sampled_from([0, 10, 100, 500]),
    priority=st.sampled_from(Priority),
    tenant=st.sampled_from(["acme", "blue"]),
    deadline=st.sampled_from([None, None, 0.001, 0.3, 2.0, 20.0]),
    leaves=st.one_of(st.none(), st.integers(0, 20)),
    leaves_after=st.sampled_from([None, None, 0.0, 0.1, 0.5, 1.0]),
)


@dataclass(frozen=True)
class Script:
    """An upstream and its calls."""

    max_concurrent: int | None
    quotas: tuple[Quota, ...]
    grouped: bool
    budget: float | None
    tenant_budget: float | None
    task_budget: float | None
    max_wait: float
    reset_timeout: float
    down: tuple[float, float]  # from, to: all calls fail
    tasks: tuple[tuple[Call, ...], ...]  # calls within tasks
    calls: tuple[Call, ...]
    seed: int


QUOTAS = st.sampled_from(
    [
        (),
        (),
        (Quota(requests=3, per="second"),),
        (Quota(requests=30, per="minute"), Quota(tokens=1000, per="minute")),
        (Quota(input_tokens=300, per="minute"), Quota(output_tokens=300, per="minute")),
    ]
)
BUDGETS = st.sampled_from([None, None, 2.0, 20.0])
SCRIPTS = st.builds(
    Script,
    max_concurrent=st.sampled_from([None, 1, 1, 2]),
    quotas=QUOTAS,
    grouped=st.booleans(),
    budget=BUDGETS,
    tenant_budget=BUDGETS,
    task_budget=BUDGETS,
    max_wait=st.sampled_from([1.0, 60.0]),
    reset_timeout=st.sampled_from([0.5, 10.0]),
    down=st.sampled_from([(0.0, 0.0), (0.0, 0.7), (0.3, 5.5), (0.0, 30.0)]),
    tasks=st.lists(st.lists(CALLS, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    calls=st.lists(CALLS, max_size=8).map(tuple),
    seed=st.integers(0, 1000),
)


def upstream_of(script: Script) -> Upstream:
    """Return the upstream of a script."""

    def budget(usd: float | None) -> Budget | None:
        return None if usd is None else Budget(usd=usd)

    return Upstream(
        "llm",
        quotas=script.quotas,
        models=dict.fromkeys(MODELS, script.quotas) if script.grouped else None,
        budget=budget(script.budget),
        tenant_budget=budget(script.tenant_budget),
        task_budget=budget(script.task_budget),
        max_concurrent=script.max_concurrent,
        max_wait=script.max_wait,
        retry=Retry(base_delay=0.1, max_total_delay=10.0),
        breaker=BreakerRules(triggers=(consecutive_faults(2),), reset_timeout=script.reset_timeout, probe_timeout=2.0),
        prices={model: Price(input=PRICE, output=PRICE) for model in MODELS},
    )


class Calls:
    """Makes the calls of scripts."""

    def __init__(self, upstream: Upstream, down: tuple[float, float]) -> None:
        self.upstream = upstream
        self.down = down

    def _end(self, ends: list[str]) -> str:
        """Return the result of the next attempt."""
        if self.down[0] <= now() < self.down[1]:
            return "final"
        return ends.pop(0) if ends else "success"

    async def make(self, call: Call) -> None:
        """Make one call, and ignore every result but a cancellation."""
        ways = {
            "context manager": self._with_context_manager,
            "guarded": self._guarded,
            "driven": self._driven,
            "streamed": self._driven,
        }
        with contextlib.suppress(Overloaded, Broken, RuntimeError):
            await ways[call.way](call)

    def _how(self, call: Call) -> dict[str, Any]:
        deadline = None if call.deadline is None else Deadline.within(call.deadline)
        return {"priority": call.priority, "tenant": call.tenant, "deadline": deadline}

    async def _with_context_manager(self, call: Call) -> None:
        half = call.tokens // 2
        async with self.upstream.call(call.model, input_tokens=half, output_tokens=half, **self._how(call)) as held:
            await asyncio.sleep(call.seconds)
            end = self._end([*call.ends])
            if end in ("success", "more"):
                times = MAX_OVERSPEND if end == "more" else 1
                held.settle(input_tokens=times * half, output_tokens=half)
            elif end in ("rate", "congested"):
                held.overloaded()
            elif end == "spent":
                held.ignored()
                raise Broken
            elif end != "silent":
                raise Broken

    async def _guarded(self, call: Call) -> None:
        ends = [*call.ends]

        @self.upstream.guard
        async def work() -> None:
            await asyncio.sleep(call.seconds)
            if self._end(ends) in ("fault", "final", "bug"):
                raise Broken

        await work()

    async def _driven(self, call: Call) -> None:
        upstream = self.upstream
        shared = upstream.core.accounts.account(call.model)
        half = call.tokens // 2
        charge = Charge(input_tokens=half, output_tokens=half, tokens=2 * half)
        ends = [*call.ends]

        async def attempt(_: PlainRoute, permit: Permit) -> AttemptResult:
            await asyncio.sleep(call.seconds / 2)
            end = self._end(ends)
            if end == "bug":
                raise RuntimeError
            await asyncio.sleep(call.seconds / 2)
            return self._result(shared, permit, charge, end, open_=call.way == "streamed")

        request = upstream.core.request(call.model, charge, **self._how(call))
        permit = await upstream.runner.run(PlainRoute(upstream, shared, request), attempt)
        if isinstance(permit, Permit) and not permit.closed:  # its reader closes it in any case
            try:
                await asyncio.sleep(call.seconds)
            finally:
                shared.settle(permit, CallOutcome(kind=Outcome.SUCCESS, used=charge, latency=2 * call.seconds))

    def _result(
        self, shared: ThreadSafeAccount, permit: Permit, charge: Charge, end: str, *, open_: bool
    ) -> AttemptResult:
        headers = (RateLimitHeaders(unit="requests", limit=50, remaining=10, reset=3.0),)
        failures = {
            "rate": CallOutcome(
                kind=Outcome.IGNORED, rate_limited=True, retry_after=3.0, rate_limit_headers=headers, usd=0.0
            ),
            "rate at once": CallOutcome(kind=Outcome.IGNORED, rate_limited=True, rate_limit_headers=headers, usd=0.0),
            "congested": CallOutcome(kind=Outcome.OVERLOAD, released=True, usd=0.0),
            "spent": CallOutcome(kind=Outcome.IGNORED, released=True, usd=0.0),
            "unsent": CallOutcome(kind=Outcome.FAULT, released=True, usd=0.0),
            "fault": CallOutcome(kind=Outcome.FAULT, latency=0.5),
            "final": CallOutcome(kind=Outcome.FAULT, latency=0.5),
        }
        if end == "spent":
            shared.suspend(5.0)
        if (failed := failures.get(end)) is not None:
            retryable, uses_attempt = end not in ("spent", "final"), failed.kind is Outcome.FAULT
            return AttemptResult(
                error=Broken(end),
                retryable=retryable,
                uses_attempt=uses_attempt,
                retry_after=failed.retry_after,
                outcome=failed,
            )
        shared.answer_began(permit, headers)
        if open_:
            return AttemptResult(value=permit, streaming=True, outcome=CallOutcome(kind=Outcome.SUCCESS))
        usd = None if end == "silent" else permit.request.usd * (MAX_OVERSPEND if end == "more" else 1)
        return AttemptResult(outcome=CallOutcome(kind=Outcome.SUCCESS, used=charge, usd=usd, latency=1.0))


async def start(call: Call, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Start a call at its time, and cancel it when its caller leaves."""
    await asyncio.sleep(call.at)
    calling = asyncio.ensure_future(work())
    if call.leaves is not None:
        await run_ready(call.leaves)
        calling.cancel()
    if call.leaves_after is not None:
        await asyncio.wait([calling], timeout=call.leaves_after)
        calling.cancel()
    await asyncio.wait([calling])


async def play(script: Script) -> None:
    upstream = upstream_of(script)
    calls = Calls(upstream, script.down)

    async def agent(task: Task) -> None:
        for call in task.payload:
            await asyncio.sleep(call.at)
            await calls.make(call)

    supervisor = BackpressureSupervisor()
    record = EventRecord(supervisor)
    supervisor.register_worker("agents", handler=agent, task_types=["run"], max_concurrent=2, timeout=30.0)
    async with supervisor:

        async def run(plan: tuple[Call, ...]) -> None:
            with contextlib.suppress(Overloaded):
                await supervisor.submit_nowait(Task("run", plan, priority=plan[0].priority, timeout=8.0))

        callers = [start(call, lambda call=call: calls.make(call)) for call in script.calls]  # type: ignore[misc]
        callers += [start(plan[0], lambda plan=plan: run(plan)) for plan in script.tasks]  # type: ignore[misc]
        await asyncio.gather(*callers)
    check_supervisor(record)
    check_upstream(upstream)
    check_budgets(upstream, script)
    await check_it_still_serves(upstream, script)
    check_upstream(upstream)
    assert virtual_loop().pending() == [asyncio.current_task()]
    assert not virtual_loop().errors


def check_budgets(upstream: Upstream, script: Script) -> None:
    """Check that spend exceeds a budget by no more than the calls in flight when it ran out."""
    most = max((call.tokens for calls in (script.calls, *script.tasks) for call in calls), default=0)
    in_flight = sum(shared.account.peak_in_flight for shared in upstream.core.accounts)
    for budget in upstream.core.budgets.all_budgets():
        bound = budget.usd + in_flight * (MAX_OVERSPEND - 1) * most * PRICE / 1e6
        assert (budget.spent() or 0.0) <= bound


async def check_it_still_serves(upstream: Upstream, script: Script) -> None:
    """Check that a free call is admitted, if there are dollars left at all."""
    await asyncio.sleep(100.0)
    try:
        async with asyncio.timeout(100.0), upstream.call(MODELS[0], tenant="new"):
            pass
    except Overloaded as rejection:
        assert script.budget is not None
        assert rejection.limited_by is not None  # noqa: PT017 - it may succeed as well
        assert rejection.limited_by.endswith("budget")  # noqa: PT017 - as above


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(script=SCRIPTS)
def test_after_random_calls_and_cancellations_nothing_is_held(script: Script) -> None:
    simulate(lambda: play(script), seed=script.seed)


# --- at every step ---

PLAIN = Call(0.0, "driven", (), 0.01, "small", 10, Priority.NORMAL, "acme", None, None, None)
FULL = Script(1, (Quota(requests=3, per="second"),), False, 20.0, 20.0, 20.0, 60.0, 0.5, (0.0, 0.0), (), (), 0)


@pytest.mark.parametrize("ends", [(), ("fault", "rate"), ("congested", "bug"), ("unsent", "final")], ids=" ".join)
@pytest.mark.parametrize("way", ["context manager", "guarded", "driven", "streamed"])
def test_a_call_cancelled_at_any_step_leaves_nothing_behind(way: str, ends: tuple[str, ...]) -> None:
    """Cancel it at a full account: as it arrives, waits, is admitted, in flight, backs off, and is read."""
    for step in range(45):
        leaver = replace(PLAIN, way=way, ends=ends, leaves=step if step < 30 else None)
        if step >= 30:
            leaver = replace(leaver, leaves_after=0.05 * (step - 30))
        script = replace(FULL, calls=(PLAIN, leaver, replace(PLAIN, way=way), replace(leaver, at=0.01)))
        simulate(lambda script=script: play(script), seed=step)  # type: ignore[misc]


@pytest.mark.parametrize("way", ["context manager", "guarded", "driven", "streamed"])
def test_a_probe_cancelled_at_any_step_is_returned(way: str) -> None:
    broken = tuple(replace(PLAIN, ends=("final",)) for _ in range(5))
    for step in range(25):
        probe = replace(PLAIN, at=2.0, way=way, leaves=step, seconds=0.0)
        script = replace(FULL, max_concurrent=2, quotas=(), calls=(*broken, probe, replace(probe, leaves=None)))
        simulate(lambda script=script: play(script), seed=step)  # type: ignore[misc]


@pytest.mark.parametrize("leaves", [{"leaves": step} for step in range(25)] + [{"leaves_after": 0.01}], ids=str)
def test_a_run_that_ends_before_its_first_call_is_no_longer_expected(leaves: dict[str, Any]) -> None:
    plan = (replace(PLAIN, **leaves), PLAIN)
    first = (PLAIN,)  # so that the supervisor knows the account of its runs
    later = replace(plan[0], at=0.1), replace(PLAIN, at=0.1)
    simulate(lambda: play(replace(FULL, tasks=(first, later, plan, later))))


def test_held_back_runs_count_once_however_often_they_are_noted() -> None:
    async def main() -> None:
        shared = Upstream("llm").core.accounts.account("")
        for runs in (3, 5, 2):
            shared.hold_back("worker", runs)
            assert shared.account.expected_calls == runs
        shared.hold_back("another", 4)
        assert shared.account.expected_calls == 6
        shared.forget("worker")
        shared.hold_back("another", 0)
        assert shared.account.expected_calls == 0

    simulate(main)
