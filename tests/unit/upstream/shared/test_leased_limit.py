"""A limit that a process learns together with others: what it reports, and what it takes over."""

from __future__ import annotations

from forebay.interfaces import Outcome
from forebay.limit import AdaptiveLimit, AimdLimit, AnswerCounts, Grant
from forebay.upstream.shared.leases.leased_limit import LeasedLimit
from forebay.upstream.shared.ledger.messages import LimitReply, LimitRequest


def leased(others: int = 0, *, initial_limit: int = 10) -> LeasedLimit:
    """Return a limit that has had the first reply of its ledger."""
    limit = LeasedLimit(AimdLimit(initial_limit=initial_limit), lambda *_: others)
    limit.receive(0.0, limit.report(0.0), LimitReply(epoch=0, level=10.0))
    return limit


def end_call(limit: LeasedLimit, outcome: Outcome, in_flight: int = 10) -> None:
    limit.observe(1.0, limit.grant(0.0, in_flight), outcome)


def test_a_call_is_granted_with_the_calls_in_flight_of_all_processes() -> None:
    assert leased(others=4).grant(0.0, 3).in_flight == 7


def test_a_call_is_never_taken_to_be_above_the_limit_because_of_calls_that_others_may_have_ended() -> None:
    assert leased(others=9).grant(0.0, 3) == Grant(0.0, 10, at_limit=True)


def test_rises_are_reported_once() -> None:
    limit = leased()
    end_call(limit, Outcome.SUCCESS)
    assert limit.report(1.0).raised == 1.0
    assert limit.report(1.0).raised == 0.0


def test_a_cut_is_reported_without_the_rises_before_it() -> None:
    limit = leased()
    end_call(limit, Outcome.SUCCESS)
    end_call(limit, Outcome.OVERLOAD, in_flight=11)
    assert limit.report(1.0) == LimitRequest(epoch=0, level=9.35, most=10_000.0, cut=9.35)


def test_rises_since_the_request_are_kept_when_its_reply_comes() -> None:
    limit = leased()
    request = limit.report(1.0)
    end_call(limit, Outcome.SUCCESS)
    limit.receive(1.0, request, LimitReply(epoch=0, level=15.0))
    assert limit.limit(1.0) == 16
    assert limit.report(1.0).raised == 1.0


def test_a_cut_of_another_process_comes_before_an_own_one_of_the_same_epoch() -> None:
    limit = leased()
    request = limit.report(1.0)
    end_call(limit, Outcome.OVERLOAD)
    limit.receive(1.0, request, LimitReply(epoch=1, level=7.0))
    assert limit.limit(1.0) == 7
    assert limit.report(1.0).cut is None


def test_calls_that_were_sent_before_a_cut_of_another_process_do_not_cut_again() -> None:
    limit = leased()
    grant = limit.grant(0.0, 10)
    limit.receive(1.0, limit.report(1.0), LimitReply(epoch=1, level=7.0))
    limit.observe(1.0, grant, Outcome.OVERLOAD)
    assert limit.report(1.0).cut is None


def test_processes_that_have_learned_apart_report_their_part_of_the_rises() -> None:
    limit = leased()
    end_call(limit, Outcome.SUCCESS)
    assert limit.report(1.0, members=4).raised == 0.25


def adaptive() -> LeasedLimit:
    """Return an adaptive limit of 10, for which three refusals are no reason to fall."""
    limit = LeasedLimit(AdaptiveLimit(), lambda *_: 0)
    limit.receive(0.0, limit.report(0.0), LimitReply(epoch=0, level=10.0))
    for _ in range(3):
        end_call(limit, Outcome.OVERLOAD)
    assert limit.limit(1.0) == 10
    return limit


def test_refusals_of_all_processes_are_weighed_together() -> None:
    limit = adaptive()
    request = limit.report(1.0)
    assert request.answers == AnswerCounts(refused=3)
    limit.receive(1.0, request, LimitReply(epoch=0, level=10.0, answers=AnswerCounts(refused=6)))
    end_call(limit, Outcome.OVERLOAD)
    assert limit.limit(1.0) < 10


def test_own_refusals_count_once() -> None:
    limit = adaptive()
    for _ in range(2):
        limit.receive(1.0, limit.report(1.0), LimitReply(epoch=0, level=10.0, answers=AnswerCounts(refused=3)))
    end_call(limit, Outcome.OVERLOAD)
    assert limit.limit(1.0) == 10


def test_refusals_before_a_cut_do_not_count_after_it() -> None:
    limit = adaptive()
    limit.receive(1.0, limit.report(1.0), LimitReply(epoch=1, level=9.0, answers=AnswerCounts(accepted=1)))
    assert limit.report(1.0).answers == AnswerCounts()


def test_a_refusal_is_news_until_it_is_reported() -> None:
    limit = adaptive()
    assert limit.has_refusals
    limit.report(1.0)
    assert not limit.has_refusals


def test_rises_back_to_the_best_level_of_late_are_reported_apart() -> None:
    limit = LeasedLimit(AdaptiveLimit(), lambda *_: 0)
    limit.receive(0.0, limit.report(0.0), LimitReply(epoch=1, level=10.0))  # the best one now
    limit.receive(0.0, limit.report(0.0), LimitReply(epoch=2, level=8.5))
    limit.observe(5.0, limit.grant(4.0, 8), Outcome.SUCCESS)
    request = limit.report(5.0)
    assert (request.raised, request.returned, request.returns_to) == (0.0, 1.0, 10.0)


def test_a_silence_after_a_lone_refusal_is_reported_once() -> None:
    limit = LeasedLimit(AdaptiveLimit(initial_limit=1), lambda *_: 0)
    limit.receive(0.0, limit.report(0.0), LimitReply(epoch=0, level=1.0))
    limit.observe(0.1, limit.grant(0.0, 1), Outcome.OVERLOAD)
    assert limit.report(0.1).silence == 1.0
    assert limit.report(0.1).silence == 0.0
