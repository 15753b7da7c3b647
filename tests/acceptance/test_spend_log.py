"""Budgets whose spend survives a restart, and the alerts of budgets."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.task_plane import virtual
from tests.unit.upstream.httpx_binding.wire import Reply, Script

from forebay import BackpressureSupervisor, Budget, Overloaded, Price, Task, Upstream
from forebay.errors import InvalidSetting, InvalidSpendLogUrl
from forebay.events import BudgetAlert, Event
from forebay.simulation import simulate
from forebay.spend_log import SpendAmounts, SpendLabels, SpendLog, SpendQuery, read_spend, spend_file
from forebay.spend_log.spend_record import ALL_UPSTREAMS, AlertPlace
from forebay.storage import Fsync, Schema
from forebay.storage.sqlite_file import open_file
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore

PRICES = {"gpt-4o": Price(input=2.5, output=10.0)}  # dollars per million tokens
OPENAI = "https://provider.test/v1"
COST = 0.0035  # of a call with 1,000 tokens sent and 100 received


class Restarts:
    """Upstreams that have one spend log after the other, as processes that are started again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = []
        self._log: SpendLog | None = None

    @property
    def alerts(self) -> list[BudgetAlert]:
        return [event for event in self.events if isinstance(event, BudgetAlert)]

    def start(self, **settings: Any) -> Upstream:
        """Return the upstream of a new process; the one before has ended."""
        self.end()
        self._log = SpendLog(f"sqlite:///{self.path}")
        return Upstream(
            "openai",
            provider="openai",
            prices=PRICES,
            spend_log=self._log,
            on_event=self.events.append,
            **settings,
        )

    def end(self) -> None:
        """End the process in an orderly way."""
        if self._log is not None:
            self._log.close()

    def rows(self, *by: str) -> dict[tuple[Any, ...], float]:
        """Return what the file has, in dollars."""
        assert self._log is not None
        self._log.flush()
        return {group.values: round(group.amounts.usd, 10) for group in read_spend(self.path, SpendQuery(by=by))}


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[Restarts]:
    restarts = Restarts(tmp_path / "spend.db")
    yield restarts
    restarts.end()


def call(upstream: Upstream, tenant: str | None = None, *, received: int = 100) -> None:
    with upstream.call("gpt-4o", input_tokens=1_000, output_tokens=100, tenant=tenant) as made:
        made.settle(input_tokens=1_000, output_tokens=received)


def rejects(upstream: Upstream, tenant: str | None = None) -> bool:
    try:
        call(upstream, tenant)
    except Overloaded as error:
        return (error.limited_by or "").endswith(":budget")
    return False


def test_a_restart_does_not_refill_a_budget(restarts: Restarts) -> None:
    for _ in range(2):
        upstream = restarts.start(budget=Budget(usd=4 * COST, per="month"))
        call(upstream)
        call(upstream)
    assert upstream.statistics().spent_usd == pytest.approx(4 * COST)
    assert rejects(upstream)
    assert rejects(restarts.start(budget=Budget(usd=4 * COST, per="month")))
    assert not rejects(restarts.start(budget=Budget(usd=6 * COST, per="month"))), "a budget that was raised"


def test_a_restart_does_not_refill_the_budget_of_a_tenant(restarts: Restarts) -> None:
    call(restarts.start(), "acme")
    upstream = restarts.start(tenant_budget=Budget(usd=1.5 * COST, per="month"))
    assert rejects(upstream, "acme")
    assert not rejects(upstream, "zeta")


async def test_a_restart_does_not_refill_the_budget_of_a_task(restarts: Restarts) -> None:
    async def life(upstream: Upstream, task_id: str) -> None:
        async def work(_: Task) -> None:
            async with upstream.call("gpt-4o", input_tokens=1_000, output_tokens=100):
                pass

        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker("w", handler=work, task_types=["work"])
            await supervisor.run(Task("work", task_id=task_id))

    loop = asyncio.get_running_loop()
    budget = Budget(usd=1.5 * COST)
    upstream = await loop.run_in_executor(None, lambda: restarts.start(task_budget=budget))
    await life(upstream, "run-1")
    upstream = await loop.run_in_executor(None, lambda: restarts.start(task_budget=budget))
    with pytest.raises(Overloaded):
        await life(upstream, "run-1")
    await life(upstream, "run-2")
    await loop.run_in_executor(None, restarts.end)


def test_the_log_has_each_call_by_its_labels(restarts: Restarts) -> None:
    upstream = restarts.start(budget=Budget(usd=1))
    call(upstream, "acme")
    call(upstream, "acme", received=50)
    call(upstream)
    rows = restarts.rows("upstream", "tenant", "model", "key")
    assert rows == {("openai", "acme", "gpt-4o", ""): 0.0065, ("openai", "default", "gpt-4o", ""): COST}
    assert sum(rows.values()) == pytest.approx(upstream.statistics().spent_usd)


def test_a_call_that_was_refused_is_not_in_the_log(restarts: Restarts) -> None:
    upstream = restarts.start(budget=Budget(usd=1))
    with upstream.call("gpt-4o", input_tokens=1_000, output_tokens=100) as made:
        made.overloaded()
    assert restarts.rows("model") == {}


def test_without_a_budget_the_log_has_what_calls_cost(restarts: Restarts) -> None:
    upstream = restarts.start()
    call(upstream)
    with upstream.call("a model without a price") as made:
        made.settle(input_tokens=10, output_tokens=10)
    assert restarts.rows("model") == {("gpt-4o",): COST, ("a model without a price",): 0.0}


def test_upstreams_may_share_a_log(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpendLogUrl, match="it is not a text"):
        Upstream("openai", spend_log=tmp_path)  # type: ignore[arg-type]
    spend_log = SpendLog(f"sqlite:///{tmp_path / 'spend.db'}")
    for name in ("one", "two"):
        call(Upstream(name, provider="openai", prices=PRICES, spend_log=spend_log))
    spend_log.close()
    groups = read_spend(spend_log.path, SpendQuery(by=("upstream",)))
    assert {group.values for group in groups} == {("one",), ("two",)}


# --- alerts ---


def wait_for(condition: Callable[[], object]) -> None:
    """Wait for what another thread does; a test that waits in vain ends by its timeout."""
    while not condition():
        threading.Event().wait(0.001)


def test_an_alert_reaches_the_hook_of_the_upstream_once(restarts: Restarts) -> None:
    upstream = restarts.start(budget=Budget(usd=5 * COST, per="month", alert=0.4))
    for _ in range(4):
        call(upstream)
    wait_for(lambda: restarts.alerts)
    (alert,) = restarts.alerts
    assert (alert.kind, alert.upstream, alert.budget) == ("budget_alert", "openai", "budget")
    assert (alert.tenant, alert.task) == (None, None)
    assert (alert.share, alert.usd, alert.per) == (0.4, 5 * COST, "month")
    assert alert.spent == pytest.approx(2 * COST)
    assert alert.period <= alert.time


def test_a_restart_does_not_alert_again(restarts: Restarts, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        call(restarts.start(budget=Budget(usd=10 * COST, per="month", alert=0.1)))
    call(restarts.start(budget=Budget(usd=3 * COST, per="month", alert=0.1)))
    alerts = [record.getMessage() for record in caplog.records if "the budget of" in record.getMessage()]
    assert alerts == [
        "the budget of openai: 10% of 0.035 USD a month is spent: 0.0035 USD",
        "the budget of openai: 0.0105 of 0.0105 USD a month are spent; calls are rejected until the next month",
    ]


@pytest.mark.parametrize("keeps_ledgers", [True, False])
def test_the_alert_of_a_shared_budget_is_not_given_again(
    restarts: Restarts, caplog: pytest.LogCaptureFixture, *, keeps_ledgers: bool
) -> None:
    store = MemoryLedgerStore()

    def spend_until(usd: float) -> None:
        shared = store if keeps_ledgers else MemoryLedgerStore()
        upstream = restarts.start(budget=Budget(usd=10 * COST, per="month", alert=0.1), shared=shared)
        call(upstream)
        wait_for(lambda: "10% of" in caplog.text and (upstream.statistics().spent_usd or 0.0) > usd)

    spend_until(0.5 * COST)
    spend_until(1.5 * COST)
    assert caplog.text.count("10% of 0.035 USD a month is spent") == 1


def test_a_new_store_of_a_shared_account_begins_with_what_the_log_has(restarts: Restarts) -> None:
    call(restarts.start(), "acme")
    upstream = restarts.start(
        budget=Budget(usd=3.5 * COST, per="month"),
        tenant_budget=Budget(usd=2.5 * COST),
        shared=MemoryLedgerStore(),
    )
    call(upstream, "acme")
    assert rejects(upstream, "acme"), "the budget of the tenant"
    call(upstream, "zeta")
    assert upstream.statistics().spent_usd == pytest.approx(3 * COST)
    assert rejects(upstream, "zeta"), "the budget of all calls"


def test_a_store_that_has_a_budget_goes_on_with_what_it_has(restarts: Restarts) -> None:
    store = MemoryLedgerStore()
    for _ in range(2):
        upstream = restarts.start(budget=Budget(usd=2.5 * COST, per="month"), shared=store)
        call(upstream)
        assert upstream.core.link is not None
        loop = upstream.core.link.begin_close()
        assert loop is not None
        loop.join()  # type: ignore[attr-defined]
    (ledger,) = [ledger for ledger in store.ledgers.values() if ledger.state.terms.budget]
    assert ledger.state.spent == pytest.approx(2 * COST)


def test_what_processes_have_spent_together_alerts_at_the_next_start(restarts: Restarts) -> None:
    call(restarts.start())
    call(restarts.start())
    upstream = restarts.start(budget=Budget(usd=4 * COST, per="month", alert=0.5))
    call(upstream)
    wait_for(lambda: restarts.alerts)
    assert [alert.share for alert in restarts.alerts] == [0.5]


def test_that_a_budget_is_spent_is_an_event_without_a_share(restarts: Restarts) -> None:
    upstream = restarts.start(tenant_budget=Budget(usd=20.5 * COST, per="month"))
    for _ in range(20):
        call(upstream, "acme")
    assert rejects(upstream, "acme")
    assert rejects(upstream, "acme")
    wait_for(lambda: restarts.alerts)
    assert [(alert.budget, alert.tenant, alert.share) for alert in restarts.alerts] == [("tenant_budget", "acme", 1.0)]


def test_an_alert_is_logged(restarts: Restarts, caplog: pytest.LogCaptureFixture) -> None:
    upstream = restarts.start(budget=Budget(usd=2 * COST, per="day", alert=0.5))
    call(upstream)
    assert "the budget of openai: 50% of 0.007 USD a day is spent: 0.0035 USD" in caplog.text
    call(upstream)
    assert "calls are rejected until the next day" in caplog.text


async def test_supervisors_whose_tasks_call_the_upstream_have_its_alerts() -> None:
    events: list[Event] = []
    others: list[Event] = []
    hooked: list[Event] = []
    upstream = Upstream(
        "openai",
        provider="openai",
        prices=PRICES,
        task_budget=Budget(usd=COST, alert=0.5),
        on_event=hooked.append,
    )

    async def work(_: Task) -> None:
        async with upstream.call("gpt-4o", input_tokens=1_000, output_tokens=100):
            pass

    async with (
        BackpressureSupervisor(on_event=events.append) as supervisor,
        BackpressureSupervisor(on_event=others.append) as other,
    ):
        supervisor.register_worker("w", handler=work, task_types=["work"])
        other.register_worker("w", handler=lambda _: None, task_types=["work"])
        await other.run(Task("work"))
        await supervisor.run(Task("work", task_id="run-1"))
    alerts = [event for event in events if isinstance(event, BudgetAlert)]
    assert [(alert.task, alert.share) for alert in alerts] == [("run-1", 1.0)]
    assert alerts == hooked
    assert not [event for event in others if isinstance(event, BudgetAlert)]


def test_a_hook_may_call_the_upstream_and_raise(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[float | None] = []

    def hook(_: Event) -> None:
        seen.append(upstream.statistics().spent_usd)
        raise ValueError("a bug of the user")

    upstream = Upstream("openai", provider="openai", prices=PRICES, budget=Budget(usd=COST), on_event=hook)
    call(upstream)
    wait_for(lambda: "a bug of the user" in caplog.text)
    assert seen == [pytest.approx(COST)]
    assert rejects(upstream)


def test_a_hook_that_cannot_be_called_is_an_error() -> None:
    with pytest.raises(InvalidSetting, match="a plain function that takes an event"):
        Upstream("openai", on_event="alert")  # type: ignore[arg-type]


# --- whatever becomes of calls ---


def json_reply(**fields: Any) -> Reply:
    return Reply(body=[json.dumps(fields).encode()], headers={"content-type": "application/json"})


def of_http_calls(spend_log: SpendLog) -> Upstream:
    prices = {"gpt-5": Price(input=0.0, output=10.0), "gpt-4o": Price(input=1.0, output=1.0)}
    return Upstream("openai", provider="openai", budget=Budget(usd=100), prices=prices, spend_log=spend_log)


@pytest.mark.blocks  # a virtual loop writes inline
@virtual
async def test_a_correction_of_a_response_in_the_background_is_in_the_log(tmp_path: Path) -> None:
    spend_log = SpendLog(f"sqlite:///{tmp_path / 'spend.db'}")
    upstream = of_http_calls(spend_log)
    script = Script(httpx2, json_reply(id="resp_1", status="queued", usage=None))
    asked = {"model": "gpt-5", "input": "think", "background": True, "max_output_tokens": 50_000}
    await script.client(upstream).post(OPENAI + "/responses", json=asked)
    usage = {"input_tokens": 7, "output_tokens": 8_000}
    script.replies = [json_reply(id="resp_1", status="completed", usage=usage)]
    await script.client(upstream).get(OPENAI + "/responses/resp_1")
    spend_log.close()
    (group,) = read_spend(spend_log.path, SpendQuery(by=("model",)))
    amounts = group.amounts
    assert (amounts.calls, amounts.input_tokens, amounts.output_tokens) == (1, 7, 8_000)
    assert amounts.usd == pytest.approx(0.08)
    assert upstream.statistics().spent_usd == pytest.approx(0.08)


@pytest.mark.blocks
def test_a_file_that_has_no_column_for_api_keys_gets_one_and_keeps_its_spend(tmp_path: Path) -> None:
    path = tmp_path / "spend.db"
    old = Schema(spend_file._SCHEMA.application_id, spend_file._SCHEMA.migrations[:1])
    connection = open_file(path, old, Fsync.YES, 5.0)
    connection.execute("INSERT INTO spend VALUES (3600, 'openai', 'acme', 'gpt-4o', 'writer', 2, 30, 20, 0.5)")
    connection.close()
    spend_log = SpendLog(f"sqlite:///{path}")
    spend_log.open()
    spend_log.record(SpendLabels(3600, "openai", "acme", "gpt-4o", "writer", "paid"), SpendAmounts(1, 3, 2, 0.25))
    assert spend_log.spent(AlertPlace(ALL_UPSTREAMS, "key_budget", "writer"), None, 7200.0) == 0.75
    spend_log.close()
    groups = read_spend(path, SpendQuery(by=("key", "api_key")))
    assert [(group.values, group.amounts.usd) for group in groups] == [
        (("writer", ""), 0.5),
        (("writer", "paid"), 0.25),
    ]


@pytest.mark.blocks
@virtual
async def test_cached_tokens_count_as_sent_and_the_key_is_told_by_its_digest(tmp_path: Path) -> None:
    spend_log = SpendLog(f"sqlite:///{tmp_path / 'spend.db'}")
    upstream = of_http_calls(spend_log)
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 90}}
    script = Script(httpx2, json_reply(id="c", model="gpt-4o", choices=[], usage=usage))
    headers = {"authorization": "Bearer sk-secret"}
    asked = {"model": "gpt-4o", "messages": []}
    await script.client(upstream).post(OPENAI + "/chat/completions", json=asked, headers=headers)
    spend_log.close()
    (group,) = read_spend(spend_log.path, SpendQuery(by=("api_key",)))
    assert (group.amounts.input_tokens, group.amounts.output_tokens) == (100, 5)
    (account,) = upstream.statistics().accounts
    assert group.values[0]
    assert str(group.values[0]) in account.name
    assert b"sk-secret" not in spend_log.path.read_bytes()


ENDS = ("settled", "left", "failed", "overloaded", "ignored", "cancelled", "rejected")


async def end_call(upstream: Upstream, end: str, tokens: int, seconds: float) -> None:
    """Make a call that ends so, after some seconds."""
    async with upstream.call("gpt-4o", input_tokens=10**8 if end == "rejected" else 1_000) as made:
        await asyncio.sleep(seconds)
        if end == "cancelled":
            await asyncio.Event().wait()
        if end == "settled":
            made.settle(input_tokens=tokens, output_tokens=0)
        elif end == "overloaded":
            made.overloaded()
        elif end == "ignored":
            made.ignored()
        elif end == "failed":
            raise OSError


@pytest.mark.blocks
@given(
    ends=st.lists(st.tuples(st.sampled_from(ENDS), st.integers(0, 10**6), st.booleans()), max_size=30),
    pause=st.floats(0, 3_600),
)
@settings(max_examples=30, deadline=None)
def test_the_log_has_what_the_budget_counts(
    ends: list[tuple[str, int, bool]],
    pause: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    spend_log = SpendLog(f"sqlite:///{tmp_path_factory.mktemp('spend')}/spend.db?fsync=no")
    upstream = Upstream("openai", provider="openai", budget=Budget(usd=50), prices=PRICES, spend_log=spend_log)

    async def main() -> None:
        tasks = []
        for end, tokens, waits in ends:
            task = asyncio.create_task(end_call(upstream, end, tokens, pause / 30))
            await asyncio.sleep(pause / 60)
            if end == "cancelled":
                task.cancel()
            if waits:
                await asyncio.wait([task])
            tasks.append(task)
        if tasks:
            await asyncio.wait(tasks)
            await asyncio.gather(*tasks, return_exceptions=True)

    simulate(main())
    spent = upstream.statistics().spent_usd
    spend_log.close()
    assert sum(group.amounts.usd for group in read_spend(spend_log.path, SpendQuery(by=()))) == pytest.approx(spent)


def test_without_a_budget_calls_are_priced_and_none_is_rejected_for_that(
    restarts: Restarts, caplog: pytest.LogCaptureFixture
) -> None:
    upstream = restarts.start()
    for model in ("gpt-4o", "unknown", "unknown"):
        with upstream.call(model, input_tokens=1_000, output_tokens=100):
            pass  # what is expected counts
    assert restarts.rows("model") == {("gpt-4o",): COST, ("unknown",): 0.0}
    assert upstream.statistics().unpriced == 2
    assert caplog.text.count("count as free, because no price is known for model 'unknown'") == 1


@pytest.mark.blocks
@virtual
async def test_without_a_budget_a_request_that_cannot_be_priced_is_sent(tmp_path: Path) -> None:
    spend_log = SpendLog(f"sqlite:///{tmp_path / 'spend.db'}")
    upstream = Upstream("openai", provider="openai", prices=PRICES, spend_log=spend_log)
    usage = {"prompt_tokens": 1_000, "completion_tokens": 100}
    script = Script(httpx2, json_reply(id="c", model="gpt-4o", choices=[], usage=usage))
    client = script.client(upstream)
    for body in (b'{"model":"unknown","messages":[]}', b'{"model":"gpt-4o","messages":[]}', b"not JSON"):
        assert (await client.post(OPENAI + "/chat/completions", content=body)).status_code == 200
    spend_log.close()
    groups = read_spend(spend_log.path, SpendQuery(by=("model",)))
    assert {group.values[0]: group.amounts.usd for group in groups} == {"gpt-4o": COST, "unknown": 0.0, "": 0.0}
