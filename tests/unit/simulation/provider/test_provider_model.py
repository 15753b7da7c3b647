"""The simulated provider as a state machine: it gets the time, and returns events."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.clock import new_random
from forebay.simulation.provider.billing import OTHER_RUNS
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import (
    AccelerationLimit,
    Bursts,
    BusyReason,
    CapacityStep,
    Dialect,
    Faults,
    InvalidProviderConfig,
    Penalty,
    ProviderConfig,
    ReportedLimits,
    SimulatedRateLimit,
    Slowdown,
    TokenPrice,
    Unit,
    Wording,
)
from forebay.simulation.provider.provider_model import ProviderModel
from forebay.simulation.provider.simulated_call import (
    CallAccepted,
    CallCompleted,
    CallCut,
    CallEvent,
    CallRefused,
    FirstToken,
    SimulatedCall,
    TokensProduced,
)


def config(**rest: Any) -> ProviderConfig:
    """Return a provider in which a call of n tokens takes 1 + n / 10 seconds and costs n dollars."""
    settings: dict[str, Any] = {
        "slots": 2,
        "ttft": 1.0,
        "tpot": 0.1,
        "noise": 0.0,
        "prices": {"gpt": TokenPrice(1e6, 1e6)},
    }
    settings |= rest
    return ProviderConfig(**settings)


def call(output_tokens: int = 10, **rest: Any) -> SimulatedCall:
    settings: dict[str, Any] = {"model": "gpt-4o", "input_tokens": 5} | rest
    return SimulatedCall(output_tokens=output_tokens, **settings)


def accept(provider: ProviderModel, now: float, made: SimulatedCall) -> int:
    answer = provider.arrive(now, made)
    assert isinstance(answer, CallAccepted)
    return answer.call_id


def refuse(provider: ProviderModel, now: float, made: SimulatedCall) -> CallRefused:
    answer = provider.arrive(now, made)
    assert isinstance(answer, CallRefused)
    return answer


def to_the_end(provider: ProviderModel) -> list[CallEvent]:
    events = []
    while (due := provider.next_event()) < math.inf:
        events += provider.advance(due)
    return events


def ends(events: list[CallEvent]) -> dict[int, float]:
    return {event.call_id: round(event.at, 6) for event in events if isinstance(event, CallCompleted | CallCut)}


# --- speed ----------------------------------------------------------------------------------------------------------


def test_a_call_that_runs_alone_takes_ttft_and_tpot() -> None:
    provider = ProviderModel(config())
    one = accept(provider, 3.0, call(10))
    events = to_the_end(provider)
    assert [(type(event), event.call_id, round(event.at, 6)) for event in events] == [
        (FirstToken, one, 4.0),
        (CallCompleted, one, 5.0),
    ]


def test_a_stream_has_events_while_tokens_are_produced() -> None:
    provider = ProviderModel(config(tokens_per_event=4))
    accept(provider, 0.0, call(10, stream=True))
    events = to_the_end(provider)
    produced = [
        (round(e.at, 6), e.tokens if isinstance(e, TokensProduced) else 1)
        for e in events
        if not isinstance(e, CallCompleted)
    ]
    assert produced == [(1.0, 1), (1.4, 4), (1.8, 4), (1.9, 1)]
    assert round(events[-1].at, 6) == 2.0


def test_max_tokens_cut_an_answer_short() -> None:
    provider = ProviderModel(config())
    accept(provider, 0.0, call(50, max_tokens=10))
    (*_, end) = to_the_end(provider)
    assert isinstance(end, CallCompleted)
    assert (end.usage.output_tokens, round(end.at, 6)) == (10, 2.0)


def test_more_calls_than_slots_share_the_speed() -> None:
    provider = ProviderModel(config(slots=2))
    calls = [accept(provider, 0.0, call(10)) for _ in range(4)]
    assert ends(to_the_end(provider)) == dict.fromkeys(calls, 4.0)


def test_a_hung_up_call_frees_its_slot_at_once() -> None:
    provider = ProviderModel(config(slots=1))
    gone, stays = (accept(provider, 0.0, call(10)) for _ in range(2))
    usage = provider.hang_up(3.0, gone)  # 1.5 s of work: 6 tokens
    assert usage is not None
    assert usage.output_tokens == 6
    assert ends(to_the_end(provider)) == {stays: 3.5}
    assert provider.hang_up(3.5, gone) is None


def test_finish_abandoned_keeps_the_slot_and_bills_the_whole_call() -> None:
    provider = ProviderModel(config(slots=1, finish_abandoned=True))
    gone, stays = (accept(provider, 0.0, call(10)) for _ in range(2))
    provider.hang_up(3.0, gone)
    assert provider.statistics().abandoned == 1
    assert ends(to_the_end(provider)) == {stays: 4.0}
    assert provider.statistics().wasted_output_tokens == 10


def test_capacity_steps_change_the_speed_of_calls_in_flight() -> None:
    provider = ProviderModel(
        config(slots=2, capacity_steps=(CapacityStep(at=1.0, slots=1), CapacityStep(at=5.0, slots=2)))
    )
    calls = [accept(provider, 0.0, call(40)) for _ in range(2)]  # 5 s each: 1 s done, 2 s at half speed, 2 s more
    assert ends(to_the_end(provider)) == dict.fromkeys(calls, 7.0)


def test_an_outage_refuses_calls_and_pauses_those_in_flight() -> None:
    provider = ProviderModel(config(capacity_steps=(CapacityStep(at=1.5, slots=0), CapacityStep(at=100.0, slots=2))))
    one = accept(provider, 0.0, call(10))
    assert refuse(provider, 50.0, call()).reason is RefusalReason.OVERLOADED
    assert ends(to_the_end(provider)) == {one: 100.5}


def test_an_outage_with_cut_ends_all_calls() -> None:
    provider = ProviderModel(config(capacity_steps=(CapacityStep(at=1.55, slots=0, cut=True),)))
    one = accept(provider, 0.0, call(10))
    events = to_the_end(provider)
    assert isinstance(events[-1], CallCut)
    assert (events[-1].call_id, events[-1].at, events[-1].usage.output_tokens) == (one, 1.55, 6)


def test_a_slowdown_delays_calls_at_any_load() -> None:
    provider = ProviderModel(config(slowdowns=(Slowdown(at=0.0, seconds=100.0, factor=2.0),)))
    one = accept(provider, 0.0, call(10))
    assert ends(to_the_end(provider)) == {one: 4.0}


def test_noise_keeps_the_mean() -> None:
    provider = ProviderModel(config(slots=10_000, noise=0.5), seed=3)
    for _ in range(4000):
        accept(provider, 0.0, call(10))
    times = list(ends(to_the_end(provider)).values())
    assert sum(times) / len(times) == pytest.approx(2.0, rel=0.03)
    assert len(set(times)) > 3000


# --- refusals -------------------------------------------------------------------------------------------------------


def test_overcommit_bounds_the_calls_in_flight() -> None:
    provider = ProviderModel(config(slots=2, overcommit=1.5))
    for _ in range(3):
        accept(provider, 0.0, call())
    refused = refuse(provider, 0.0, call())
    assert (refused.status, refused.reason) == (503, RefusalReason.OVERLOADED)
    assert provider.statistics().peak_in_flight == 3


def test_a_concurrency_limit_answers_429() -> None:
    provider = ProviderModel(config(slots=1, overcommit=1.0, busy_reason=BusyReason.CONCURRENCY))
    accept(provider, 0.0, call())
    assert (refuse(provider, 0.0, call()).status, provider.in_flight) == (429, 1)


def test_a_call_goes_to_a_random_replica_and_is_refused_if_that_one_is_full() -> None:
    provider = ProviderModel(config(slots=100, overcommit=1.0, replicas=100))
    answers = [provider.arrive(0.0, call()) for _ in range(100)]
    accepted = sum(isinstance(answer, CallAccepted) for answer in answers)
    assert 50 <= accepted <= 76  # 100 * (1 - (99 / 100) ** 100) = 63
    to_the_end(provider)
    accept(provider, 1000.0, call())


def test_the_tokens_in_flight_are_bounded() -> None:
    provider = ProviderModel(config(slots=100, tokens_in_flight=100))
    long = accept(provider, 0.0, SimulatedCall(model="gpt-4o", input_tokens=10, output_tokens=80))
    assert refuse(provider, 0.0, SimulatedCall(model="gpt-4o", input_tokens=5, output_tokens=6)).status == 503
    accept(provider, 0.0, SimulatedCall(model="gpt-4o", input_tokens=5, output_tokens=5))
    provider.hang_up(0.0, long)
    accept(provider, 0.0, SimulatedCall(model="gpt-4o", input_tokens=10, output_tokens=80))


def test_without_stalls_a_fall_of_capacity_leaves_calls_in_flight_their_speed() -> None:
    fall = (CapacityStep(at=1.0, slots=1),)
    provider = ProviderModel(config(slots=2, overcommit=1.0, stalls=False, capacity_steps=fall))
    calls = [accept(provider, 0.0, call(10)) for _ in range(2)]
    refuse(provider, 1.5, call())
    assert ends(to_the_end(provider)) == dict.fromkeys(calls, 2.0)


def test_a_call_succeeds_exactly_after_retry_after() -> None:
    provider = ProviderModel(ProviderConfig.openai(rpm=60, slots=1000))
    for _ in range(60):
        accept(provider, 0.0, call())
    refused = refuse(provider, 0.0, call())
    assert refused.status == 429
    assert refused.retry_after == pytest.approx(1.0)
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "1000")
    accept(provider, 1.0, call())
    assert provider.statistics().by_reason == {"requests": 1}


def test_openai_charges_the_larger_of_max_tokens_and_input_on_arrival() -> None:
    provider = ProviderModel(ProviderConfig.openai(tpm=1000, slots=1000))
    accept(provider, 0.0, call(max_tokens=600))
    accept(provider, 0.0, call(input_tokens=400, max_tokens=1))
    assert refuse(provider, 0.0, call()).reason is RefusalReason.TOKENS


def test_a_call_larger_than_the_bucket_is_always_refused() -> None:
    provider = ProviderModel(ProviderConfig.openai(tpm=1000))
    refused = refuse(provider, 0.0, call(input_tokens=1001))
    assert (refused.status, refused.reason, refused.retry_after) == (429, RefusalReason.TOO_LARGE, None)
    assert "retry-after" not in refused.headers


def test_anthropic_charges_output_while_it_is_produced() -> None:
    provider = ProviderModel(ProviderConfig.anthropic(otpm=60, slots=10, ttft=1.0, tpot=0.1, noise=0.0))
    for _ in range(2):
        accept(provider, 0.0, call(100, model="claude-sonnet-5", max_tokens=4000))
    answer = provider.arrive(1.0, call(1, model="claude-sonnet-5"))  # a token each: 58 left, max_tokens does not count
    assert isinstance(answer, CallAccepted)
    assert answer.headers["anthropic-ratelimit-output-tokens-remaining"] == "58"
    provider.advance(11.0)  # 201 produced, 10 refilled
    refused = refuse(provider, 11.0, call(1, model="claude-sonnet-5"))
    assert refused.reason is RefusalReason.OUTPUT_TOKENS
    assert refused.retry_after == pytest.approx(131.0, abs=1.0)


def test_usage_that_grows_too_fast_is_refused_until_the_next_minute() -> None:
    growth = AccelerationLimit(unit=Unit.REQUESTS, start=2, growth=1)
    provider = ProviderModel(ProviderConfig.anthropic(slots=100, acceleration=growth))
    outcomes = [provider.arrive(at, call(model="claude-sonnet-5")) for at in (0.0, 1.0, 2.0, 60.0, 61.0, 62.0, 63.0)]
    assert [isinstance(outcome, CallAccepted) for outcome in outcomes] == [True, True, False, True, True, True, False]
    refused = outcomes[2]
    assert isinstance(refused, CallRefused)
    assert (refused.status, refused.headers["retry-after"]) == (429, "58")
    message = json.loads(refused.body)["error"]["message"]
    assert "maximum usage increase rate" in message


@pytest.mark.parametrize(
    ("dialect", "status", "kind"),
    [(Dialect.OPENAI, 429, "insufficient_quota"), (Dialect.ANTHROPIC, 402, "billing_error")],
)
def test_a_reached_spend_cap_refuses_all_calls(dialect: Dialect, status: int, kind: str) -> None:
    provider = ProviderModel(config(dialect=dialect, spend_cap=20.0))
    accept(provider, 0.0, call(10))
    accept(provider, 0.0, call(10))
    to_the_end(provider)
    refused = refuse(provider, 10.0, call())
    assert (refused.status, json.loads(refused.body)["error"]["type"]) == (status, kind)


def test_keys_and_models_have_separate_limits_if_configured() -> None:
    allowance = (SimulatedRateLimit(unit=Unit.REQUESTS, amount=1),)
    prices = {"gpt": TokenPrice(1, 1), "gpt-4o-mini": TokenPrice(1, 1)}
    provider = ProviderModel(config(slots=99, rate_limits=allowance, by_key=True, by_model=True, prices=prices))
    for key in ("a", "b"):
        for model in ("gpt-4o", "gpt-4o-mini-2024"):
            accept(provider, 0.0, call(key=key, model=model))
    assert refuse(provider, 0.0, call(key="a", model="gpt-4.1")).reason is RefusalReason.REQUESTS


def test_an_unknown_model_is_not_found() -> None:
    assert refuse(ProviderModel(config()), 0.0, call(model="llama")).status == 404


def test_refusals_count_as_requests_only_if_configured() -> None:
    lenient, strict = (
        ProviderModel(
            config(slots=0, rate_limits=(SimulatedRateLimit(unit=Unit.REQUESTS, amount=10),), count_refusals=strict)
        )
        for strict in (False, True)
    )
    for provider, remaining in ((lenient, 10), (strict, 7)):
        for _ in range(3):
            refuse(provider, 0.0, call())
        provider._slots = 1
        answer = provider.arrive(0.0, call())
        assert answer.headers["x-ratelimit-remaining-requests"] == str(remaining - 1)


# --- faults ---------------------------------------------------------------------------------------------------------


def test_faults_have_their_configured_frequency() -> None:
    faults = Faults(stray=0.1, error=0.05, bad_gateway=0.05, unavailable=0.05, cut=0.1, late_error=0.1)
    provider = ProviderModel(config(slots=100_000, faults=faults, max_in_flight=10**6), seed=1)
    for _ in range(10_000):
        provider.arrive(0.0, call(10))
    events = to_the_end(provider)
    statistics = provider.statistics()
    shares = {reason: count / 10_000 for reason, count in statistics.by_reason.items()}
    assert shares == pytest.approx({"stray": 0.1, "error": 0.05, "bad_gateway": 0.05, "unavailable": 0.05}, abs=0.01)
    cuts = [event for event in events if isinstance(event, CallCut)]
    assert len(cuts) == statistics.cut == pytest.approx(1500, abs=150)
    assert sum(cut.reported for cut in cuts) == pytest.approx(750, abs=100)
    assert all(1 <= cut.usage.output_tokens < 10 for cut in cuts)


def test_a_burst_refuses_its_share_of_the_calls() -> None:
    bursts = Bursts(every=60.0, seconds=5.0, share=0.5, regular=True)
    provider = ProviderModel(config(slots=10**6, max_in_flight=10**6, faults=Faults(bursts=bursts)), seed=2)
    refused = {
        at: sum(isinstance(provider.arrive(float(at), call()), CallRefused) for _ in range(400)) / 400
        for at in (59, 61, 66, 121, 126)
    }
    assert refused == pytest.approx({59: 0, 61: 0.5, 66: 0, 121: 0.5, 126: 0}, abs=0.1)


def test_bursts_have_their_configured_mean_interval() -> None:
    bursts = Bursts(every=60.0, seconds=6.0)
    provider = ProviderModel(config(faults=Faults(bursts=bursts)), seed=5)
    inside = [provider._fault_plan.draw(float(at)).refusal is not None for at in range(200_000)]
    assert sum(inside) / len(inside) == pytest.approx(0.1, rel=0.1)


def test_the_same_seed_gives_the_same_run() -> None:
    def history(seed: int) -> list[object]:
        faults = Faults(stray=0.1, cut=0.1, straggler=0.1, bursts=Bursts(every=20.0, seconds=2.0))
        provider = ProviderModel(config(noise=0.3, overcommit=2.0, faults=faults), seed=seed)
        events: list[object] = []
        for n in range(300):
            events += [provider.arrive(n / 4, call(n % 40)), *provider.advance(n / 4)]
        return [*events, *to_the_end(provider), provider.statistics()]

    assert history(7) == history(7)
    assert history(7) != history(8)


# --- billing --------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), slots=st.integers(1, 5), finish_abandoned=st.booleans(), stream=st.booleans())
def test_every_call_ends_once_and_every_token_is_billed_once(
    *, seed: int, slots: int, finish_abandoned: bool, stream: bool
) -> None:
    rng = new_random(seed)
    faults = Faults(stray=0.05, cut=0.1, late_error=0.1, straggler=0.05)
    settings = config(
        slots=slots,
        overcommit=3.0,
        noise=0.2,
        faults=faults,
        finish_abandoned=finish_abandoned,
        tokens_per_event=3,
        capacity_steps=(CapacityStep(at=8.0, slots=0), CapacityStep(at=12.0, slots=slots, cut=True)),
    )
    provider = ProviderModel(settings, seed=seed)
    now, delivered = 0.0, 0
    open_calls: dict[int, SimulatedCall] = {}
    streamed: dict[int, int] = {}
    events: list[CallEvent] = []
    for _ in range(80):
        now += rng.expovariate(4.0)
        made = call(rng.randrange(0, 60), stream=stream, run=rng.choice(["a", "b", None]))
        answer = provider.arrive(now, made)
        if isinstance(answer, CallAccepted):
            open_calls[answer.call_id] = made
        if open_calls and rng.random() < 0.1:
            leaver = rng.choice([*open_calls])
            if provider.hang_up(now, leaver) is not None:
                del open_calls[leaver]
        assert provider.in_flight <= 3 * slots
        events += provider.advance(now)
    events += to_the_end(provider)
    for event in events:
        if isinstance(event, FirstToken | TokensProduced):
            streamed[event.call_id] = streamed.get(event.call_id, 0) + getattr(event, "tokens", 1)
        elif isinstance(event, CallCompleted):
            assert event.usage.output_tokens == open_calls[event.call_id].length
            assert not stream or streamed[event.call_id] == event.usage.output_tokens
            delivered += event.usage.output_tokens
    books, bills = provider.statistics(), provider.bills()
    assert provider.in_flight == 0
    assert books.calls == 80 == books.refused + books.finished + books.cut + books.hung_up
    assert sum(books.by_reason.values()) == books.refused
    assert sum(books.by_status.values()) == books.calls
    assert books.output_tokens == delivered + books.wasted_output_tokens
    assert books.usd == pytest.approx(books.input_tokens + books.output_tokens)
    assert sum(bill.output_tokens for bill in bills.values()) <= books.output_tokens


@given(seed=st.integers(0, 2**32), slots=st.integers(1, 4))
def test_work_never_exceeds_the_slots_and_is_conserved(seed: int, slots: int) -> None:
    rng = new_random(seed)
    provider = ProviderModel(config(slots=slots))
    now, work = 0.0, 0.0
    for _ in range(40):
        before = provider.statistics().busy_slot_seconds
        step = rng.expovariate(2.0)
        now += step
        made = call(rng.randrange(1, 30))
        accept(provider, now, made)
        work += 1.0 + made.length * 0.1
        assert provider.statistics().busy_slot_seconds - before <= slots * step + 1e-9
    to_the_end(provider)
    assert provider.statistics().busy_slot_seconds == pytest.approx(work)


def test_tokens_are_billed_to_their_run() -> None:
    provider = ProviderModel(config(slots=10, max_runs=2))
    for run, output in (("a", 10), ("a", 5), ("b", 7), ("c", 3), ("d", 4), (None, 9)):
        accept(provider, 0.0, call(output, run=run))
    to_the_end(provider)
    assert {run: bill.output_tokens for run, bill in provider.bills().items()} == {"a": 15, "b": 7, OTHER_RUNS: 7}
    assert provider.statistics().output_tokens == 38


def test_the_longest_matching_prefix_decides_the_price() -> None:
    provider = ProviderModel(ProviderConfig(slots=10))
    accept(provider, 0.0, call(1_000_000, model="gpt-4o-mini-2024-07-18", input_tokens=1_000_000))
    to_the_end(provider)
    assert provider.statistics().usd == pytest.approx(0.75)


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": -1},
        {"ttft": 0.0},
        {"tpot": math.inf},
        {"noise": -0.1},
        {"overcommit": 0.5},
        {"replicas": 0},
        {"replicas": 2},
        {"tokens_in_flight": 0},
        {"prices": {}},
        {"capacity_steps": (CapacityStep(at=2.0, slots=1), CapacityStep(at=1.0, slots=1))},
        {"tokens_per_event": 0},
    ],
    ids=lambda wrong: "{}={}".format(*next(iter(wrong.items()))),
)
def test_an_invalid_field_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidProviderConfig, match=next(iter(wrong))):
        config(**wrong)


def test_a_configuration_round_trips_as_json() -> None:
    there = ProviderConfig.anthropic(
        rpm=50,
        otpm=8000,
        acceleration=AccelerationLimit(start=1000, growth=100),
        faults=Faults(cut=0.1, bursts=Bursts(every=60, seconds=5)),
        capacity_steps=(CapacityStep(at=60, slots=0),),
        prices={"claude": TokenPrice(3, 15)},
    )
    assert ProviderConfig.from_json(there.to_json()) == there


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"slotz": 3}', "slotz"),
        ('{"faults": {"cuts": 0.1}}', "cuts"),
        ('{"rate_limits": [{"unit": "requests", "amount": 1, "pre": 60}]}', "pre"),
        ('{"slots": -3}', "slots"),
        ('{"slots": "many"}', "slots"),
        ("nothing", "JSON"),
    ],
)
def test_an_unknown_name_or_invalid_value_in_json_is_named(text: str, named: str) -> None:
    with pytest.raises(InvalidProviderConfig, match=named):
        ProviderConfig.from_json(text)


# --- answers that depart from the truth, and penalties ---


RATE_OF_ONE = (SimulatedRateLimit(unit=Unit.REQUESTS, amount=1),)


def test_a_refusal_says_what_the_configuration_reports() -> None:
    reports = ReportedLimits(wording=Wording.CONCURRENCY, retry_after="3600", rate_limit_headers=False)
    provider = ProviderModel(config(rate_limits=RATE_OF_ONE, reports=reports))
    accept(provider, 0.0, call())
    refusal = refuse(provider, 1.0, call())
    assert refusal.headers["retry-after"] == "3600"
    assert "retry-after-ms" not in refusal.headers
    assert not any("ratelimit" in name for name in refusal.headers)
    assert b"in flight" in refusal.body


def test_a_remaining_amount_may_be_reported_wrongly() -> None:
    limits = (SimulatedRateLimit(unit=Unit.REQUESTS, amount=9),)
    provider = ProviderModel(config(rate_limits=limits, reports=ReportedLimits(remaining=0)))
    answer = provider.arrive(0.0, call())
    assert isinstance(answer, CallAccepted)
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert answer.headers["x-ratelimit-limit-requests"] == "9"


@pytest.mark.parametrize(("extended", "second"), [(False, RefusalReason.CONCURRENCY), (True, RefusalReason.PENALTY)])
def test_a_penalty_refuses_every_call_for_its_time(extended: bool, second: RefusalReason) -> None:  # noqa: FBT001
    penalty = Penalty(seconds=10, extended=extended)
    provider = ProviderModel(config(overcommit=1.0, busy_reason=BusyReason.CONCURRENCY, penalty=penalty))
    long = [accept(provider, 0.0, call(1000)) for _ in range(2)]
    assert refuse(provider, 1.0, call()).reason is RefusalReason.CONCURRENCY
    provider.hang_up(1.0, long[0])
    in_penalty = refuse(provider, 5.0, call())
    assert (in_penalty.status, in_penalty.reason) == (429, RefusalReason.PENALTY)
    accept(provider, 16.0, call(1000))
    assert refuse(provider, 16.0, call()).reason is RefusalReason.CONCURRENCY
    refuse(provider, 20.0, call())
    assert refuse(provider, 27.0, call()).reason is second


def test_a_rate_limit_may_hold_for_a_time() -> None:
    limits = (
        SimulatedRateLimit(unit=Unit.REQUESTS, amount=3, until=30.0),
        SimulatedRateLimit(unit=Unit.REQUESTS, amount=1, since=30.0),
    )
    provider = ProviderModel(config(slots=10, rate_limits=limits))
    for _ in range(3):
        accept(provider, 0.0, call())
    accept(provider, 30.0, call())
    assert refuse(provider, 31.0, call()).reason is RefusalReason.REQUESTS
    with pytest.raises(InvalidProviderConfig, match="until"):
        SimulatedRateLimit(unit=Unit.REQUESTS, amount=1, since=9.0, until=9.0)
