"""Ledgers on Redis decide as those in Python do: random exchanges at the same times have the same replies."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any, Final

import msgspec
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.cutting_proxy import Side
from tests.support.ledger_layouts import ENDED_FIELDS, LEDGER_FIELDS, MEMBER_FIELDS, spend
from tests.support.redis_servers import (
    START as START_TIME,
)
from tests.support.redis_servers import (
    StandaloneRedis,
    missing,
    redis_cluster,
    redis_sentinels,
    redis_server,
    shared,
)

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.limit import AnswerCounts
from forebay.storage import parse_url, redis_master
from forebay.upstream.shared.ledger.ledger import AccountLedger
from forebay.upstream.shared.ledger.ledger_state import LAYOUT
from forebay.upstream.shared.ledger.messages import (
    BudgetRequest,
    BudgetTerms,
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    LimitRequest,
    QuotaRequest,
    QuotaTerms,
    SlotRequest,
)
from forebay.upstream.shared.ledger.observed_messages import ObservedRemaining, ObservedRequest
from forebay.upstream.shared.ledger.periods import period_start
from forebay.upstream.shared.ledger.rate_messages import RateRequest, SharedRate, SharedRateCheck
from forebay.upstream.shared.ledger.stoppage_messages import StoppageRequest
from forebay.upstream.shared.stores.redis_store import RedisLedgerStore

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SCRIPT: Final = files("forebay.upstream.shared.stores").joinpath("redis_exchange.lua").read_text()
CLOCK: Final = "local time = redis.call('TIME')\n  return tonumber(time[1]) + tonumber(time[2]) / 1000000"
START: Final = 1_751_327_990.0  # ten seconds before a month ends
QUOTAS: Final = (QuotaTerms("requests", 64.0, 64.0), QuotaTerms("tokens", 8192.0, 64.0))
PERIODS: Final = (None, "hour", "day", "month")

LEARNED: Final = (
    SharedRate(
        rate=4.0, measured=True, held=4.0, learned=3.5, before_rise=0.25, falls=2, step=0.02, wait=10.0, limits=3
    ),
    SharedRate(rate=1.0, check=SharedRateCheck(1.0, 2.0, 0.5, 0.25), score=-1.5, is_disproved=True),
    SharedRate(),
)

numbers = itertools.count()
eighths = st.integers(0, 512).map(lambda eighth: eighth / 8)  # sums of these are exact: no order changes them


@pytest.fixture(scope="module")
def server() -> StandaloneRedis:
    return shared(redis_server)


@pytest.fixture(scope="module")
def decide(server: StandaloneRedis) -> Iterator[Callable[[str, float, ExchangeRequest], ExchangeReply]]:
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
    limit=st.sampled_from([None, "AdaptiveLimit"]),
    breaker=st.sampled_from([None, "BreakerRules()"]),
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
stoppages = st.fixed_dictionaries(
    {
        "epoch": st.sampled_from(["own", "own", "own", -1, 3]),
        "changed": st.sampled_from([False, False, True]),
        "openings": st.integers(0, 2),
        "seconds": st.sampled_from([0.0, 0.125, 1.0, 8.0, math.inf]),
        "passed": st.integers(0, 1),
        "passes": st.sampled_from([0, 0, 1, 2]),
        "calls": st.integers(1, 3),
        "faults": st.integers(0, 1),
        "probes": st.integers(0, 1),
        "wanted": st.integers(0, 3),
        "most_probes": st.integers(1, 3),
        "successes": st.integers(1, 2),
        "details": st.sampled_from([(), (1.0, -0.125)]),
    }
)
steps = st.lists(
    st.fixed_dictionaries(
        {
            "seconds": st.sampled_from([0.0, 0.0, 0.0, 0.125, 1.0, 2.0, 3.0, 8.0, 3700.0, -4.0, 40 * 86400.0]),
            "member": st.sampled_from("abcd"),
            "repeats": st.sampled_from([False, False, False, True]),
            "answered": st.sampled_from(["own", "own", 0, 1000]),
            "epoch": st.sampled_from(["own", "own", "own", "another", ""]),
            "other_terms": st.sampled_from([False] * 9 + [True]),
            "priority": st.integers(0, 3),
            "amounts": st.lists(eighths, min_size=11, max_size=11),
            "in_use": st.integers(0, 6),
            "kept_slots": st.integers(0, 2),
            "more_slots": st.integers(0, 6),
            "period": st.sampled_from(["own", "own", "unknown", "earlier"]),
            "important": st.booleans(),
            "alert": st.sampled_from([0.0, 0.0625, 0.5]),
            "alerted": st.sampled_from([0.0, 0.0, 0.0, 0.0625, 1.0]),
            "exhausted": st.sampled_from([False, False, False, True]),
            "limit_epoch": st.sampled_from(["own", "own", "own", -1, 2]),
            "cut": st.one_of(st.none(), st.none(), eighths),
            "raised": eighths,
            "returned": st.sampled_from([0.0, 0.0, 1.0, 2.5]),
            "answers": st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 1)),
            "silence": st.sampled_from([0.0, 0.0, 0.0, 1.5]),
            "stoppages": st.dictionaries(st.sampled_from(["breaker", "pause"]), stoppages),
            "leaving": st.sampled_from([False] * 7 + [True]),
            "rate": st.one_of(
                st.none(),
                st.fixed_dictionaries(
                    {
                        "epoch": st.sampled_from(["own", "own", "own", -1, 2]),
                        "counted": st.integers(-4, 64),
                        "demand": st.sampled_from([0.0, 0.0, 0.5, 4.0, 32.0]),
                        "learned": st.sampled_from([None, None, *LEARNED]),
                        "trial": st.sampled_from([0.0, 0.0, 2.5]),
                    }
                ),
            ),
            "observed": st.lists(
                st.fixed_dictionaries(
                    {
                        "unit": st.sampled_from(["requests", "input_tokens"]),
                        "amount": st.sampled_from([32.0, 64.0]),
                        "seconds": st.sampled_from([1.0, 64.0]),
                        "ends_in": st.sampled_from([None, None, 0.5, 32.0]),
                        "epoch": st.sampled_from(["own", "own", "own", -1, 2]),
                        "is_changed": st.sampled_from([False, False, False, True]),
                        "seen": st.one_of(st.none(), st.tuples(eighths, eighths, eighths, st.booleans())),
                        "doubt": st.sampled_from([None, None, None, 0.0, 600.0]),
                        "amounts": st.lists(eighths, min_size=4, max_size=4),
                    }
                ),
                max_size=2,
                unique_by=lambda observed: observed["unit"],
            ),
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
        answer = decide(key, now, request)
        assert is_alike(msgspec.to_builtins(answer), msgspec.to_builtins(expected)), f"{sequence}: {answer}, {expected}"
        replies[member] = expected


def is_alike(answer: Any, expected: Any) -> bool:
    """Return whether both are the same but for rounding errors."""
    if isinstance(expected, float):
        return math.isclose(answer, expected, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(expected, dict):
        return answer.keys() == expected.keys() and all(is_alike(answer[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(answer) == len(expected) and all(map(is_alike, answer, expected))
    return bool(answer == expected)


def request_of(step: dict[str, Any], sequence: int, terms: LedgerTerms, reply: ExchangeReply | None) -> ExchangeRequest:
    if step["other_terms"]:
        terms = msgspec.structs.replace(terms, quotas=(QuotaTerms("requests", 32.0, 64.0),))
    amounts = iter(step["amounts"])
    quotas = []
    for _ in terms.quotas:
        used, needed, extra = next(amounts) / 64, next(amounts) / 4, next(amounts)
        quotas.append(QuotaRequest(used=used, reserved=needed / 2, needed=needed, wanted=needed + extra))
    observed = [observed_request_of(each, reply) for each in step["observed"]]
    for each in step["observed"]:
        used, reserved, more, extra = (amount / 64 for amount in each["amounts"])
        quotas.append(
            QuotaRequest(used=used, reserved=reserved, needed=reserved + more, wanted=reserved + more + extra)
        )
    epoch = step["epoch"] if reply is None or step["epoch"] != "own" else reply.epoch
    known = None if reply is None else reply.budget
    period = -1.0 if known is None or step["period"] == "unknown" else known.period
    period -= 3600.0 if step["period"] == "earlier" else 0.0
    spent, reserved, more, extra = (next(amounts) / 64 for _ in range(4))
    return ExchangeRequest(
        ledger="l",
        member=step["member"],
        sequence=sequence,
        answered=0 if step["answered"] == "own" else step["answered"],
        epoch=epoch,
        members=0 if reply is None or not epoch else reply.members,
        terms=terms,
        priority=step["priority"],
        quotas=tuple(quotas),
        slots=None
        if terms.max_concurrent is None and terms.limit is None
        else SlotRequest(
            in_use=step["in_use"],
            held=step["in_use"] + step["kept_slots"],
            wanted=step["in_use"] + step["more_slots"],
        ),
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
            logged_period=period_start(terms.budget.per, START) if known is None else -1.0,
            logged_spent=next(amounts) / 64,
            alert=step["alert"],
            alerted=step["alerted"],
            exhausted=step["exhausted"],
        ),
        leaving=step["leaving"],
        limit=None if terms.limit is None else limit_request_of(step, reply),
        observed=tuple(observed),
        rate=None if step["rate"] is None else rate_request_of(step["rate"], reply),
        stoppages={kind: stoppage_request_of(each, kind, reply) for kind, each in step["stoppages"].items()} or None,
    )


def rate_request_of(drawn: dict[str, Any], reply: ExchangeReply | None) -> RateRequest:
    known = None if reply is None else reply.rate
    epoch = drawn["epoch"] if drawn["epoch"] != "own" else -1 if known is None else known.epoch
    return RateRequest(**{**drawn, "epoch": epoch})


def observed_request_of(drawn: dict[str, Any], reply: ExchangeReply | None) -> ObservedRequest:
    told = [] if reply is None else [each for each in reply.observed if each.unit == drawn["unit"]]
    epoch, seen = drawn["epoch"], drawn["seen"]
    return ObservedRequest(
        unit=drawn["unit"],
        amount=drawn["amount"],
        seconds=drawn["seconds"],
        epoch=epoch if epoch != "own" else told[0].epoch if told else -1,
        ends_in=drawn["ends_in"],
        is_changed=drawn["is_changed"],
        under_way=drawn["amounts"][1] / 64,
        seen=None if seen is None else ObservedRemaining(*seen),
        doubt=drawn["doubt"],
    )


def limit_request_of(step: dict[str, Any], reply: ExchangeReply | None) -> LimitRequest:
    known = None if reply is None else reply.limit
    epoch = step["limit_epoch"]
    return LimitRequest(
        epoch=epoch if epoch != "own" else -1 if known is None else known.epoch,
        level=4.0 + step["raised"],
        most=64.0,
        cut=step["cut"],
        raised=step["raised"],
        returned=step["returned"],
        returns_to=4.0 * step["returned"],
        silence=step["silence"],
        answers=AnswerCounts(*step["answers"]),
    )


def stoppage_request_of(step: dict[str, Any], kind: str, reply: ExchangeReply | None) -> StoppageRequest:
    known = None if reply is None or reply.stoppages is None else reply.stoppages.get(kind)
    epoch = step["epoch"]
    if epoch == "own":
        epoch = -1 if known is None else known.epoch
    return StoppageRequest(**{**step, "epoch": epoch})


def spend_a_dollar(store: RedisLedgerStore, sequence: int, reply: ExchangeReply | None) -> ExchangeReply:
    """Return the reply to an exchange that reports two calls and, but for the first one, a dollar."""
    known = None if reply is None else reply.budget
    request = ExchangeRequest(
        ledger="l",
        member="a",
        sequence=sequence,
        answered=sequence - 1,
        epoch="" if reply is None else reply.epoch,
        members=0 if reply is None else reply.members,
        terms=LedgerTerms(quotas=QUOTAS[:1], budget=BudgetTerms(usd=64.0)),
        quotas=(QuotaRequest(used=2.0, needed=1.0, wanted=1.0),),
        budget=BudgetRequest(
            period=-1.0 if known is None else known.period,
            spent=0.0 if known is None else 1.0,
            known_spent=0.0 if known is None else known.spent,
        ),
    )
    return exchange_with(store, request)


def exchange_with(store: RedisLedgerStore, request: ExchangeRequest) -> ExchangeReply:
    """Return the reply to a request, which is repeated as it is until it is answered."""
    limit = clock.monotonic() + START_TIME
    while True:
        try:
            (reply,) = store.exchange([request])
        except StoreUnavailable:
            assert clock.monotonic() < limit
        else:
            return reply


def spend_dollars(store: RedisLedgerStore, numbers: range, reply: ExchangeReply | None = None) -> ExchangeReply:
    for sequence in numbers:
        reply = spend_a_dollar(store, sequence, reply)
    assert reply is not None
    return reply


def open_store(servers: Any, name: str = "") -> RedisLedgerStore:
    url = parse_url(f"{servers.url}?name={name or f'ledger-{next(numbers)}'}").redis
    assert url is not None
    return RedisLedgerStore(url)


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_cut_at_any_command_counts_nothing_twice(lost: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_master, "_RETRY_INTERVAL", 0.001)
    with redis_server(proxied=True) as server:
        [proxy] = server.proxies
        spend_dollars(open_store(server), range(1, 6))
        for number in range(1, len(proxy.commands) + 1):
            proxy.cut_at(number, lost)
            reply = spend_dollars(open_store(server), range(1, 6))
            assert proxy.has_cut
            assert reply.budget is not None
            assert reply.budget.spent == 4.0, f"after a cut at command {number}, {proxy.commands[number - 1]}"


def test_a_server_that_comes_back_without_its_data_is_told_what_was_spent() -> None:
    with redis_server() as server:
        store = open_store(server)
        before = spend_dollars(store, range(1, 6))
        server.servers[0].kill()
        server.servers[0].start()
        after = spend_a_dollar(store, 6, before)
        assert after.epoch != before.epoch
        assert after.budget is not None
        assert after.budget.spent == 5.0
        assert after.quotas[0].held == 0.0  # the quota begins empty


@pytest.mark.slow
@pytest.mark.parametrize("start", [redis_sentinels, redis_cluster], ids=["sentinel", "cluster"])
def test_a_failover_forgets_no_money_that_a_member_knows_of(start: Callable[..., Any]) -> None:
    with start(proxied=True) as servers:
        store = open_store(servers, "forebay")
        before = spend_dollars(store, range(1, 11))
        servers.kill_master()
        servers.promote()
        after = spend_a_dollar(store, 11, before)
        assert after.budget is not None
        assert after.budget.spent == 10.0


def test_a_late_copy_is_told_what_it_has_missed(server: StandaloneRedis) -> None:
    store = open_store(server, "late")
    before = spend_dollars(store, range(1, 6))
    with redis.Redis.from_url(server.url) as client:
        copy = client.get("{late}:ledger:l")
        assert isinstance(copy, bytes)
        latest = spend_dollars(store, range(6, 11), before)
        client.set("{late}:ledger:l", copy)
    after = spend_a_dollar(store, 11, latest)
    assert after.epoch == latest.epoch
    assert after.budget is not None
    assert after.budget.spent == 10.0


TO_FIRST_LAYOUT: Final = """
local names, state = cjson.decode(ARGV[1]), cmsgpack.unpack(redis.call('GET', KEYS[1]))
local function pick(map, wanted)
  local picked = {}
  for _, name in ipairs(wanted) do picked[name] = map[name] end
  return picked
end
for name, member in pairs(state.members) do state.members[name] = pick(member, names[2]) end
for name, ended in pairs(state.ended) do state.ended[name] = pick(ended, names[3]) end
state.clock = state.clock - ARGV[2]
redis.call('SET', KEYS[1], cmsgpack.pack(pick(state, names[1])))
"""
LAYOUT_OF: Final = "return cmsgpack.unpack(redis.call('GET', KEYS[1])).layout"


@pytest.mark.parametrize("seconds_away", [0, 8])
def test_a_ledger_of_the_first_layout_goes_on_with_what_was_spent(server: StandaloneRedis, seconds_away: int) -> None:
    name = f"first-layout-{seconds_away}"
    store, key = open_store(server, name), f"{{{name}}}:ledger:l"
    before = spend(store, range(1, 5))
    with redis.Redis.from_url(server.url) as client:
        client.eval(TO_FIRST_LAYOUT, 1, key, json.dumps([LEDGER_FIELDS, MEMBER_FIELDS, ENDED_FIELDS]), seconds_away)
        assert client.eval(LAYOUT_OF, 1, key) is None
        after = spend(store, range(5, 8), before)
        assert client.eval(LAYOUT_OF, 1, key) == LAYOUT
    assert after.budget is not None
    assert after.budget.spent == 6.0


@pytest.mark.parametrize(
    ("ledger", "message"),
    [
        (msgspec.msgpack.encode({"layout": LAYOUT + 1, "terms": {}}), rf"layout {LAYOUT + 1}; this version knows"),
        (b"no ledger", "something else in the place of a ledger"),
    ],
)
def test_a_ledger_that_cannot_be_read_is_left_as_it_is_and_the_error_says_why(
    server: StandaloneRedis, ledger: bytes, message: str
) -> None:
    store = open_store(server, "unreadable")
    with redis.Redis.from_url(server.url) as client:
        client.set("{unreadable}:ledger:l", ledger)
        with pytest.raises(StoreUnavailable, match=message):
            spend(store, range(1, 2))
        assert client.get("{unreadable}:ledger:l") == ledger


def test_the_script_has_the_layout_of_the_ledger_in_python() -> None:
    assert f"local LAYOUT = {LAYOUT} " in SCRIPT
