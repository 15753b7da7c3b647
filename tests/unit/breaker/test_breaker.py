"""The circuit breaker: when it opens, for how long, and what closes it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from forebay import clock
from forebay.breaker import (
    UPSTREAM_RULES,
    WORKER_RULES,
    Breaker,
    BreakerRules,
    BreakerState,
    FaultCountTrigger,
    FaultWindow,
    MinimumSampleTrigger,
    consecutive_faults,
)
from forebay.errors import InvalidSetting
from forebay.interfaces import Outcome

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
SUCCESS, OVERLOAD, FAULT, IGNORED = Outcome.SUCCESS, Outcome.OVERLOAD, Outcome.FAULT, Outcome.IGNORED

#: With `always_longest`, an opening lasts exactly its maximum; the first is 10 s.
RULES = BreakerRules(
    triggers=(consecutive_faults(5),),
    reset_timeout=10.0,
    max_reset_timeout=60.0,
    probes=1,
    successes=2,
    probe_timeout=30.0,
)


def always_longest() -> float:
    return 1.0 - 2**-53


def make(rules: BreakerRules = RULES) -> Breaker:
    return Breaker(rules, draw=always_longest)


def call(breaker: Breaker, now: float, outcome: Outcome) -> BreakerState | None:
    """Make one call that ends at once."""
    epoch = breaker.allow(now)
    assert epoch
    return breaker.record(now, outcome, epoch)


def opened(rules: BreakerRules = RULES, *, now: float = 0.0) -> Breaker:
    breaker = make(rules)
    assert breaker.trip(now) is OPEN
    return breaker


def seconds_left(breaker: Breaker, now: float) -> float:
    remaining = breaker.retry_after(now)
    assert remaining is not None
    return remaining


# --- when it opens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [UPSTREAM_RULES, WORKER_RULES])
def test_five_faults_of_five_open_it_and_not_one_sooner(rules: BreakerRules) -> None:
    breaker = make(rules)
    assert [call(breaker, 0.1 * n, FAULT) for n in range(5)] == [None] * 4 + [OPEN]


@pytest.mark.parametrize("rules", [UPSTREAM_RULES, WORKER_RULES])
@pytest.mark.parametrize("at", range(20))
def test_one_fault_of_twenty_does_not_open_it(rules: BreakerRules, at: int) -> None:
    breaker = make(rules)
    for n in range(20):
        call(breaker, 0.1 * n, FAULT if n == at else SUCCESS)
    assert breaker.state(2.0) is CLOSED


@pytest.mark.parametrize(("calls", "verdict"), [(31, OPEN), (32, None)])
def test_four_faults_open_it_unless_chance_explains_them(calls: int, verdict: BreakerState | None) -> None:
    breaker = make(BreakerRules(triggers=(MinimumSampleTrigger(),)))
    for n in range(calls - 1):
        call(breaker, 0.1 * n, FAULT if n < 3 else SUCCESS)
    assert call(breaker, 5.0, FAULT) is verdict


def test_faults_older_than_the_window_do_not_count() -> None:
    breaker = make(BreakerRules(triggers=(MinimumSampleTrigger(seconds=10),)))
    for _ in range(4):
        call(breaker, 0.9, FAULT)
    assert call(breaker, 10.0, FAULT) is None, "the bucket of second 0 has left"
    for _ in range(3):
        call(breaker, 19.9, FAULT)
    assert call(breaker, 19.9, FAULT) is OPEN, "the bucket of second 10 has not"


def test_four_slow_calls_a_minute_are_enough_to_open_it() -> None:
    breaker = make(UPSTREAM_RULES)
    verdicts = [call(breaker, 14.0 * n, FAULT) for n in range(5)]
    assert verdicts[-1] is OPEN


def test_fifty_faults_among_the_last_thousand_calls_open_it_however_old() -> None:
    breaker = make(BreakerRules(triggers=(FaultCountTrigger(faults=50, calls=1000),)))
    for n in range(49):
        call(breaker, 3600.0 * n, FAULT)
        for _ in range(19):
            call(breaker, 3600.0 * n + 1, SUCCESS)
    assert call(breaker, 3600.0 * 49, FAULT) is OPEN


def test_one_fault_in_twenty_one_calls_never_opens_it() -> None:
    breaker = make(UPSTREAM_RULES)
    for n in range(21_000):
        call(breaker, 0.01 * n, FAULT if n % 21 == 0 else SUCCESS)
    assert breaker.state(210.0) is CLOSED


@pytest.mark.parametrize("share", [0.05, 0.2, 0.3])
def test_faults_of_few_do_not_open_it_for_the_many_that_succeed(share: float) -> None:
    draws = clock.new_random(1)
    breaker = make(UPSTREAM_RULES)
    for n in range(50_000):
        call(breaker, n / 50.0, FAULT if draws.random() < share else SUCCESS)
        assert breaker.state(n / 50.0) is CLOSED


@pytest.mark.parametrize("per_second", [0.1, 1.0, 100.0])
def test_an_outage_opens_it_within_twenty_calls(per_second: float) -> None:
    breaker = make(UPSTREAM_RULES)
    for n in range(6000):
        call(breaker, n / per_second, SUCCESS)
    calls = 6000
    while breaker.ready(calls / per_second):
        call(breaker, calls / per_second, FAULT)
        calls += 1
    assert calls <= 6020


def test_calls_of_others_count() -> None:
    breaker = make(BreakerRules(triggers=(MinimumSampleTrigger(),)))
    call(breaker, 0.0, FAULT)
    assert breaker.add_evidence(1.0, 3, 3) is None
    assert call(breaker, 2.0, FAULT) is OPEN


def test_faults_of_others_open_it() -> None:
    assert make().add_evidence(1.0, 5, 5) is OPEN


def test_faults_of_others_are_spread_among_their_calls() -> None:
    breaker = make()
    assert breaker.add_evidence(1.0, 16, 8) is None
    assert breaker.add_evidence(1.0, 9, 8) is OPEN


def test_successes_of_others_end_a_row_of_faults() -> None:
    breaker = make()
    for _ in range(4):
        call(breaker, 0.0, FAULT)
    breaker.add_evidence(1.0, 100, 0)
    assert call(breaker, 2.0, FAULT) is None


def test_calls_of_others_do_not_count_while_it_is_open() -> None:
    breaker = opened()
    assert breaker.add_evidence(1.0, 9, 9) is None
    assert seconds_left(breaker, 1.0) == pytest.approx(9.0)


def test_a_summary_names_what_differs_from_the_default() -> None:
    assert UPSTREAM_RULES.summary == "BreakerRules()"
    assert BreakerRules(probes=3, reset_timeout=None).summary == "BreakerRules(reset_timeout=None, probes=3)"
    assert (
        BreakerRules(triggers=(consecutive_faults(5),)).summary
        == "BreakerRules(triggers=(FaultCountTrigger(faults=5, calls=5, seconds=0),))"
    )


def test_one_percent_of_faults_on_a_busy_upstream_does_not_open_it() -> None:
    draws = clock.new_random(1)
    breaker = make(UPSTREAM_RULES)
    for n in range(50_000):
        call(breaker, n / 50.0, FAULT if draws.random() < 0.01 else SUCCESS)
    assert breaker.state(1000.0) is CLOSED


@pytest.mark.parametrize("rules", [UPSTREAM_RULES, WORKER_RULES])
@pytest.mark.parametrize("outcome", [OVERLOAD, IGNORED])
def test_neither_overload_nor_cancellation_is_counted(rules: BreakerRules, outcome: Outcome) -> None:
    breaker = make(rules)
    for n in range(2000):
        assert call(breaker, 0.001 * n, outcome) is None
    assert [call(breaker, 2.0, FAULT) for _ in range(5)][-1] is OPEN


def test_a_success_ends_a_run_of_faults() -> None:
    breaker = make()
    for _ in range(3):
        for _ in range(4):
            call(breaker, 0.0, FAULT)
        call(breaker, 0.0, SUCCESS)
    assert breaker.state(0.0) is CLOSED


def test_closing_forgets_earlier_faults() -> None:
    breaker = make(UPSTREAM_RULES)
    for _ in range(5):
        call(breaker, 0.0, FAULT)
    call(breaker, 10.0, SUCCESS)
    assert call(breaker, 10.0, SUCCESS) is CLOSED
    for _ in range(4):
        call(breaker, 10.0, FAULT)
    assert breaker.state(10.0) is CLOSED


def test_tripping_an_open_breaker_changes_nothing() -> None:
    breaker = make()
    assert breaker.trip(1.0) is OPEN
    assert breaker.trip(5.0) is None
    assert seconds_left(breaker, 5.0) == pytest.approx(6.0), "the second trip neither doubled nor restarted the timeout"


def test_tripping_a_half_open_breaker_doubles_the_timeout() -> None:
    breaker = opened()
    assert breaker.state(10.0) is HALF_OPEN
    assert breaker.trip(10.0) is OPEN
    assert seconds_left(breaker, 10.0) == pytest.approx(20.0)


# --- how long it is open ---------------------------------------------------------------------------------------------


def test_an_open_breaker_rejects_and_says_for_how_long() -> None:
    breaker = opened(now=100.0)
    assert breaker.allow(104.0) == 0
    assert not breaker.ready(104.0)
    assert seconds_left(breaker, 104.0) == pytest.approx(6.0)


def test_the_timeout_doubles_up_to_its_maximum_and_closing_resets_it() -> None:
    breaker = opened()
    now = 0.0
    timeouts = []
    for _ in range(5):
        timeouts.append(seconds_left(breaker, now))
        now += timeouts[-1]
        call(breaker, now, FAULT)
    assert timeouts == pytest.approx([10.0, 20.0, 40.0, 60.0, 60.0])

    now += seconds_left(breaker, now)
    call(breaker, now, SUCCESS)
    assert call(breaker, now, SUCCESS) is CLOSED
    breaker.trip(now)
    assert seconds_left(breaker, now) == pytest.approx(10.0)


@pytest.mark.parametrize("opening", [1, 2, 5, 5000])
def test_jitter_draws_from_the_upper_half_of_the_timeout(opening: int) -> None:
    longest = min(60.0, 10.0 * 2.0 ** min(opening - 1, 10))
    assert RULES.open_duration(opening, draw=0.0) == longest / 2
    assert longest / 2 < RULES.open_duration(opening, draw=0.999) < longest


def test_it_draws_once_for_each_opening_and_never_otherwise() -> None:
    drawn = []
    breaker = Breaker(RULES, draw=lambda: drawn.append(1) or 0.5)  # type: ignore[func-returns-value]
    for _ in range(100):
        call(breaker, 0.0, SUCCESS)
    assert len(drawn) == 0
    breaker.trip(0.0)
    assert len(drawn) == 1


def test_without_a_reset_timeout_it_stays_open_until_reset() -> None:
    breaker = opened(BreakerRules(reset_timeout=None))
    assert breaker.state(1e12) is OPEN
    assert breaker.allow(1e12) == 0
    assert breaker.retry_after(1e12) is None
    breaker.reset()
    assert breaker.allow(0.0)
    assert breaker.retry_after(0.0) == 0.0


# --- half-open -------------------------------------------------------------------------------------------------------


def test_after_the_timeout_one_probe_is_let_through_at_a_time() -> None:
    breaker = opened()
    assert breaker.state(10.0) is HALF_OPEN
    assert breaker.allow(10.0)
    assert not breaker.ready(10.0)
    assert breaker.allow(10.0) == 0


def test_two_probes_must_succeed_for_it_to_close() -> None:
    breaker = opened()
    assert call(breaker, 10.0, SUCCESS) is None
    assert call(breaker, 11.0, SUCCESS) is CLOSED
    assert breaker.allow(11.0)
    assert breaker.allow(11.0), "there is no bound any more"


def test_one_faulty_probe_opens_it_again_even_after_a_success() -> None:
    breaker = opened()
    call(breaker, 10.0, SUCCESS)
    assert call(breaker, 11.0, FAULT) is OPEN
    assert seconds_left(breaker, 11.0) == pytest.approx(20.0)


@pytest.mark.parametrize("outcome", [OVERLOAD, IGNORED])
def test_a_cancelled_probe_changes_nothing(outcome: Outcome) -> None:
    breaker = opened()
    for _ in range(10):
        assert call(breaker, 10.0, outcome) is None
    assert breaker.state(10.0) is HALF_OPEN
    call(breaker, 10.0, SUCCESS)
    assert call(breaker, 10.0, SUCCESS) is CLOSED


def test_a_call_rejected_during_a_probe_waits_for_the_probe_timeout() -> None:
    breaker = opened()
    breaker.allow(12.0)
    assert seconds_left(breaker, 20.0) == pytest.approx(22.0)


def test_a_probe_that_hangs_opens_it_again_with_a_doubled_timeout() -> None:
    breaker = opened()
    breaker.allow(12.0)
    assert breaker.state(41.9) is HALF_OPEN
    assert breaker.state(42.0) is OPEN
    assert seconds_left(breaker, 42.0) == pytest.approx(20.0)


def test_a_hanging_probe_times_out_when_it_is_due_not_when_somebody_looks() -> None:
    breaker = opened()
    breaker.allow(12.0)
    assert breaker.state(62.0) is HALF_OPEN, "timed out at 42, open for 20"


def test_half_open_without_a_probe_has_no_timeout() -> None:
    breaker = opened()
    call(breaker, 10.0, SUCCESS)
    assert breaker.state(1e6) is HALF_OPEN
    assert call(breaker, 1e6, SUCCESS) is CLOSED


def test_a_hanging_probe_times_out_though_others_are_cancelled_meanwhile() -> None:
    breaker = opened(BreakerRules(probes=2, probe_timeout=30.0))
    breaker.allow(10.0)
    for second in range(10, 40):
        call(breaker, second, IGNORED)
    assert breaker.state(40.0) is OPEN


def test_the_late_success_of_an_overdue_probe_half_opens_it() -> None:
    breaker = opened()
    slow = breaker.allow(10.0)
    assert breaker.state(40.0) is OPEN
    assert breaker.record(45.0, SUCCESS, slow) is HALF_OPEN
    assert call(breaker, 45.0, SUCCESS) is CLOSED, "the late success counted as the first of two"


def test_a_dependency_slower_than_the_probe_timeout_is_not_rejected_forever() -> None:
    breaker = opened()
    now = 10.0
    for _ in range(4):
        epoch = breaker.allow(now)
        now += 50.0  # probe_timeout is 30
        breaker.record(now, SUCCESS, epoch)
        now += seconds_left(breaker, now)
    assert breaker.state(now) is CLOSED


def test_the_late_fault_of_an_overdue_probe_changes_nothing() -> None:
    breaker = opened()
    slow = breaker.allow(10.0)
    timeout = seconds_left(breaker, 40.0)
    assert breaker.record(41.0, FAULT, slow) is None
    assert seconds_left(breaker, 40.0) == timeout


def test_a_late_success_does_not_count_after_a_fault() -> None:
    breaker = opened()
    slow = breaker.allow(10.0)
    assert breaker.state(40.0) is OPEN
    assert call(breaker, 60.0, FAULT) is OPEN
    assert breaker.record(61.0, SUCCESS, slow) is None
    assert breaker.state(61.0) is OPEN


# --- late calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", list(Outcome))
def test_calls_begun_before_it_opened_do_not_count_as_probes(outcome: Outcome) -> None:
    breaker = make()
    late = [breaker.allow(0.0) for _ in range(10)]
    breaker.trip(0.0)
    probe = breaker.allow(10.0)
    for epoch in late:
        assert breaker.record(10.0, outcome, epoch) is None
    assert breaker.state(10.0) is HALF_OPEN
    assert breaker.allow(10.0) == 0, "the probe is still in flight"
    breaker.record(10.0, SUCCESS, probe)
    assert call(breaker, 10.0, SUCCESS) is CLOSED


def test_calls_begun_before_it_opened_do_not_count_after_it_closed() -> None:
    breaker = make()
    late = [breaker.allow(0.0) for _ in range(10)]
    breaker.trip(0.0)
    call(breaker, 10.0, SUCCESS)
    call(breaker, 10.0, SUCCESS)
    for epoch in late:
        breaker.record(10.0, FAULT, epoch)
    assert breaker.state(10.0) is CLOSED


def test_calls_that_fail_while_it_is_open_do_not_prolong_the_timeout() -> None:
    breaker = make()
    late = [breaker.allow(0.0) for _ in range(10)]
    breaker.trip(0.0)
    for epoch in late:
        breaker.record(5.0, FAULT, epoch)
    assert seconds_left(breaker, 5.0) == pytest.approx(5.0)


def test_a_rejected_call_that_is_recorded_by_mistake_counts_for_nothing() -> None:
    breaker = opened()
    for _ in range(10):
        breaker.record(5.0, FAULT, breaker.allow(5.0))
    assert seconds_left(breaker, 5.0) == pytest.approx(5.0)


def test_epochs_are_never_zero_and_never_repeat() -> None:
    breaker = make()
    epochs = []
    for n in range(5):
        epochs.append(breaker.allow(100.0 * n))
        breaker.trip(100.0 * n)
        epochs.append(breaker.allow(100.0 * n + 60.0))
        breaker.reset()
    assert all(epochs)
    assert all(earlier < later for earlier, later in pairwise(epochs))


def test_without_triggers_no_fault_opens_it() -> None:
    breaker = Breaker(BreakerRules(triggers=()), draw=lambda: 0.5)
    for second in range(2_000):
        breaker.record(second, Outcome.FAULT, breaker.allow(second))
    assert breaker.state(2_000.0) is BreakerState.CLOSED
    assert breaker.trip(2_000.0) is BreakerState.OPEN


def test_a_trigger_that_raises_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        seconds, calls = 0, 0

        def should_open(self, _: FaultWindow) -> bool:
            raise KeyError

    breaker = Breaker(BreakerRules(triggers=(Broken(), consecutive_faults(2))), draw=lambda: 0.5)
    states = [breaker.record(0.0, Outcome.FAULT, breaker.allow(0.0)) for _ in range(2)]
    assert states == [None, BreakerState.OPEN]
    assert "a trigger of a circuit breaker raised KeyError" in caplog.text


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"triggers": consecutive_faults(5)},
        {"triggers": [consecutive_faults(5)]},
        {"triggers": (5,)},
        {"reset_timeout": 0.0},
        {"reset_timeout": -1.0},
        {"reset_timeout": math.inf},
        {"reset_timeout": math.nan},
        {"reset_timeout": 120.0},
        {"max_reset_timeout": math.inf},
        {"max_reset_timeout": math.nan},
        {"probes": 0},
        {"probes": 1.5},
        {"probes": True},
        {"successes": 0},
        {"probe_timeout": 0.0},
        {"probe_timeout": math.nan},
    ],
)
def test_an_invalid_rule_is_reported_by_name(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidSetting, match=next(reversed(settings))) as caught:
        BreakerRules(**settings)  # type: ignore[arg-type]
    assert "BreakerRules" in str(caught.value) or caught.value.__dict__["name"] in settings


@pytest.mark.parametrize("settings", [{"min_calls": 0}, {"min_faults": 0}, {"seconds": 0}, {"share": 1.0}])
def test_an_invalid_trigger_setting_is_reported_by_name(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(settings))):
        MinimumSampleTrigger(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("faults", "calls"), [(0, 5), (6, 5), (1, 0), (2.5, 5)])
def test_a_trigger_cannot_need_more_faults_than_calls(faults: int, calls: int) -> None:
    with pytest.raises(InvalidSetting, match="FaultCountTrigger"):
        FaultCountTrigger(faults=faults, calls=calls)


@pytest.mark.parametrize(
    ("old", "new"), [("cool_off", "reset_timeout"), ("ceiling", "max_reset_timeout"), ("arms", "triggers")]
)
def test_an_old_name_gives_the_new_one(old: str, new: str) -> None:
    with pytest.raises(TypeError, match=f"BreakerRules: {old} is now {new}"):
        BreakerRules(**{old: 30.0})  # type: ignore[arg-type]
