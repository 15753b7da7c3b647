"""The promises of a store of ledgers, on each kind."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.redis_servers import redis_cluster, redis_server, shared

from forebay.storage import parse_url
from forebay.upstream.shared.ledger.messages import (
    BudgetRequest,
    BudgetTerms,
    ExchangeRequest,
    LedgerTerms,
    QuotaRequest,
    QuotaTerms,
    SlotRequest,
)
from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore
from forebay.upstream.shared.stores.redis_store import RedisLedgerStore
from forebay.upstream.shared.stores.sqlite_store import SqliteLedgerStore
from forebay.upstream.shared.stores.store import LedgerStore

TERMS = LedgerTerms(quotas=(QuotaTerms("requests", 60.0, 3600.0),), max_concurrent=4, budget=BudgetTerms(10.0))


def open_memory(directory: Path) -> Callable[[], LedgerStore]:
    del directory
    store = MemoryLedgerStore()
    return lambda: store


def open_sqlite(directory: Path) -> Callable[[], LedgerStore]:
    return lambda: SqliteLedgerStore(directory / "account.db")


def open_redis(start: Callable[[], AbstractContextManager[Any]]) -> Callable[[Path], Callable[[], LedgerStore]]:
    def open_at(directory: Path) -> Callable[[], LedgerStore]:
        del directory
        url = parse_url(f"{shared(start).url}?name=ledgers-{next(NAMES)}").redis
        assert url is not None
        return lambda: RedisLedgerStore(url)

    return open_at


STORES = {
    "memory": open_memory,
    "sqlite": open_sqlite,
    "redis": open_redis(redis_server),
    "cluster": open_redis(redis_cluster),
}
NAMES = itertools.count()


@pytest.fixture(params=STORES)
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], LedgerStore]]:
    """Return a function that opens the same store once more, as another process does."""
    opened: list[LedgerStore] = []
    make = STORES[request.param](tmp_path)

    def connect() -> LedgerStore:
        opened.append(make())
        return opened[-1]

    yield connect
    for store in opened:
        store.close()


def ask(  # noqa: PLR0913 - the parts of a request
    member: str,
    sequence: int = 1,
    *,
    ledger: str = "one",
    used: float = 0.0,
    needed: float = 0.0,
    calls: int = 0,
    spent: float = 0.0,
    terms: LedgerTerms = TERMS,
) -> ExchangeRequest:
    return ExchangeRequest(
        ledger=ledger,
        member=member,
        sequence=sequence,
        terms=terms,
        quotas=(QuotaRequest(used=used, needed=needed, wanted=needed),),
        slots=SlotRequest(wanted=calls),
        budget=BudgetRequest(period=0.0, spent=spent),
    )


def test_what_one_process_holds_another_does_not_get(connect: Callable[[], LedgerStore]) -> None:
    (mine,) = connect().exchange([ask("a", needed=50.0)])
    (other,) = connect().exchange([ask("b", needed=20.0)])
    assert mine.quotas[0].held == 50.0
    assert other.quotas[0].held == 0.0
    assert other.quotas[0].wait > 0.0
    assert other.members == 2


def test_slots_are_shared(connect: Callable[[], LedgerStore]) -> None:
    (mine,) = connect().exchange([ask("a", calls=3)])
    (other,) = connect().exchange([ask("b", calls=3)])
    assert mine.slots is not None
    assert other.slots is not None
    assert (mine.slots.allowed, other.slots.allowed) == (3, 1)


def test_a_request_that_is_repeated_is_counted_once_and_gets_the_same_reply(
    connect: Callable[[], LedgerStore],
) -> None:
    store = connect()
    request = ask("a", used=-0.0, needed=5.0, spent=2.0)
    first = store.exchange([request])
    assert connect().exchange([request]) == first
    (later,) = store.exchange([ask("b")])
    assert later.budget is not None
    assert later.budget.spent == 2.0


def test_the_exchanges_of_a_batch_are_answered_in_their_order(connect: Callable[[], LedgerStore]) -> None:
    replies = connect().exchange([ask("a", ledger="one", needed=7.0), ask("a", ledger="two", needed=9.0)])
    assert [reply.quotas[0].held for reply in replies] == [7.0, 9.0]


def test_a_ledger_begins_with_what_the_member_that_opens_it_knows_to_be_used(
    connect: Callable[[], LedgerStore],
) -> None:
    store = connect()
    known = BudgetRequest(logged_period=0.0, logged_spent=9.0, needed=1.0, wanted=1.0)
    request = ExchangeRequest(
        ledger="known",
        member="a",
        sequence=1,
        terms=TERMS,
        quotas=(QuotaRequest(wanted=60.0, missing=20.0),),
        slots=SlotRequest(),
        budget=known,
    )
    (reply,) = store.exchange([request])
    assert reply.quotas[0].held + reply.quotas[0].level == pytest.approx(40.0, abs=0.5)
    assert reply.budget is not None
    assert (reply.budget.spent, reply.budget.held) == (9.0, 1.0)
    (later,) = store.exchange([msgspec.structs.replace(request, member="b")])
    assert later.budget is not None
    assert later.budget.spent == 9.0
    assert sum(each.quotas[0].held for each in (reply, later)) <= 40.5


def test_settings_that_differ_are_a_conflict_until_no_live_member_has_the_old_ones(
    connect: Callable[[], LedgerStore],
) -> None:
    store = connect()
    store.exchange([ask("a")])
    other = LedgerTerms(quotas=(QuotaTerms("requests", 30.0, 3600.0),), max_concurrent=4, budget=BudgetTerms(10.0))
    (reply,) = store.exchange([ask("b", terms=other)])
    assert reply.conflict == TERMS
    store.exchange([ExchangeRequest(ledger="one", member="a", sequence=2, terms=TERMS, leaving=True)])
    (reply,) = store.exchange([ask("b", 2, terms=other)])
    assert reply.conflict is None


def test_settings_that_all_members_have_changed_hold_at_once_and_slots_and_money_stay_theirs(
    connect: Callable[[], LedgerStore],
) -> None:
    store = connect()
    changed = LedgerTerms(
        quotas=(QuotaTerms("tokens", 9.0, 60.0), QuotaTerms("requests", 30.0, 3600.0)),
        max_concurrent=5,
        budget=BudgetTerms(20.0),
    )
    store.exchange([ask("a", calls=3, needed=10.0)])
    store.exchange([ask("b", calls=1, needed=10.0)])

    def ask_changed(member: str, sequence: int, calls: int, used: float = 0.0) -> ExchangeRequest:
        return ExchangeRequest(
            ledger="one",
            member=member,
            sequence=sequence,
            terms=changed,
            quotas=(QuotaRequest(), QuotaRequest(used=used)),
            slots=SlotRequest(in_use=calls, held=calls, wanted=calls),
            budget=BudgetRequest(period=0.0),
        )

    (reply,) = store.exchange([ask_changed("a", 2, 3)])
    assert reply.conflict == TERMS
    (reply,) = store.exchange([ask_changed("b", 2, 9)])
    assert reply.conflict is None
    assert reply.slots is not None
    assert reply.slots.allowed <= 2
    (reply,) = store.exchange([ask_changed("a", 3, 3, used=4.0)])
    assert reply.conflict is None
    assert reply.quotas[0].level == 9.0
    assert reply.quotas[1].level == pytest.approx(30.0, abs=0.5)


def test_it_is_used_again_after_it_was_closed(connect: Callable[[], LedgerStore]) -> None:
    store = connect()
    store.exchange([ask("a", spent=1.5)])
    store.close()
    (reply,) = store.exchange([ask("b")])
    assert reply.budget is not None
    assert reply.budget.spent == 1.5


def test_exchanges_from_several_threads_are_each_one_step(connect: Callable[[], LedgerStore]) -> None:
    stores = [connect() for _ in range(4)]

    def spend(store: LedgerStore, member: str) -> None:
        for sequence in range(1, 26):
            store.exchange([ask(member, sequence, spent=0.01)])

    threads = [threading.Thread(target=spend, args=(store, str(number))) for number, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (reply,) = stores[0].exchange([ask("last")])
    assert reply.budget is not None
    assert reply.budget.spent == pytest.approx(1.0)


def ask_about(member: str, sequence: int, stoppage: StoppageRequest) -> ExchangeRequest:
    terms = LedgerTerms(max_concurrent=4, breaker="BreakerRules()")
    return ExchangeRequest(
        ledger="stopped", member=member, sequence=sequence, terms=terms, stoppages={"breaker": stoppage}
    )


def stoppage_of(store: LedgerStore, request: ExchangeRequest) -> StoppageReply:
    (reply,) = store.exchange([request])
    assert reply.stoppages is not None
    return reply.stoppages["breaker"]


def test_calls_that_one_process_stops_are_stopped_for_all_and_one_of_them_probes(
    connect: Callable[[], LedgerStore],
) -> None:
    mine, other = connect(), connect()
    stoppage_of(other, ask_about("b", 1, StoppageRequest()))
    stoppage_of(mine, ask_about("a", 1, StoppageRequest(changed=True, openings=1, seconds=60.0)))
    told = stoppage_of(other, ask_about("b", 2, StoppageRequest(epoch=0, wanted=1)))
    assert told.openings == 1
    assert 0.0 < told.seconds <= 60.0
    assert told.probes == 0
    stoppage_of(mine, ask_about("a", 2, StoppageRequest(epoch=1, changed=True, openings=2)))
    assert stoppage_of(other, ask_about("b", 3, StoppageRequest(epoch=2, wanted=1))).probes == 1
    assert stoppage_of(mine, ask_about("a", 3, StoppageRequest(epoch=2, wanted=1))).probes == 0


def test_a_stoppage_without_an_end_has_none(connect: Callable[[], LedgerStore]) -> None:
    stoppage_of(connect(), ask_about("a", 1, StoppageRequest(changed=True, openings=1, seconds=math.inf)))
    assert stoppage_of(connect(), ask_about("b", 1, StoppageRequest())).seconds == math.inf
