"""Bugs of the call plane to be planted, each beside the test that catches it: see `plants`."""

from __future__ import annotations

from tests.mutants.plants import Mutant

_ACCEPTANCE, _UNIT = "tests/acceptance/", "tests/unit/"
_DECISIONS = _UNIT + "upstream/test_decisions.py::"
_RETRIES = _ACCEPTANCE + "test_upstream_retries.py::"
_CALLS = _ACCEPTANCE + "test_call_conservation.py::"

MUTANTS = [
    # --- what a call holds ---
    Mutant(
        "a permit that comes in the moment in which its caller is cancelled leaks",
        "upstream/desk.py",
        "if isinstance(given := waiting.waiter.given, Go):  # in the very moment",
        "if False:  # in the very moment",
        _ACCEPTANCE + "test_upstream.py::test_cancelled_anywhere_a_call_leaves_nothing_behind",
    ),
    Mutant(
        "who is cancelled in the line keeps its place",
        "upstream/desk.py",
        "            self.account.leave(waiting)\n            if",
        "            if",
        _CALLS + "test_a_call_that_is_cancelled_at_any_step_leaves_nothing",
    ),
    Mutant(
        "a permit for a caller whose loop has closed is kept",
        "upstream/account.py",
        "            self.never_sent(now, permit)\n\n    def _promote",
        "            pass\n\n    def _promote",
        _DECISIONS + "test_a_caller_whose_loop_has_closed_does_not_keep_what_it_was_given",
    ),
    Mutant(
        "an attempt that is cancelled keeps its permit",
        "upstream/drive.py",
        "                    given = await attempt(step.permit)\n                except BaseException:",
        "                    given = await attempt(step.permit)\n                except Exception:",
        _CALLS + "test_whatever_calls_do_and_whoever_leaves_everything_comes_back",
    ),
    Mutant(
        "what was refused and is tried again has used its quota",
        "upstream/attempt.py",
        "msgspec.structs.replace(tried.ended, final=False)",
        "msgspec.structs.replace(tried.ended, final=False, released=False, rate=False)",
        _RETRIES + "test_an_attempt_that_was_refused_for_its_rate_has_taken_nothing_of_the_quota",
    ),
    Mutant(
        "a reservation is kept after a failure",
        "upstream/account.py",
        "        for held in permit.sums:\n",
        "        for held in permit.sums if ended.outcome is not Outcome.FAULT else ():\n",
        _DECISIONS + "test_what_failed_midway_costs_what_was_reserved",
    ),
    Mutant(
        "settling forgets what a call cost more",
        "upstream/account.py",
        "held.settle(ask.usd if ended.usd is None else ended.usd)",
        "held.settle(ask.usd if ended.usd is None else min(ask.usd, ended.usd))",
        _DECISIONS + "test_a_call_that_cost_more_than_was_thought_costs_that",
    ),
    Mutant(
        "what others have reserved may be spent again",
        "quota/budget.py",
        "left = self.budget.usd * share - page.spent - page.reserved",
        "left = self.budget.usd * share - page.spent",
        _DECISIONS + "test_what_is_reserved_is_no_longer_there_for_others",
    ),
    Mutant(
        "a cost that is none is found out when the permit is closed",
        "upstream/call.py",
        "cost = None if usd is None else check_dollars(usd)",
        "cost = usd",
        _RETRIES + "test_a_cost_that_is_none_is_refused_where_it_is_said_and_nothing_stays_reserved",
    ),
    Mutant(
        "a call is entered twice at the same moment",
        "upstream/call.py",
        "        self._entered = True  # at once",
        "        self._entered = self._permit is not None  # at once",
        _RETRIES + "test_a_call_that_two_enter_at_the_same_moment_is_entered_once",
    ),
    Mutant(
        "a probe that is cancelled is not returned",
        "upstream/account.py",
        "        if self.breaker.record(now, judged, permit.era) is not None:",
        "        if judged is not Outcome.IGNORED and self.breaker.record(now, judged, permit.era) is not None:",
        _DECISIONS + "test_a_probe_that_is_cancelled_is_given_back",
    ),
    # --- who goes, and when ---
    Mutant(
        "a call takes the slot that is not there",
        "upstream/account.py",
        "return self.in_flight < self.limit.limit(now)",
        "return self.in_flight <= self.limit.limit(now)",
        _ACCEPTANCE + "test_upstream.py::test_no_more_calls_are_in_flight_than_may_be",
    ),
    Mutant(
        "calls of all rungs wait in one row",
        "upstream/account.py",
        "waiting.place = self.line.join(waiting, waiting.rung,",
        "waiting.place = self.line.join(waiting, Priority.NORMAL,",
        _ACCEPTANCE + "test_upstream.py::test_calls_wait_by_priority_and_on_a_rung_in_the_order_they_came",
    ),
    Mutant(
        "a call that comes passes those who wait",
        "upstream/account.py",
        "if not self.line and self._room(now)",
        "if self._room(now)",
        _DECISIONS + "test_a_small_call_does_not_pass_those_who_wait_for_tokens",
    ),
    Mutant(
        "a LOW call starves",
        "upstream/account.py",
        "if place is not None and now - place[2].since > patience:",
        "if place is not None and now - place[2].since > 1e9:",
        _DECISIONS + "test_who_has_waited_four_times_as_long_as_is_typical_goes_one_rung_up",
    ),
    Mutant(
        "a retried call goes behind later ones",
        "upstream/order.py",
        "        if ask.retries:\n            return (_HEAD, ask.deadline)\n",
        "",
        _RETRIES + "test_a_call_that_is_tried_again_goes_before_those_that_came_later",
    ),
    Mutant(
        "a run's later calls stand behind newer runs",
        "upstream/order.py",
        "tag = self._tags.get(ask.run)",
        "tag = None",
        _UNIT + "upstream/test_order.py::test_calls_of_runs_begun_earlier_go_first_however_late_they_come",
    ),
    Mutant(
        "a call larger than its bucket waits for ever",
        "upstream/account.py",
        "if seconds == math.inf:",
        "if False:",
        _ACCEPTANCE + "test_upstream.py::test_a_call_larger_than_its_bucket_is_refused_for_good",
    ),
    Mutant(
        "a wait beyond the deadline is let in",
        "upstream/account.py",
        "if now + seconds > ask.deadline:",
        "if False:",
        _DECISIONS + "test_a_call_that_would_wait_beyond_its_deadline_is_refused_at_once",
    ),
    Mutant(
        "only the head of the line is told that its deadline has passed",
        "upstream/account.py",
        "while (late := self._deadlines.passed(now)) is not None:",
        "while (late := None) is not None:",
        _DECISIONS + "test_a_deadline_that_passes_in_the_line_is_told_wherever_its_call_stands",
    ),
    Mutant(
        "who is sent away is called back into the same line",
        "upstream/account.py",
        "early = max(0.0, seconds - self._longest_wait)",
        "early = 0.0",
        _DECISIONS + "test_one_who_is_sent_away_comes_back_when_the_line_is_short_enough_for_it",
    ),
    Mutant(
        "those who wait learn nothing of an open breaker",
        "upstream/account.py",
        "            self.refuse_all(now)\n\n    def never_sent",
        "            pass\n\n    def never_sent",
        _DECISIONS + "test_those_who_wait_are_sent_away_as_soon_as_the_breaker_opens",
    ),
    Mutant(
        "what is coming is counted twice",
        "upstream/desk.py",
        "self.account.coming += runs - self._held.get(who, 0)",
        "self.account.coming += runs",
        _CALLS + "test_what_is_held_back_counts_once_however_often_it_is_said",
    ),
    Mutant(
        "an unknown key shares an account",
        "upstream/books.py",
        "where = (fingerprint(key), group)",
        'where = ("", group)',
        _DECISIONS + "test_each_key_has_an_account_of_its_own_and_one_key_has_one",
    ),
    # --- what an answer means ---
    Mutant(
        "a refusal is a fault to the breaker",
        "upstream/account.py",
        "judged = ended.outcome if ended.final else Outcome.IGNORED",
        "judged = Outcome.FAULT if ended.outcome is Outcome.OVERLOAD else Outcome.IGNORED",
        _DECISIONS + "test_refusals_never_open_the_breaker_and_attempts_that_are_tried_again_neither",
    ),
    Mutant(
        "each attempt counts for the breaker",
        "upstream/account.py",
        "judged = ended.outcome if ended.final else Outcome.IGNORED",
        "judged = ended.outcome",
        _RETRIES + "test_only_what_a_call_comes_to_at_last_counts_for_the_breaker",
    ),
    Mutant(
        "what a provider asks of one call holds for that call alone",
        "quota/quotas.py",
        "self._hold_until = max(self._hold_until, now + wanted)",
        "self._hold_until = max(self._hold_until, now)",
        _RETRIES + "test_what_a_provider_asks_of_one_call_holds_for_all",
    ),
    Mutant(
        "a retry does not wait as long as the provider asks",
        "upstream/attempt.py",
        "retry_after=tried.retry_after, left=left)",
        "left=left)",
        _RETRIES + "test_a_retry_waits_at_least_as_long_as_the_provider_asks",
    ),
    Mutant(
        "nobody asks the retry budget",
        "upstream/attempt.py",
        "if delay is not None and not budget.withdraw(now):",
        "if False:",
        _RETRIES + "test_no_storm_of_retries_when_a_provider_fails",
    ),
    Mutant(
        "a refusal further on is a fault of what is guarded",
        "upstream/upstream.py",
        "    if isinstance(exc, Overloaded):",
        "    if False:",
        _RETRIES + "test_a_refusal_further_on_is_no_fault_of_what_is_guarded",
    ),
    Mutant(
        "the pace of calls is learned from failures",
        "upstream/call.py",
        "self._desk.paced(tokens, seconds) if outcome is Outcome.SUCCESS else None",
        "self._desk.paced(tokens, seconds)",
        _RETRIES + "test_calls_that_failed_teach_nothing_of_how_long_a_call_should_take",
    ),
    Mutant(
        "a bucket is paced as if it were a window",
        "quota/heard.py",
        "        if changed and not moved:\n",
        "        if changed or moved:\n",
        _UNIT + "quota/test_heard.py::test_a_bucket_stays_one",
    ),
    Mutant(
        "what is left by a header is believed over our own calls under way",
        "quota/heard.py",
        "        if remaining < lowest:\n",
        "        if remaining != lowest:\n",
        _UNIT + "quota/test_heard.py::test_headers_that_our_own_calls_explain_correct_nothing",
    ),
]
