"""Accounts that several upstreams share through a store, as users see them."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.task_plane import virtual

from forebay import Budget, Overloaded, Price, Quota, Upstream, clock
from forebay.breaker import BreakerRules, FaultWindow, consecutive_faults
from forebay.errors import InvalidSetting
from forebay.events import BudgetAlert, Event
from forebay.simulation import simulate, virtual_loop
from forebay.upstream.accounts import spend as accounts_spend
from forebay.upstream.shared.ledger.messages import LEASE
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("account.db", "does not begin with the name of a store"),
        ("sqlite:///", "it names no file"),
        ("sqlite:///account.db?bound=5", "bound is an option of an overflow"),
        ("sqlite:///account.db?speed=5", "no option 'speed'"),
        ("memory://", "no other process can see what is in memory"),
        ("sqs://queue", "no account is kept in sqs"),
    ],
)
def test_a_url_that_names_no_store_for_accounts_is_rejected_with_advice(url: str, why: str) -> None:
    with pytest.raises(InvalidSetting, match=why):
        Upstream("key", shared=url)


def test_something_that_is_neither_a_url_nor_a_store_is_rejected() -> None:
    with pytest.raises(InvalidSetting, match="shared"):
        Upstream("key", shared=7)  # type: ignore[arg-type]


@virtual
async def test_upstreams_of_different_names_do_not_share() -> None:
    store = MemoryLedgerStore()
    quotas = [Quota(requests=1, per="day")]
    for name in ("one", "other"):
        async with Upstream(name, quotas=quotas, shared=store).call():
            pass


async def spend(upstream: Upstream, tokens: int) -> None:
    async with upstream.call("m", output_tokens=tokens) as call:
        call.settle(input_tokens=0, output_tokens=tokens)


@virtual
async def test_a_process_that_has_made_no_call_is_told_what_others_have_spent() -> None:
    store = MemoryLedgerStore()
    first, restarted = (
        Upstream("key", budget=Budget(usd=10.0), prices={"m": Price(input=0, output=1_000)}, shared=store)
        for _ in range(2)
    )
    await spend(first, 3_000)
    await asyncio.sleep(1.0)
    assert restarted.statistics().spent_usd is None, "it is not known yet, and not 0"
    await asyncio.sleep(0.1)
    assert restarted.statistics().spent_usd == pytest.approx(3.0)
    await spend(first, 2_000)
    await asyncio.sleep(60.0)
    restarted.statistics()  # it asks again
    await asyncio.sleep(0.1)
    assert restarted.statistics().spent_usd == pytest.approx(5.0)


@virtual
async def test_a_process_that_only_asks_what_was_spent_leaves_the_ledger_soon() -> None:
    store = MemoryLedgerStore()
    upstream = Upstream("key", budget=Budget(usd=10.0), shared=store)
    upstream.statistics()
    await asyncio.sleep(0.1)
    (ledger,) = store.ledgers.values()
    assert len(ledger.state.members) == 1
    await asyncio.sleep(4.0)
    assert not ledger.state.members


def test_a_thread_without_an_event_loop_is_told_at_once_what_others_have_spent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryLedgerStore()

    def start() -> Upstream:
        return Upstream("key", budget=Budget(usd=10.0), prices={"m": Price(input=0, output=1_000)}, shared=store)

    async def spend_in_another_process() -> None:
        await spend(start(), 3_000)
        await asyncio.sleep(1.0)

    simulate(spend_in_another_process, seed=1)
    monkeypatch.setattr(accounts_spend, "_FIRST_ANSWER", 60.0)
    assert start().statistics().spent_usd == pytest.approx(3.0)


@virtual
async def test_a_machine_that_was_suspended_asks_before_it_uses_what_it_had_leased() -> None:
    upstream = Upstream("key", max_concurrent=1, shared=MemoryLedgerStore())
    async with upstream.call():
        pass
    began = clock.now()
    async with upstream.call():
        assert clock.now() == began, "its slot is still here"
    virtual_loop().suspend(60.0)
    async with upstream.call():
        assert clock.now() > began, "others may have got the slot"


@virtual
async def test_settings_that_differ_are_rejected_with_both_until_no_process_has_the_old_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryLedgerStore()
    old = Upstream("key", max_concurrent=3, shared=store)
    new = Upstream("key", max_concurrent=5, shared=store)
    async with old.call():
        pass
    with pytest.raises(Overloaded, match=r"max_concurrent=5, .* here, max_concurrent=3, .* there"):
        async with new.call():
            pass
    await asyncio.sleep(LEASE)
    assert [record.levelname for record in caplog.records if "its settings differ" in record.message] == ["ERROR"]
    assert old.core.link is not None
    old.core.link.begin_close()  # its process ends
    await asyncio.sleep(2 * LEASE)
    async with new.call():
        pass


@virtual
async def test_rules_of_breakers_that_differ_are_rejected_with_both() -> None:
    store = MemoryLedgerStore()
    async with Upstream("key", breaker=BreakerRules(reset_timeout=30.0), shared=store).call():
        with pytest.raises(
            Overloaded, match=r"BreakerRules\(probes=2\) here, .*BreakerRules\(reset_timeout=30.0\) there"
        ):
            async with Upstream("key", breaker=BreakerRules(probes=2), shared=store).call():
                pass


class NeverTrigger:
    """A trigger of a user's own, which has no `repr`."""

    seconds = calls = 0

    def should_open(self, window: FaultWindow) -> bool:
        del window
        return False


@virtual
async def test_triggers_of_a_users_own_are_the_same_if_their_classes_are() -> None:
    store = MemoryLedgerStore()
    for _ in range(2):
        upstream = Upstream("key", breaker=BreakerRules(triggers=(NeverTrigger(),)), shared=store)
        async with upstream.call():
            pass


@virtual
async def test_a_breaker_that_one_process_opens_shows_in_all() -> None:
    store = MemoryLedgerStore()
    rules = BreakerRules(triggers=(consecutive_faults(2),), reset_timeout=30.0)
    one, other = (Upstream("key", breaker=rules, shared=store) for _ in range(2))
    for upstream in (one, other):
        with pytest.raises(ConnectionError):
            async with upstream.call():
                raise ConnectionError
    await asyncio.sleep(1.0)
    for upstream in (one, other):
        with pytest.raises(Overloaded, match="its breaker is open") as caught:
            async with upstream.call():
                pass
        assert caught.value.limited_by == "upstream:key:breaker"
        assert 10.0 < (caught.value.retry_after or 0.0) <= 30.0
        (account,) = upstream.statistics().accounts
        assert (account.breaker, account.load) == ("open", 1.0)


@virtual
async def test_a_shared_budget_is_spent_once_a_small_call_is_rejected() -> None:
    events: list[Event] = []
    upstream = Upstream(
        "key",
        budget=Budget(usd=10.0, alert=0.5),
        prices={"m": Price(input=0, output=1_000)},
        shared=MemoryLedgerStore(),
        on_event=events.append,
    )
    async with upstream.call("m", output_tokens=9_900) as call:
        call.settle(input_tokens=0, output_tokens=9_900)
    for _ in range(2):
        await asyncio.sleep(1.0)
        with pytest.raises(Overloaded, match="would be overspent"):
            async with upstream.call("m", output_tokens=300):
                pass
    await asyncio.sleep(1.0)
    alerts = [event for event in events if isinstance(event, BudgetAlert)]
    assert [alert.share for alert in alerts] == [0.5, 1.0]
    assert [alert.spent for alert in alerts] == pytest.approx([9.9, 9.9])


@virtual
async def test_an_alert_is_given_by_one_of_the_processes_that_share_a_budget() -> None:
    events: list[Event] = []
    store = MemoryLedgerStore()
    upstreams = [
        Upstream(
            "key",
            budget=Budget(usd=10.0, alert=0.5),
            prices={"m": Price(input=0, output=1_000)},
            shared=store,
            on_event=events.append,
        )
        for _ in range(3)
    ]
    for _ in range(4):
        for upstream in upstreams:
            async with upstream.call("m", output_tokens=820) as call:
                call.settle(input_tokens=0, output_tokens=820)
            await asyncio.sleep(1.0)
    for upstream in upstreams:
        with pytest.raises(Overloaded, match="would be overspent"):
            async with upstream.call("m", output_tokens=300):
                pass
    await asyncio.sleep(1.0)
    alerts = [event for event in events if isinstance(event, BudgetAlert)]
    assert [alert.share for alert in alerts] == [0.5, 1.0]
    assert [alert.spent for alert in alerts] == pytest.approx([5.74, 9.84])
