"""The bugs of ``tests/mutation/bugs.py`` that storms find, each with a seed that finds it.

``python -m tests.simulation.found_by_storms NAME`` injects a bug into its process, runs the storm, and prints what that
finds.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Final, TypeAlias

from tests.mutation import bugs
from tests.simulation import (
    blame_storm,
    control_storm,
    conversation_mix,
    fair_share,
    hook_storm,
    money_storm,
    shutdown_storm,
    task_storm,
)

Bug: TypeAlias = Callable[[], None]

FOUND: Final[dict[Bug, tuple[ModuleType, int]]] = {
    bugs.a_cancelled_run_keeps_its_slot: (task_storm, 0),
    bugs.a_zombie_gives_its_slot_back: (task_storm, 0),
    bugs.a_worker_takes_one_more_than_its_slots: (task_storm, 0),
    bugs.waiting_tasks_are_moved_one_commit_each: (shutdown_storm, 67),
    bugs.a_task_whose_write_is_not_answered_never_ends: (shutdown_storm, 29),
    bugs.closing_starts_what_waits: (shutdown_storm, 5),
    bugs.what_may_not_move_overtakes_what_moves: (shutdown_storm, 44),
    bugs.the_next_message_starts_while_those_before_it_move: (shutdown_storm, 7),
    bugs.deadlines_follow_the_wall_clock: (task_storm, 8),
    bugs.leases_are_valid_by_the_wall_clock: (conversation_mix, 2),
    bugs.a_run_that_awaits_its_child_keeps_its_slot: (fair_share, 0),
    bugs.a_message_stored_while_draining_overtakes_those_that_move: (shutdown_storm, 672),
    bugs.stored_messages_are_free_while_those_before_them_run_here: (shutdown_storm, 59),
    bugs.the_first_caller_of_a_key_takes_the_task_with_it: (task_storm, 4),
    bugs.a_worker_takes_tasks_before_its_handler_has_started: (task_storm, 8),
    bugs.an_orderly_stop_counts_as_a_crash: (task_storm, 50),
    bugs.zombies_keep_a_drain_from_ending: (fair_share, 0),
    bugs.a_handler_that_does_not_stop_works_without_a_slot: (fair_share, 0),
    bugs.low_priority_starves: (fair_share, 0),
    bugs.new_work_overtakes_spilled_work: (fair_share, 2),
    bugs.what_runs_on_a_worker_that_is_restarted_is_forgotten: (task_storm, 0),
    bugs.what_runs_on_a_worker_that_is_restarted_goes_on: (task_storm, 17),
    bugs.what_runs_on_a_worker_goes_on_until_it_is_restarted: (task_storm, 120),
    bugs.a_worker_is_given_tasks_after_the_end_of_its_life: (task_storm, 2),
    bugs.a_task_of_a_nested_supervisor_is_over_before_its_handler_has_stopped: (task_storm, 58),
    bugs.an_account_sends_one_call_more_than_its_limit: (blame_storm, 4),
    bugs.an_attempt_that_is_cancelled_keeps_its_permit: (blame_storm, 6),
    bugs.a_permit_granted_to_a_caller_who_has_gone_is_kept: (blame_storm, 6),
    bugs.a_cancelled_probe_is_not_returned: (blame_storm, 15),
    bugs.a_coroutine_pauses_between_the_check_and_the_take: (task_storm, 78),
    bugs.better_priorities_are_served_last: (task_storm, 1),
    bugs.a_woken_record_that_has_ended_is_counted_as_waiting: (task_storm, 1061),
    bugs.tasks_of_a_conversation_never_start: (conversation_mix, 0),
    bugs.a_nested_task_that_is_too_late_at_its_turn_is_counted_out_twice: (conversation_mix, 1),
    bugs.records_of_one_conversation_are_leased_together: (task_storm, 5),
    bugs.a_new_message_overtakes_stored_ones: (task_storm, 40),
    bugs.the_next_message_of_a_conversation_is_not_looked_for: (task_storm, 5),
    bugs.a_run_that_waits_for_work_keeps_it_from_beginning: (task_storm, 62),
    bugs.a_start_is_not_recorded: (task_storm, 11),
    bugs.what_others_have_reserved_is_spent_again: (money_storm, 10),
    bugs.a_call_that_failed_midway_costs_nothing: (money_storm, 4),
    bugs.a_tenant_that_has_spent_is_forgotten: (money_storm, 0),
    bugs.a_used_quota_is_forgotten_with_its_account: (money_storm, 1),
    bugs.after_a_suspension_all_calls_go: (money_storm, 0),
    bugs.hidden_output_of_a_stream_that_is_left_is_free: (money_storm, 47),
    bugs.two_api_keys_share_an_account: (money_storm, 2),
    bugs.a_refused_probe_is_repeated_as_soon_as_ever: (control_storm, 7),
    bugs.nobody_asks_the_retry_budget: (blame_storm, 11),
    bugs.a_retry_ignores_retry_after: (blame_storm, 9),
    bugs.a_timeout_of_the_caller_is_a_fault: (blame_storm, 0),
    bugs.a_wrong_request_that_is_to_be_retried_uses_no_attempt: (blame_storm, 31),
    bugs.a_call_that_is_rejected_earns_retries: (blame_storm, 155),
    bugs.all_models_share_an_account: (blame_storm, 1),
    bugs.a_few_faults_open_a_breaker: (blame_storm, 11),
    bugs.calls_that_fail_again_and_again_take_all_retries: (blame_storm, 163),
    bugs.spent_money_stops_one_model_only: (money_storm, 0),
    bugs.spent_money_stops_only_the_models_that_were_called: (money_storm, 0),
    bugs.a_call_waits_however_long_it_takes: (blame_storm, 23),
    bugs.a_stream_that_is_dropped_keeps_its_permit: (blame_storm, 4),
    bugs.words_alone_tell_the_cause_of_a_refusal: (control_storm, 2),
    bugs.refused_calls_are_sent_again_at_once: (control_storm, 3),
    bugs.a_call_that_is_refused_later_was_in_flight_at_the_provider: (control_storm, 28),
    bugs.no_rate_is_learned: (control_storm, 13),
    bugs.a_learned_rate_that_falls_is_never_checked: (control_storm, 201),
    bugs.a_penalty_is_tried_again_at_once: (control_storm, 3),
    bugs.a_refusal_empties_the_quota_of_a_day: (control_storm, 26),
    bugs.a_remaining_amount_that_never_changes_is_believed: (control_storm, 17),
    bugs.sinks_are_called_in_the_middle_of_the_supervisors_work: (hook_storm, 5),
    bugs.a_hook_that_raises_stops_its_caller: (hook_storm, 0),
    bugs.a_cancelled_await_goes_on_without_its_slot: (hook_storm, 4),
    bugs.a_slot_that_was_ended_at_once_raises_a_bare_cancellation: (hook_storm, 18),
    bugs.a_limit_that_raises_costs_a_permit: (blame_storm, 6),
    bugs.a_complete_stream_without_usage_costs_its_text: (money_storm, 15),
    bugs.each_spelling_of_a_key_is_an_account: (money_storm, 3),
    bugs.junk_in_a_header_that_is_not_read_makes_an_account: (money_storm, 4),
}
"""By bug, the storm and the first seed known that finds it."""


def find(bug: Bug) -> str:
    """Inject a bug into this process, for good, and return what its storm finds: "nothing" or an error."""
    logging.disable()
    storm, seed = FOUND[bug]
    bug()
    try:
        storm.run(seed)
    except BaseException as failure:  # noqa: BLE001 - whatever it is
        found = failure
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        return f"{type(found).__name__}: {found}"
    return "nothing"


if __name__ == "__main__":
    print(find(next(bug for bug in FOUND if bug.__name__ == sys.argv[1])))
