"""Ledgers on Redis decide as those in Python do: random exchanges at the same times have the same replies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, Final

import msgspec
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.redis_servers import RedisServer, missing, redis_server, shared

from forebay.upstream.shared.ledger import AccountLedger
from forebay.upstream.shared.messages import (
    BudgetRequest,
    BudgetTerms,
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    QuotaRequest,
    QuotaTerms,
    SlotRequest,
)

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SCRIPT: Final = files("forebay.upstream.shared").joinpath("redis_exchange.lua").read_text()
CLOCK: Final = "local time = redis.call('TIME')\n  return tonumber(time[1]) + tonumber(time[2]) / 1000000"
START: Final = 1_751_327_990.0  # ten seconds before a month ends
QUOTAS: Final = (QuotaTerms("requests", 64.0, 64.0), QuotaTerms("tokens", 8192.0, 64.0))
PERIODS: Final = (None, "hour", "day", "month")

numbers = itertools.count()
eighths = st.integers(0, 512).map(lambda eighth: eighth / 8)  # sums of these are exact: no order changes them


@pytest.fixture(scope="module")
def server() -> RedisServer:
    return shared(redis_server)


@pytest.fixture(scope="module")
def decide(server: RedisServer) -> Iterator[Callable[[str, float, ExchangeRequest], ExchangeReply]]:
    assert CLOCK in SCRIPT
    client = redis.Redis.from_url(server.url)
    script = client.register_script(SCRIPT.replace(CLOCK, "return tonumber(ARGV[2])"))

    def exchange(key: str, now: float, request: ExchangeRequest) -> ExchangeReply:
        answer = script(keys=[key], args=[msgspec.msgpack.encode(request), repr(now)])
        return msgspec.msgpack.decode(answer, type=ExchangeReply)

    yield exchange
    client.close()


terms = st.builds(
    LedgerTerms,
    quotas=st.sampled_from([(), QUOTAS[:1], QUOTAS]),
    max_concurrent=st.sampled_from([None, 1, 2, 5]),
    budget=st.one_of(
        st.none(),
        st.builds(
            BudgetTerms,
            usd=st.just(64.0),
            per=st.sampled_from(PERIODS),
            reserved_share=st.sampled_from([0.0, 0.125]),
            forget_after=st.sampled_from([None, 600.0]),
        ),
    ),
)
steps = st.lists(
    st.fixed_dictionaries(
        {
            "seconds": st.sampled_from([0.0, 0.0, 0.0, 0.125, 1.0, 2.0, 8.0, 3700.0, -4.0, 40 * 86400.0]),
            "member": st.sampled_from("abcd"),
            "repeats": st.sampled_from([False, False, False, True]),
            "epoch": st.sampled_from(["own", "own", "own", "another", ""]),
            "other_terms": st.sampled_from([False] * 9 + [True]),
            "priority": st.integers(0, 3),
            "amounts": st.lists(eighths, min_size=10, max_size=10),
            "in_use": st.integers(0, 6),
            "more_slots": st.integers(0, 6),
            "period": st.sampled_from(["own", "own", "unknown", "earlier"]),
            "important": st.booleans(),
            "leaving": st.sampled_from([False] * 7 + [True]),
        }
    ),
    max_size=40,
)


@given(terms=terms, steps=steps)
@settings(max_examples=100)
def test_the_script_decides_as_the_ledger_in_python(
    decide: Callable[[str, float, ExchangeRequest], ExchangeReply], terms: LedgerTerms, steps: list[dict[str, Any]]
) -> None:
    key, now, ledger = f"{{ledgers}}:{next(numbers)}", START, None
    replies, latest = dict[str, ExchangeReply](), dict[str, ExchangeRequest]()
    for sequence, step in enumerate(steps, 1):
        now += step["seconds"]
        member = step["member"]
        request = latest.get(member) if step["repeats"] else None
        if request is None:
            request = request_of(step, sequence, terms, replies.get(member))
        latest[member] = request
        if ledger is None:
            ledger = AccountLedger.open(now, request)
        expected = ledger.exchange(now, request)
        assert decide(key, now, request) == expected, f"exchange {sequence}"
        replies[member] = expected


def request_of(step: dict[str, Any], sequence: int, terms: LedgerTerms, reply: ExchangeReply | None) -> ExchangeRequest:
    if step["other_terms"]:
        terms = msgspec.structs.replace(terms, quotas=(QuotaTerms("requests", 32.0, 64.0),))
    amounts = iter(step["amounts"])
    quotas = []
    for _ in terms.quotas:
        used, needed, extra = next(amounts) / 64, next(amounts) / 4, next(amounts)
        quotas.append(QuotaRequest(used=used, needed=needed, wanted=needed + extra))
    epoch = step["epoch"] if reply is None or step["epoch"] != "own" else reply.epoch
    known = None if reply is None else reply.budget
    period = -1.0 if known is None or step["period"] == "unknown" else known.period
    period -= 3600.0 if step["period"] == "earlier" else 0.0
    spent, reserved, more, extra = (next(amounts) / 64 for _ in range(4))
    return ExchangeRequest(
        ledger="l",
        member=step["member"],
        sequence=sequence,
        epoch=epoch,
        terms=terms,
        priority=step["priority"],
        quotas=tuple(quotas),
        slots=None
        if terms.max_concurrent is None
        else SlotRequest(in_use=step["in_use"], wanted=step["in_use"] + step["more_slots"]),
        budget=None
        if terms.budget is None
        else BudgetRequest(
            period=period,
            spent=spent,
            reserved=reserved,
            needed=reserved + more,
            important=step["important"],
            wanted=reserved + more + extra,
            known_spent=0.0 if known is None else known.spent,
        ),
        leaving=step["leaving"],
    )
