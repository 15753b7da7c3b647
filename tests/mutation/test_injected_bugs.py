"""The suite catches the bugs that matter most: each is injected in a process of its own, and its test fails there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance import (
    test_bad_input,
    test_call_conservation,
    test_ending,
    test_gateway_attacks,
    test_leases,
    test_nested,
    test_overflow,
    test_routing,
    test_shared_overflow,
    test_submitting,
    test_upstream,
    test_upstream_retries,
)
from tests.contract import test_limit, test_task_store
from tests.mutation import bugs
from tests.unit.admission import test_thresholds
from tests.unit.breaker import test_breaker
from tests.unit.limit import test_adaptive, test_refusal_detector, test_slowdown_experiment
from tests.unit.overflow import test_sqlite_store
from tests.unit.upstream.accounts import test_bypass, test_decisions

ROOT = Path(__file__).parents[2]
SLIPS = ("SyntaxError", "ImportError", "ModuleNotFoundError", "NameError", "AttributeError", "TypeError")
OPTIONS = ("-q", "--exitfirst", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout=20")
INJECTION = ("--hypothesis-profile=mutation", "-p", "tests.mutation.plugin")

CAUGHT_BY: dict[Callable[[], None], Callable[..., Any]] = {
    bugs.a_cancelled_run_keeps_its_slot: test_ending.test_a_handler_that_stops_at_its_timeout_returns_its_slot_at_once,
    bugs.a_zombie_gives_its_slot_back: (
        test_ending.test_a_zombie_keeps_its_slot_and_counts_in_the_load_until_it_really_ends
    ),
    bugs.a_worker_takes_one_more_than_its_slots: test_routing.test_no_worker_ever_holds_more_than_its_slots,
    bugs.a_run_that_awaits_its_child_keeps_its_slot: (
        test_nested.test_parents_and_children_that_share_one_slot_all_finish
    ),
    bugs.an_account_sends_one_call_more_than_its_limit: (
        test_upstream.test_no_more_calls_are_in_flight_than_max_concurrent
    ),
    bugs.an_attempt_that_is_cancelled_keeps_its_permit: (
        test_call_conservation.test_after_random_calls_and_cancellations_nothing_is_held
    ),
    bugs.a_permit_granted_to_a_caller_who_has_gone_is_kept: (
        test_upstream.test_a_call_cancelled_at_any_step_leaves_nothing_behind
    ),
    bugs.a_cancelled_probe_is_not_returned: test_breaker.test_a_cancelled_probe_changes_nothing,
    bugs.a_coroutine_pauses_between_the_check_and_the_take: test_bad_input.test_two_tasks_of_one_id_at_the_same_moment,
    bugs.a_load_at_the_threshold_is_admitted: test_thresholds.test_a_priority_is_rejected_from_its_threshold_on,
    bugs.better_priorities_are_served_last: (
        test_routing.test_the_queue_is_served_by_priority_then_deadline_then_order_of_submission
    ),
    bugs.low_priority_starves: test_routing.test_low_moves_under_a_flood_of_critical,
    bugs.everybody_rejected_gets_the_same_retry_after: (
        test_submitting.test_no_two_rejections_get_the_same_retry_after_and_they_are_one_drain_interval_apart
    ),
    bugs.a_call_that_overtakes_uses_what_the_head_of_the_queue_waits_for: (
        test_bypass.test_the_needs_of_all_calls_ahead_are_kept_for_them
    ),
    bugs.tasks_of_a_conversation_never_start: test_submitting.test_tasks_of_a_thread_run_one_at_a_time_in_order,
    bugs.a_child_does_not_inherit_its_parents_deadline: (
        test_nested.test_a_child_inherits_the_earlier_of_its_parents_deadline_and_its_own
    ),
    bugs.a_call_is_sent_that_cannot_meet_its_deadline: (
        test_decisions.test_in_the_last_quarter_of_its_time_a_call_is_sent_only_if_it_can_meet_its_deadline
    ),
    bugs.what_a_zombie_returns_is_taken_for_its_result: test_ending.test_what_a_zombie_returns_changes_nothing,
    bugs.whoever_lost_its_lease_may_still_finish: test_task_store.test_a_lost_lease_is_rejected_everywhere,
    bugs.a_record_is_acknowledged_before_its_commit: test_sqlite_store.test_an_acknowledged_write_is_committed,
    bugs.a_task_starts_although_its_lease_has_lapsed: (
        test_shared_overflow.test_a_task_that_waits_for_its_thread_does_not_start_once_its_lease_has_lapsed
    ),
    bugs.a_start_is_not_recorded: test_leases.test_a_start_is_on_record_before_its_handler_runs,
    bugs.new_work_overtakes_spilled_work: test_overflow.test_no_new_task_overtakes_spilled_ones,
    bugs.what_others_have_reserved_is_spent_again: test_decisions.test_reserved_dollars_are_not_available_to_others,
    bugs.a_call_that_failed_midway_costs_nothing: test_decisions.test_a_failed_call_costs_the_reserved_amount,
    bugs.two_api_keys_share_an_account: test_decisions.test_each_key_has_an_account_of_its_own_and_one_key_has_one,
    bugs.a_throttled_call_counts_as_a_fault: (
        test_decisions.test_throttled_calls_and_retried_attempts_never_open_the_breaker
    ),
    bugs.a_refusal_of_an_earlier_epoch_lowers_the_limit_again: test_limit.test_refusals_of_one_epoch_lower_a_limit_once,
    bugs.a_refusal_is_never_contradicted: test_refusal_detector.test_regular_stray_refusals_become_the_background,
    bugs.a_late_refusal_is_not_waited_for: test_adaptive.test_refusals_that_come_late_are_learned_to_be_late,
    bugs.a_refused_probe_is_repeated_as_soon_as_ever: test_adaptive.test_a_limit_of_few_slots_is_probed_rarely,
    bugs.an_experiment_that_made_nothing_faster_keeps_its_limit: (
        test_slowdown_experiment.test_calls_that_are_slow_for_another_reason_restore_the_limit
    ),
    bugs.nobody_asks_the_retry_budget: test_upstream_retries.test_no_retry_storm_while_a_provider_fails,
    bugs.a_retry_ignores_retry_after: test_upstream_retries.test_a_retry_waits_at_least_as_long_as_retry_after,
    bugs.a_web_page_from_elsewhere_may_call: test_gateway_attacks.test_a_foreign_web_page_is_rejected,
}


def node_id(test: Callable[..., Any]) -> str:
    """Return a test's name, as pytest takes it."""
    path = sys.modules[test.__module__].__file__  # not of its code: a decorator may have wrapped that
    assert path is not None
    return f"{Path(path).relative_to(ROOT)}::{test.__name__}"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests in a process of its own."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *INJECTION, *arguments]
    environment = {**os.environ, "COLUMNS": "400"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_bug_has_a_test() -> None:
    injectable = {value for name, value in vars(bugs).items() if getattr(value, "__module__", "") == bugs.__name__}
    assert injectable == set(CAUGHT_BY)


@pytest.mark.slow
@pytest.mark.parametrize("bug", CAUGHT_BY, ids=lambda bug: bug.__name__)
def test_an_injected_bug_is_caught(bug: Callable[[], None]) -> None:
    outcome = run("--inject", bug.__name__, node_id(CAUGHT_BY[bug]))
    assert outcome.returncode == 1, f"it is not caught:\n{outcome.stdout[-2000:]}{outcome.stderr[-2000:]}"
    (failure,) = re.findall(r"^FAILED .*$", outcome.stdout, re.MULTILINE)
    assert not failure.partition(" - ")[2].startswith(SLIPS), f"it fails for another reason: {failure}"


@pytest.mark.slow
def test_without_a_bug_these_tests_pass() -> None:
    outcome = run(*dict.fromkeys(map(node_id, CAUGHT_BY.values())))
    assert outcome.returncode == 0, outcome.stdout[-3000:]
