"""The trial of a refusal: what becomes of the calls sent right after it."""

from __future__ import annotations

from forebay.upstream.accounts.refusals.refusal_trial import RefusalTrial, TrialVerdict


def begun(rate: float = 4.0, *, sent: int = 0) -> RefusalTrial:
    """Return the trial of a call sent at second 1 and refused at 1.1, and `sent` calls that were sent in between."""
    trial = RefusalTrial()
    for _ in range(10):
        trial.record_sent(0.5)
    trial.record_sent(1.0)
    for _ in range(sent):
        trial.record_sent(1.05)
    trial.begin(1.1, 1.0, rate)
    return trial


def test_calls_go_right_after_a_refusal_until_either_verdict_is_certain() -> None:
    trial, sent = begun(), 0
    while trial.wants_call(1.1):
        trial.record_sent(1.1)
        sent += 1
    assert sent == 7, "one may be accepted under a rate of four a second, and six must be refused"


def test_calls_that_were_on_their_way_are_calls_of_the_trial() -> None:
    assert begun(sent=6).wants_call(1.1)
    assert not begun(sent=7).wants_call(1.1)


def test_calls_that_are_refused_too_show_a_limit() -> None:
    trial = begun(sent=6)
    for _ in range(5):
        assert trial.record_refused(1.05) is None
    assert trial.record_refused(1.05) is TrialVerdict.LIMIT
    assert not trial.is_open(1.2)


def test_more_accepted_calls_than_a_rate_lets_through_show_chance() -> None:
    trial = begun(sent=6)
    assert trial.record_accepted(1.05) is None
    assert trial.record_refused(1.05) is None
    assert trial.record_accepted(1.05) is TrialVerdict.CHANCE
    assert not trial.is_open(1.2)


def test_a_high_rate_lets_several_calls_through_in_the_meantime() -> None:
    trial = begun(rate=40.0, sent=8)
    verdicts = [trial.record_accepted(1.09) for _ in range(6)]
    assert verdicts == [None] * 5 + [TrialVerdict.CHANCE]


def test_as_many_calls_must_be_refused_as_were_accepted_to_show_a_limit() -> None:
    trial = begun(rate=1000.0, sent=20)
    verdicts = [trial.record_refused(1.05) for _ in range(10)]
    assert verdicts == [None] * 9 + [TrialVerdict.LIMIT]


def test_calls_sent_before_the_refused_one_or_long_after_it_say_nothing() -> None:
    trial = begun()
    for sent_at in (0.5, 1.0, 2.0, 3.0):
        for _ in range(10):
            assert trial.record_accepted(sent_at) is None
            assert trial.record_refused(sent_at) is None


def test_a_trial_whose_calls_do_not_come_lapses() -> None:
    trial = begun()
    assert trial.is_open(3.0)
    assert not trial.wants_call(2.0)
    assert not trial.is_open(3.2)
