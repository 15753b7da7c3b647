"""The suite catches the bugs that matter most: each is injected in a process of its own, and its test fails there.

That these tests pass without a bug is seen where the suite runs them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance import (
    test_autoscaling,
    test_bad_input,
    test_budget_attacks,
    test_call_conservation,
    test_cancelled_tasks,
    test_clock_steps,
    test_conversations,
    test_cost_routing,
    test_delayed_tasks,
    test_drain,
    test_ending,
    test_events,
    test_fan_out,
    test_gateway_attacks,
    test_gateway_caller_spend,
    test_gateway_connections,
    test_gateway_end,
    test_gateway_key_limits,
    test_gateway_keys,
    test_gateway_metrics,
    test_gateway_models,
    test_gateway_operation,
    test_gateway_provider_keys,
    test_gateway_reload,
    test_gateway_responses,
    test_gateway_worker_metrics,
    test_gateway_worker_reload,
    test_handler_context,
    test_held_tasks,
    test_hooks,
    test_json,
    test_leases,
    test_lifecycle,
    test_load_balancing,
    test_lost_file,
    test_many_supervisors,
    test_nested,
    test_not_before,
    test_open_runs,
    test_overflow,
    test_portal,
    test_reserve,
    test_restart,
    test_resubmitted_sagas,
    test_resumed_sagas,
    test_retries,
    test_room,
    test_routing,
    test_runners,
    test_saga_breaker,
    test_saga_errors,
    test_saga_leases,
    test_saga_outcomes,
    test_saga_replay,
    test_saga_scans,
    test_saga_slots,
    test_saga_writes,
    test_sagas,
    test_shared_accounts,
    test_shared_overflow,
    test_silent_store,
    test_slot,
    test_spend_log,
    test_start_deadlines,
    test_start_gate,
    test_state_faults,
    test_state_misuse,
    test_state_near_cache,
    test_stored_retries,
    test_stored_text,
    test_stored_tickets,
    test_submitting,
    test_supervision,
    test_task_usage,
    test_tenants,
    test_tenants_in_the_overflow,
    test_threads,
    test_upstream_bad_input,
    test_upstream_retries,
    test_worker_changes,
    test_worker_counters,
    test_workers,
)
from tests.contract import (
    test_account,
    test_account_calls,
    test_langgraph_store,
    test_ledger_store,
    test_limit,
    test_saga_log,
    test_state,
    test_state_moving,
    test_task_store,
)
from tests.integration import (
    test_dropped_streams,
    test_gguf_server,
    test_langgraph_resume,
    test_langgraph_saver,
    test_local_model,
    test_redis_away,
    test_redis_failover,
    test_redis_lost,
    test_saga_redis,
    test_worker_processes,
)
from tests.mutation import bugs
from tests.mutation.plugin import ENDED
from tests.simulation import test_blame, test_cost_scripts, test_misleading_headers, test_quota_debt
from tests.unit.adapters import (
    test_agent_thread,
    test_as_handler,
    test_blocking_client,
    test_chat_handler,
    test_run_tasks,
    test_tool_threads,
)
from tests.unit.admission import test_estimated_times, test_thresholds
from tests.unit.breaker import test_breaker
from tests.unit.cli import test_autoscale, test_autoscale_metrics
from tests.unit.cli import test_gateway as test_gateway_command
from tests.unit.engine import test_process_engine
from tests.unit.gateway import test_abortable_block
from tests.unit.gateway.callers import test_caller_ledgers, test_caller_limits, test_key_registry
from tests.unit.gateway.requests import test_read_timeout, test_request_head
from tests.unit.gateway.workers import test_worker_channel, test_worker_group, test_worker_listener
from tests.unit.limit import test_adaptive, test_refusal_detector, test_slowdown_experiment
from tests.unit.overflow import test_redis_store, test_sqlite_store, test_sqs_crash_points, test_sqs_store
from tests.unit.quota import test_observed, test_quota_doubt, test_rate_limiter
from tests.unit.saga import test_agent_steps, test_errors_of_clients, test_saga_admin, test_sqlite_log, test_step
from tests.unit.scale import (
    test_autoscaler,
    test_decision,
    test_ec2,
    test_ec2_protection,
    test_ec2_reports,
    test_kubernetes,
    test_leader,
    test_ratio,
    test_worker_target,
)
from tests.unit.spend_log import test_write_behind
from tests.unit.state import test_guarded_shard, test_moving, test_near_cache, test_time_limits
from tests.unit.storage import test_operation_queue, test_redis_clock, test_redis_master, test_sqlite_writer, test_url
from tests.unit.supervisor import (
    test_cost_selection,
    test_failure_log,
    test_overflow_demand,
    test_pool,
    test_pools,
    test_worker_protection,
)
from tests.unit.supervisor.runs import test_timers
from tests.unit.supervisor.spill import test_held_leases
from tests.unit.upstream import test_call_flow, test_core
from tests.unit.upstream.accounts import (
    test_account_retries,
    test_bypass,
    test_call_queue,
    test_decisions,
    test_fair_order,
    test_guarded_limit,
    test_nested_calls,
    test_spend,
    test_tables,
)
from tests.unit.upstream.accounts.refusals import (
    test_learned_rate,
    test_refusal_cause,
    test_refusal_control,
    test_refusal_pause,
    test_refusal_trial,
)
from tests.unit.upstream.fallbacks import test_fallback_chain, test_load_balancer, test_reroute
from tests.unit.upstream.httpx_binding import test_calls
from tests.unit.upstream.providers import test_credentials, test_endpoints, test_metering, test_rate_limit_headers
from tests.unit.upstream.shared import (
    test_changed_terms,
    test_fault_row,
    test_lease,
    test_leased_limit,
    test_leased_stoppages,
    test_ledger,
    test_ledger_layout,
    test_limit_learning,
    test_observed_learning,
    test_rate_shares,
    test_stoppages,
)

ROOT = Path(__file__).parents[2]
SLIPS = ("SyntaxError", "ImportError", "ModuleNotFoundError", "NameError", "AttributeError", "TypeError")
OPTIONS = ("-q", "--exitfirst", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist")
TIMEOUTS = ("--timeout=10", "-o", "faulthandler_timeout=60")  # the second ends what the first does not
INJECTION = (*TIMEOUTS, "--hypothesis-profile=mutation", "-p", "tests.mutation.plugin")

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
        test_account.test_no_more_calls_are_in_flight_than_max_concurrent
    ),
    bugs.an_attempt_that_is_cancelled_keeps_its_permit: (
        test_call_conservation.test_after_random_calls_and_cancellations_nothing_is_held
    ),
    bugs.a_permit_granted_to_a_caller_who_has_gone_is_kept: (
        test_account.test_a_call_cancelled_at_any_step_leaves_nothing_behind
    ),
    bugs.a_permit_granted_in_a_loop_that_has_closed_is_kept: (
        test_decisions.test_a_permit_that_its_caller_can_never_take_goes_to_the_next
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
    bugs.each_message_that_comes_too_late_ends_in_a_call_of_its_own: (
        test_conversations.test_hundreds_of_messages_that_come_too_late_at_one_turn_all_end_and_the_conversation_goes_on
    ),
    bugs.a_handler_that_runs_itself_goes_deeper_than_the_bound: (
        test_open_runs.test_a_handler_that_runs_itself_without_end_is_stopped_by_an_error_that_says_so
    ),
    bugs.a_handler_that_runs_itself_stays_ahead_of_its_cancellation: (
        test_open_runs.test_a_handler_that_runs_itself_and_tries_again_whatever_happens_can_be_stopped
    ),
    bugs.a_nested_task_that_is_queued_starts_the_next_one_at_once: (
        test_conversations.test_hundreds_of_nested_messages_that_come_too_late_all_end
    ),
    bugs.a_nested_task_that_is_too_late_at_its_turn_is_counted_out_twice: (
        test_open_runs.test_nested_tasks_that_expire_when_their_turn_comes_leave_nothing_behind
    ),
    bugs.a_worker_with_many_open_runs_serves_by_priority_alone: (
        test_open_runs.test_a_flood_of_better_work_does_not_starve_sub_tasks_of_a_worker_that_begins_no_new_run
    ),
    bugs.a_worker_with_many_open_runs_passes_a_pool_over_uncounted: (
        test_pool.test_a_worker_with_many_open_runs_serves_the_pool_that_it_passed_over_too_often
    ),
    bugs.draining_waits_for_a_message_behind_one_that_cannot_start: (
        test_drain.test_a_message_behind_one_that_no_worker_can_take_does_not_keep_a_drain_from_ending
    ),
    bugs.records_of_one_conversation_are_leased_together: (
        test_task_store.test_one_record_of_a_conversation_is_leased_at_a_time_the_oldest_first
    ),
    bugs.a_new_message_overtakes_stored_ones: (
        test_conversations.test_a_new_message_does_not_overtake_spilled_ones_of_its_conversation
    ),
    bugs.the_next_message_of_a_conversation_is_not_looked_for: (
        test_conversations.test_messages_keep_their_order_beyond_the_bound_of_their_conversation
    ),
    bugs.the_next_message_starts_while_those_before_it_move: (
        test_conversations.test_no_message_starts_while_those_before_it_move_to_the_overflow
    ),
    bugs.what_may_not_move_overtakes_what_moves: (
        test_conversations.test_what_may_not_spill_ends_when_messages_before_it_move_to_the_overflow
    ),
    bugs.a_message_stored_while_draining_overtakes_those_that_move: (
        test_drain.test_a_message_that_is_stored_once_draining_has_begun_does_not_overtake_those_that_move
    ),
    bugs.stored_messages_are_free_while_those_before_them_run_here: (
        test_drain.test_a_stored_message_behind_one_that_only_this_process_has_is_not_free_while_it_runs
    ),
    bugs.a_message_stored_while_draining_is_free_while_those_before_it_run_here: (
        test_drain.test_a_message_that_is_stored_once_draining_has_begun_is_not_free_while_those_before_it_run
    ),
    bugs.a_conversation_parks_without_bound: (
        test_conversations.test_a_conversation_is_rejected_beyond_its_bound_and_named_and_told_when_to_come_back
    ),
    bugs.parked_messages_count_as_load: (test_conversations.test_others_wait_as_if_a_busy_conversation_had_one_message),
    bugs.new_runs_begin_however_many_wait: (
        test_open_runs.test_no_new_run_begins_while_too_many_wait_for_their_sub_tasks
    ),
    bugs.a_run_that_waits_for_work_keeps_it_from_beginning: (
        test_open_runs.test_runs_that_wait_for_work_that_has_not_begun_do_not_keep_it_from_beginning
    ),
    bugs.runs_of_low_priority_keep_better_ones_from_beginning: (
        test_open_runs.test_runs_that_wait_keep_no_better_work_from_beginning
    ),
    bugs.work_that_has_not_begun_takes_the_room_of_nested_tasks: (
        test_open_runs.test_a_queue_full_of_new_work_rejects_no_sub_task
    ),
    bugs.a_nested_task_is_stored_behind_work_that_has_not_begun: (
        test_open_runs.test_a_thousand_sub_tasks_of_one_run_have_a_bound_and_come_back_before_new_work
    ),
    bugs.the_submitters_mistake_counts_against_the_worker: (
        test_workers.test_a_task_that_its_handler_cannot_run_does_not_count_against_the_worker
    ),
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
    bugs.a_reservation_is_never_ended: (
        test_sqs_crash_points.test_nothing_acknowledged_is_lost_or_completed_twice_wherever_a_process_dies
    ),
    bugs.a_dead_letter_loses_its_envelope: (
        test_sqs_crash_points.test_nothing_acknowledged_is_lost_or_completed_twice_wherever_a_process_dies
    ),
    bugs.a_message_is_deleted_before_the_end_of_its_task_is_stored: (
        test_sqs_crash_points.test_nothing_acknowledged_is_lost_or_completed_twice_wherever_a_process_dies
    ),
    bugs.a_message_without_a_record_is_ignored: (
        test_sqs_store.test_messages_without_a_record_are_taken_in_since_the_index_was_lost
    ),
    bugs.a_start_is_not_recorded: test_leases.test_a_start_is_on_record_before_its_handler_runs,
    bugs.new_work_overtakes_spilled_work: test_overflow.test_no_new_task_overtakes_spilled_ones,
    bugs.tenants_are_served_in_the_order_of_arrival: (
        test_tenants.test_a_tenant_waits_for_its_turn_and_not_for_the_flood_of_another
    ),
    bugs.the_flood_of_a_tenant_fills_the_queue_for_all: test_tenants.test_the_flood_of_one_tenant_keeps_no_other_out,
    bugs.new_tasks_wait_behind_the_records_of_all_tenants: (
        test_tenants_in_the_overflow.test_a_new_task_does_not_wait_behind_the_records_of_another_tenant
    ),
    bugs.records_come_back_tenant_after_tenant: (
        test_tenants_in_the_overflow.test_a_record_does_not_wait_behind_those_of_another_tenant
    ),
    bugs.new_tasks_take_the_slots_of_records_on_their_way_back: (
        test_tenants_in_the_overflow.test_a_caller_that_submits_as_soon_as_a_slot_is_free_takes_turns_with_records
    ),
    bugs.all_tenants_come_back_by_one_schedule: (
        test_tenants.test_a_rejected_tenant_is_not_told_to_come_back_after_the_flood_of_another
    ),
    bugs.producers_of_all_tenants_stand_in_one_line: (
        test_room.test_the_producers_of_one_tenant_do_not_stand_before_those_of_another
    ),
    bugs.a_store_that_is_silent_keeps_slots_free: (
        test_tenants_in_the_overflow.test_a_store_that_does_not_answer_keeps_no_slot_from_the_new_tasks_of_others
    ),
    bugs.new_tasks_of_a_tenant_go_before_what_has_begun: (
        test_tenants.test_a_run_that_has_begun_goes_on_before_new_tasks_of_its_tenant
    ),
    bugs.records_of_a_blocked_tenant_come_back: (
        test_tenants_in_the_overflow.test_the_records_of_a_blocked_tenant_keep_those_of_no_other
    ),
    bugs.a_tenant_runs_as_much_as_it_likes: test_tenants.test_a_tenant_holds_no_more_slots_than_it_may,
    bugs.what_waits_for_a_bound_stays_without_a_worker: (
        test_tenants.test_what_waits_for_a_bound_ends_with_its_last_worker
    ),
    bugs.a_drain_waits_for_slots_that_are_reserved_for_others: (
        test_reserve.test_a_drain_does_not_wait_for_a_task_that_may_take_no_slot
    ),
    bugs.a_free_slot_is_room_for_tasks_that_fail_at_once: (
        test_retries.test_tasks_that_fail_at_once_do_not_pile_up_beyond_the_room_of_the_queue
    ),
    bugs.the_bound_of_a_tenant_says_nothing_of_its_waits: (
        test_tenants.test_a_tenant_is_told_to_come_back_when_its_bound_allows
    ),
    bugs.better_tasks_that_need_not_wait_pass_over_nobody: (
        test_reserve.test_better_tasks_that_need_not_wait_starve_no_priority
    ),
    bugs.normal_tasks_take_reserved_slots: test_reserve.test_a_normal_task_is_rejected_by_the_load_of_what_it_may_use,
    bugs.calls_of_all_tenants_weigh_the_same: test_tenants.test_calls_have_the_weight_of_their_tenant,
    bugs.waiting_tasks_are_moved_one_commit_each: (
        test_drain.test_draining_moves_the_whole_queue_to_the_overflow_within_its_limit
    ),
    bugs.a_task_whose_write_is_not_answered_never_ends: (
        test_drain.test_a_store_that_does_not_answer_delays_a_drain_by_its_grace_at_most
    ),
    bugs.zombies_keep_a_drain_from_ending: (
        test_drain.test_what_waits_behind_a_zombie_does_not_keep_a_drain_from_ending
    ),
    bugs.a_handler_that_does_not_stop_works_without_a_slot: (
        test_ending.test_handlers_that_do_not_stop_while_they_wait_for_sub_tasks_take_the_next_slots
    ),
    bugs.a_count_of_conversations_forgets_what_is_stored_meanwhile: (
        test_conversations.test_a_count_that_was_made_before_a_message_was_stored_does_not_let_the_next_one_overtake_it
    ),
    bugs.closing_starts_what_waits: test_drain.test_closing_moves_the_queue_out_and_starts_nothing_more,
    bugs.a_ticket_asked_for_by_id_has_no_deadline: (
        test_stored_tickets.test_a_ticket_that_was_asked_for_too_late_expires_at_once
    ),
    bugs.deadlines_follow_the_wall_clock: (
        test_clock_steps.test_a_task_that_runs_past_its_deadline_expires_then_and_its_worker_is_not_blamed
    ),
    bugs.leases_are_valid_by_the_wall_clock: (
        test_held_leases.test_a_lease_lasts_as_long_whatever_the_wall_clock_is_set_to
    ),
    bugs.a_clock_that_was_set_is_not_noticed: test_clock_steps.test_what_runs_is_not_given_to_another_process,
    bugs.a_process_waits_long_between_its_attempts_to_write: (
        test_sqlite_writer.test_a_writer_asks_for_its_turn_every_few_milliseconds
    ),
    bugs.the_log_grows_until_the_disk_is_full: (
        test_sqlite_writer.test_the_log_is_shortened_before_it_fills_a_small_disk
    ),
    bugs.nobody_looks_whether_the_file_is_still_there: (
        test_lost_file.test_no_task_is_acknowledged_into_a_file_that_is_lost
    ),
    bugs.the_text_of_an_error_is_stored_as_it_came: (
        test_stored_text.test_an_error_of_any_text_is_stored_and_its_task_not_run_again
    ),
    bugs.an_orderly_stop_counts_as_a_crash: test_drain.test_orderly_stops_are_no_crashes,
    bugs.the_usage_of_an_attempt_that_failed_is_lost: test_task_usage.test_the_usage_of_attempts_that_failed_counts,
    bugs.a_call_without_a_price_passes_a_spent_budget: (
        test_upstream_bad_input.test_a_call_without_a_price_never_passes_a_spent_budget
    ),
    bugs.a_call_under_way_when_its_task_ends_is_not_mentioned: (
        test_task_usage.test_a_call_that_is_under_way_when_its_task_times_out_is_unfinished
    ),
    bugs.what_others_have_reserved_is_spent_again: test_decisions.test_reserved_dollars_are_not_available_to_others,
    bugs.a_call_that_failed_midway_costs_nothing: test_decisions.test_a_failed_call_costs_the_reserved_amount,
    bugs.dollars_that_another_account_has_taken_are_reserved: (
        test_spend.test_two_accounts_that_both_see_the_last_dollar_spend_it_once
    ),
    bugs.a_free_call_is_told_to_come_back_for_a_budget_that_never_refills: (
        test_start_gate.test_runs_whose_calls_are_free_do_not_wait_for_a_budget_that_never_refills
    ),
    bugs.a_restart_refills_a_budget: test_spend_log.test_a_restart_does_not_refill_a_budget,
    bugs.a_restart_refills_the_budget_of_a_key: (
        test_gateway_caller_spend.test_a_restart_does_not_refill_the_budget_of_a_key
    ),
    bugs.the_budget_of_a_key_is_named_as_that_of_its_target: (
        test_caller_ledgers.test_a_process_that_learns_that_a_budget_is_spent_names_its_caller
    ),
    bugs.calls_of_an_issued_key_are_attributed_to_the_key_of_its_provider: (
        test_gateway_caller_spend.test_a_call_is_attributed_to_the_name_of_its_key_everywhere
    ),
    bugs.a_restart_alerts_again: test_spend_log.test_a_restart_does_not_alert_again,
    bugs.a_clock_that_was_ahead_refills_a_shared_budget: (
        test_ledger.test_a_clock_that_was_ahead_does_not_refill_a_budget
    ),
    bugs.each_process_on_redis_has_all_slots: test_account.test_no_more_calls_are_in_flight_than_max_concurrent,
    bugs.the_account_that_had_the_last_call_gets_the_next_one_too: (
        test_account_calls.test_idle_accounts_share_calls_by_their_weights
    ),
    bugs.what_was_spent_of_a_shared_budget_is_not_known_before_a_call: (
        test_shared_accounts.test_a_process_that_has_made_no_call_is_told_what_others_have_spent
    ),
    bugs.a_lease_lasts_on_though_its_machine_was_suspended: (
        test_shared_accounts.test_a_machine_that_was_suspended_asks_before_it_uses_what_it_had_leased
    ),
    bugs.a_shared_budget_is_said_to_renew_before_its_ledger_lets_it: (
        test_lease.test_a_budget_is_said_to_renew_as_late_as_the_reply_may_have_been_made
    ),
    bugs.a_call_waits_for_a_quota_that_other_processes_have_used: (
        test_account.test_a_call_that_no_quota_will_let_through_in_time_is_rejected_soon
    ),
    bugs.a_quota_that_must_be_leased_first_counts_as_used_up: (
        test_account_calls.test_requests_that_are_refused_for_what_they_ask_delay_no_others
    ),
    bugs.a_small_call_that_is_rejected_does_not_alert: (
        test_shared_accounts.test_a_shared_budget_is_spent_once_a_small_call_is_rejected
    ),
    bugs.spend_that_could_not_be_written_is_lost: (
        test_write_behind.test_a_file_that_cannot_be_written_costs_nothing_and_is_written_later
    ),
    bugs.a_tenant_that_has_spent_is_forgotten: (test_tables.test_tenants_that_have_spent_nothing_are_forgotten_first),
    bugs.debts_of_a_given_quota_are_forgiven: (
        test_quota_debt.test_what_calls_use_beyond_their_reservations_is_paid_back_in_full
    ),
    bugs.any_refusal_lowers_a_given_quota: (
        test_quota_debt.test_calls_that_are_always_refused_do_not_use_up_a_given_quota
    ),
    bugs.what_a_strict_quota_has_lent_refills: (
        test_quota_debt.test_what_long_calls_hold_of_a_strict_quota_is_granted_once
    ),
    bugs.a_strict_quota_reserves_what_is_expected: test_quota_debt.test_a_strict_quota_is_never_passed,
    bugs.a_used_quota_is_forgotten_with_its_account: (
        test_tables.test_a_spent_quota_stays_spent_after_a_thousand_other_models_and_keys
    ),
    bugs.after_a_suspension_all_calls_go: test_spend.test_after_a_suspension_one_call_goes_until_it_has_succeeded,
    bugs.callers_who_hang_up_use_up_the_budget_of_others: (
        test_budget_attacks.test_keys_that_were_never_accepted_cannot_use_up_the_budget_by_hanging_up
    ),
    bugs.a_model_never_thinks_between_two_words: (
        test_budget_attacks.test_hidden_output_between_two_words_of_a_stream_that_is_left_is_paid
    ),
    bugs.one_request_that_is_too_dear_stops_the_key: (
        test_calls.test_a_request_that_the_account_cannot_afford_stops_no_others
    ),
    bugs.a_call_that_is_refused_again_and_again_waits_at_the_head_of_the_queue: (
        test_call_flow.test_a_call_that_is_refused_again_and_again_waits_for_no_quota_but_for_its_permission
    ),
    bugs.two_seconds_of_402s_suspend_the_quietest_key: (
        test_calls.test_a_request_that_the_account_cannot_afford_stops_no_others_where_they_are_few
    ),
    bugs.the_caller_that_was_refused_takes_every_probe_of_a_suspension: (
        test_spend.test_a_request_of_the_size_that_was_refused_is_the_last_to_be_a_probe
    ),
    bugs.a_call_that_cannot_be_metered_passes: (
        test_budget_attacks.test_no_spelling_of_a_call_spends_more_than_the_budget
    ),
    bugs.an_escaped_path_is_another_endpoint: (
        test_endpoints.test_a_path_is_compared_as_the_most_lenient_server_reads_it
    ),
    bugs.writes_to_a_cache_cost_as_much_as_other_input: test_budget_attacks.test_the_writes_to_a_cache_are_paid,
    bugs.hidden_output_of_a_stream_that_is_left_is_free: (
        test_budget_attacks.test_hidden_output_of_a_stream_that_is_left_is_paid
    ),
    bugs.the_usage_of_a_response_in_the_background_is_ignored: (
        test_budget_attacks.test_a_response_in_the_background_counts_as_reserved_until_its_usage_arrives
    ),
    bugs.two_api_keys_share_an_account: test_decisions.test_each_key_has_an_account_of_its_own_and_one_key_has_one,
    bugs.a_throttled_call_counts_as_a_fault: (
        test_decisions.test_throttled_calls_and_retried_attempts_never_open_the_breaker
    ),
    bugs.a_refusal_of_an_earlier_epoch_lowers_the_limit_again: test_limit.test_refusals_of_one_epoch_lower_a_limit_once,
    bugs.a_refusal_is_never_contradicted: test_refusal_detector.test_regular_stray_refusals_become_the_background,
    bugs.a_high_background_is_never_compared: (
        test_refusal_detector.test_where_half_as_many_calls_in_flight_are_refused_as_often_the_limit_may_rise
    ),
    bugs.a_late_refusal_is_not_waited_for: test_adaptive.test_refusals_that_come_late_are_learned_to_be_late,
    bugs.only_ended_calls_raise_a_limit_above_the_best_one: (
        test_adaptive.test_acceptances_are_enough_to_follow_a_capacity_that_is_far_above_all_that_was_refused
    ),
    bugs.a_refused_probe_is_repeated_as_soon_as_ever: test_adaptive.test_a_limit_of_few_slots_is_probed_rarely,
    bugs.an_experiment_that_made_nothing_faster_keeps_its_limit: (
        test_slowdown_experiment.test_calls_that_are_slow_for_another_reason_restore_the_limit
    ),
    bugs.calls_that_a_stalled_provider_kept_waiting_are_the_norm: (
        test_slowdown_experiment.test_calls_that_a_provider_kept_waiting_during_an_experiment_are_not_the_norm
    ),
    bugs.only_a_limit_that_is_used_up_is_suspected_of_slow_calls: (
        test_slowdown_experiment.test_a_limit_that_is_not_quite_used_up_is_lowered_too
    ),
    bugs.nobody_asks_the_retry_budget: test_upstream_retries.test_no_retry_storm_while_a_provider_fails,
    bugs.a_retry_ignores_retry_after: test_upstream_retries.test_a_retry_waits_at_least_as_long_as_retry_after,
    bugs.a_timeout_of_the_caller_is_a_fault: (test_blame.test_hasty_callers_do_not_shut_the_account_for_the_others),
    bugs.an_exception_never_carries_an_answer: (
        test_account_calls.test_a_guarded_function_reports_throttling_by_its_exception
    ),
    bugs.a_wrong_request_that_is_to_be_retried_uses_no_attempt: (
        test_calls.test_a_provider_that_asks_for_retries_of_a_wrong_request_gets_no_more_than_max_attempts
    ),
    bugs.all_models_share_an_account: (test_blame.test_a_model_that_is_down_does_not_shut_the_account_for_the_others),
    bugs.a_few_faults_open_a_breaker: (
        test_blame.test_poisoned_requests_neither_open_the_breaker_nor_use_up_the_retries_of_the_others
    ),
    bugs.the_rules_of_a_workers_breaker_are_dropped: (
        test_workers.test_a_worker_may_have_a_breaker_with_rules_of_its_own
    ),
    bugs.a_call_that_has_failed_probes: test_decisions.test_a_call_that_has_failed_does_not_probe,
    bugs.calls_that_fail_again_and_again_take_all_retries: (
        test_account_retries.test_calls_that_fail_again_and_again_leave_retries_for_the_first_failures_of_others
    ),
    bugs.spent_money_stops_one_model_only: (test_decisions.test_spent_money_stops_all_models_of_the_key_and_no_other),
    bugs.spent_money_stops_only_the_models_that_were_called: (
        test_decisions.test_spent_money_stops_models_of_the_key_that_were_not_called_before
    ),
    bugs.a_call_waits_however_long_it_takes: (
        test_decisions.test_no_call_waits_for_more_than_one_and_a_half_times_the_longest_expected_wait
    ),
    bugs.a_stream_that_is_dropped_keeps_its_permit: (
        test_dropped_streams.test_a_stream_of_openai_that_is_left_by_break_returns_its_permit
    ),
    bugs.a_throttled_call_goes_to_a_busier_account: (
        test_fallback_chain.test_a_throttled_call_skips_its_retry_if_the_next_account_is_less_loaded
    ),
    bugs.a_forked_child_inherits_the_calls_of_its_parent: (
        test_core.test_after_a_fork_the_calls_of_the_parent_hold_nothing_and_are_not_taken_back
    ),
    bugs.words_alone_tell_the_cause_of_a_refusal: (
        test_refusal_cause.test_trials_whose_calls_are_refused_speak_for_a_rate
    ),
    bugs.evidence_fades_and_calls_in_flight_are_forgotten_in_a_pause: (
        test_refusal_cause.test_a_pause_makes_nothing_older
    ),
    bugs.a_call_accepted_at_once_contradicts_refusals_before_those_beside_it_are_known: (
        test_refusal_cause.test_a_call_that_is_accepted_at_once_contradicts_nothing_before_the_refusals_beside_it_are_known
    ),
    bugs.a_call_that_is_refused_again_was_in_flight: (
        test_refusal_control.test_a_call_that_is_refused_again_and_again_is_not_in_flight_with_those_that_are_accepted
    ),
    bugs.a_call_that_is_refused_later_was_in_flight_at_the_provider: (
        test_refusal_detector.test_a_call_that_is_refused_after_a_later_one_was_accepted_was_not_in_flight_with_it
    ),
    bugs.a_long_row_of_refusals_passes_for_a_short_one: (
        test_learned_rate.test_spaced_calls_that_are_refused_for_long_twice_disprove_a_bucket
    ),
    bugs.calls_accepted_right_after_a_refusal_say_nothing: (
        test_refusal_trial.test_more_accepted_calls_than_a_rate_lets_through_show_chance
    ),
    bugs.nothing_is_sent_right_after_a_refusal: (
        test_refusal_trial.test_calls_go_right_after_a_refusal_until_either_verdict_is_certain
    ),
    bugs.a_call_that_is_refused_for_what_it_asks_counts_again_and_again: (
        test_refusal_control.test_calls_that_are_refused_again_and_again_for_what_they_ask_begin_no_pause
    ),
    bugs.refused_calls_are_sent_again_at_once: test_refusal_pause.test_one_trial_call_goes_at_a_time,
    bugs.a_retry_after_is_believed_before_it_was_right: (
        test_refusal_pause.test_a_retry_after_that_is_not_checked_yet_does_not_delay_the_first_trial_call
    ),
    bugs.no_rate_is_learned: test_learned_rate.test_the_calls_accepted_between_two_refusals_are_the_rate,
    bugs.calls_that_are_refused_late_count_as_accepted: (
        test_learned_rate.test_calls_that_are_refused_late_do_not_make_the_guess_lower
    ),
    bugs.a_guess_is_expected_to_stay_as_it_is: (
        test_learned_rate.test_calls_expect_a_guess_to_rise_as_it_does_while_it_is_used
    ),
    bugs.refusals_at_once_are_no_first_guess: test_learned_rate.test_two_blocks_at_once_are_a_first_guess,
    bugs.what_late_refusals_say_is_forgotten_when_they_end: (
        test_refusal_control.test_a_rate_is_learned_from_refusals_too_late_for_a_trial_if_they_name_it
    ),
    bugs.a_learned_rate_is_believed_however_far_it_falls: (
        test_learned_rate.test_refusals_that_go_on_however_slowly_calls_are_sent_show_that_no_rate_is_the_cause
    ),
    bugs.a_call_that_is_rejected_earns_retries: (
        test_call_flow.test_a_call_that_is_rejected_earns_no_retries_and_one_that_is_sent_does
    ),
    bugs.a_retry_for_which_no_time_is_left_hides_the_answer_of_the_provider: (
        test_call_flow.test_a_retry_whose_deadline_passes_in_the_queue_ends_the_flow_with_the_last_result
    ),
    bugs.a_learned_rate_that_falls_is_never_checked: (
        test_learned_rate.test_a_rate_that_falls_though_it_has_not_risen_is_checked_by_far_faster_calls
    ),
    bugs.a_check_that_fails_says_nothing_for_a_rate: (
        test_learned_rate.test_a_check_that_accepts_few_calls_makes_it_two_again
    ),
    bugs.a_raised_rate_that_is_refused_at_once_is_guessed_again: (
        test_learned_rate.test_a_raised_rate_that_is_refused_twice_at_once_falls_to_the_one_before_it_rose
    ),
    bugs.a_refused_call_waits_for_a_retry_after_that_was_too_long_before: (
        test_misleading_headers.test_a_retry_after_is_not_waited_for_once_one_was_too_long
    ),
    bugs.a_penalty_is_tried_again_at_once: (
        test_refusal_control.test_after_a_penalty_for_calls_in_flight_their_number_stays_below_for_a_time
    ),
    bugs.a_refusal_empties_the_quota_of_a_day: (
        test_rate_limiter.test_a_refusal_that_can_be_for_a_minute_leaves_the_quota_of_a_day
    ),
    bugs.a_remaining_amount_that_never_changes_is_believed: (
        test_observed.test_a_remaining_amount_that_never_changes_while_calls_are_accepted_is_not_believed
    ),
    bugs.a_refusal_makes_a_made_up_remaining_amount_credible: (
        test_observed.test_a_refusal_does_not_make_a_made_up_remaining_amount_credible_in_the_next_window
    ),
    bugs.what_headers_took_off_one_window_is_returned_to_another: (
        test_observed.test_what_headers_took_off_a_window_is_not_returned_in_the_next
    ),
    bugs.a_quota_that_headers_show_is_never_doubted: (
        test_observed.test_a_call_that_a_learned_quota_does_not_allow_goes_as_a_trial_now_and_then
    ),
    bugs.refused_trials_of_a_quota_are_repeated_at_once: (
        test_quota_doubt.test_each_refused_trial_makes_the_next_one_rarer_up_to_one_an_hour
    ),
    bugs.a_trial_that_was_left_is_sent_again_soon: (
        test_quota_debt.test_a_learned_quota_is_believed_although_nearly_all_callers_leave
    ),
    bugs.a_call_that_timed_out_was_accepted: (
        test_quota_debt.test_a_learned_quota_is_believed_although_nearly_all_callers_leave
    ),
    bugs.accepted_calls_do_not_tell_a_period: (
        test_observed.test_more_calls_than_a_minute_grants_show_that_a_small_limit_is_one_of_a_second
    ),
    bugs.limits_that_come_and_go_are_believed: test_observed.test_limits_that_come_and_go_are_not_believed,
    bugs.a_used_up_window_gets_refunds: (
        test_observed.test_a_used_up_window_gets_no_refund_of_what_was_estimated_too_high
    ),
    bugs.a_retry_loses_its_place_in_its_backoff: (
        test_upstream_retries.test_a_retry_keeps_its_place_in_a_window_that_others_would_use_up
    ),
    bugs.the_place_of_a_call_that_left_is_kept: (
        test_upstream_retries.test_a_call_that_leaves_in_its_backoff_keeps_no_place
    ),
    bugs.of_two_retries_the_one_with_the_earlier_deadline_goes_first: (
        test_fair_order.test_of_two_retries_the_one_that_asked_first_goes_first
    ),
    bugs.retries_that_help_use_up_the_budget_for_failures: (
        test_upstream_retries.test_a_retry_of_a_failed_call_that_helps_uses_up_no_budget
    ),
    bugs.a_call_that_is_refused_for_a_quota_loses_its_place: (
        test_upstream_retries.test_a_call_that_is_refused_for_a_quota_waits_on_for_it_as_if_it_had_not_been_sent
    ),
    bugs.a_call_that_is_not_retried_is_tried: test_upstream_retries.test_a_call_that_is_not_retried_is_no_trial_call,
    bugs.a_web_page_from_elsewhere_may_call: test_gateway_attacks.test_a_foreign_web_page_is_rejected,
    bugs.a_revoked_key_is_valid_until_a_restart: (
        test_gateway_keys.test_calls_in_progress_of_a_revoked_key_end_as_they_are
    ),
    bugs.a_changed_key_has_its_budget_again: test_gateway_key_limits.test_a_raised_budget_keeps_what_was_spent,
    bugs.a_key_for_some_models_is_for_all: test_gateway_keys.test_a_key_for_some_models_is_for_no_others,
    bugs.credentials_of_a_caller_go_with_the_held_key: (
        test_gateway_provider_keys.test_a_call_is_sent_with_the_held_key_where_its_provider_reads_it
    ),
    bugs.callers_of_different_keys_share_connections: test_gateway_connections.test_keys_share_no_connection,
    bugs.heads_that_differ_in_their_headers_are_taken_for_the_same: (
        test_request_head.test_heads_with_different_keys_are_different
    ),
    bugs.bytes_of_a_provider_do_not_begin_its_read_timeout_again: (
        test_read_timeout.test_bytes_begin_the_timeout_again
    ),
    bugs.a_call_that_has_ended_is_aborted: test_abortable_block.test_an_abort_after_its_end_cancels_nothing,
    bugs.a_retry_after_that_litellm_has_renamed_is_not_read: (
        test_rate_limit_headers.test_retry_after_is_read_and_an_invalid_one_is_none
    ),
    bugs.a_connection_is_lent_with_bytes_of_an_earlier_answer: (
        test_gateway_connections.test_bytes_that_have_not_been_read_yet_keep_a_connection_from_being_lent
    ),
    bugs.a_connection_is_lent_that_is_about_to_be_closed: (
        test_gateway_connections.test_no_call_is_sent_on_a_connection_that_is_about_to_be_closed
    ),
    bugs.a_body_that_becomes_invalid_leaves_its_reader_waiting: (
        test_gateway_attacks.test_an_invalid_body_ends_its_call
    ),
    bugs.bytes_behind_a_response_lose_it: test_gateway_attacks.test_bytes_behind_any_whole_response_are_dropped,
    bugs.decompression_ends_with_the_first_member: (
        test_gateway_responses.test_streams_compressed_in_any_way_are_metered_and_no_faults
    ),
    bugs.responses_take_any_memory_together: (
        test_gateway_responses.test_responses_are_bounded_together_and_pass_without_being_held
    ),
    bugs.what_is_bound_to_fail_again_is_sent_again: test_gateway_attacks.test_an_invalid_response_is_a_502,
    bugs.a_process_without_files_blames_its_provider: (
        test_gateway_responses.test_a_process_without_files_is_no_fault_of_the_provider
    ),
    bugs.a_models_name_beyond_the_bound_has_series_of_its_own: (
        test_gateway_metrics.test_models_beyond_the_bound_count_together
    ),
    bugs.tokens_of_a_stored_response_are_counted_at_each_fetch: (
        test_gateway_metrics.test_a_stored_response_that_is_fetched_counts_no_tokens_again
    ),
    bugs.the_last_callers_are_reset: (test_gateway_end.test_a_caller_that_is_about_to_send_its_first_request_is_told),
    bugs.sinks_are_called_in_the_middle_of_the_supervisors_work: (
        test_hooks.test_a_sink_that_submits_never_exceeds_the_limit_of_a_worker
    ),
    bugs.a_hook_that_raises_stops_its_caller: test_hooks.test_no_hook_costs_a_slot_a_ticket_or_the_limit,
    bugs.ctrl_c_is_taken_for_a_failure: test_hooks.test_ctrl_c_leaves_the_loop_once_everything_is_in_order,
    bugs.a_cancelled_await_goes_on_without_its_slot: (
        test_nested.test_timeouts_around_an_await_put_no_more_to_work_than_there_are_slots
    ),
    bugs.a_slot_that_was_ended_at_once_raises_a_bare_cancellation: (
        test_slot.test_a_slot_that_is_granted_and_ended_in_one_turn_of_the_loop_says_so
    ),
    bugs.only_one_reader_of_a_subscription_is_woken: (
        test_events.test_several_may_read_one_subscription_and_none_waits_in_vain
    ),
    bugs.a_worker_takes_tasks_before_its_handler_has_started: (
        test_lifecycle.test_a_worker_registered_after_the_start_takes_no_task_before_its_handler_has_started
    ),
    bugs.a_worker_that_cannot_be_started_leaves_its_tasks_waiting: (
        test_lifecycle.test_a_worker_whose_start_fails_is_failed_until_it_starts
    ),
    bugs.a_stored_task_is_held_though_its_worker_cannot_be_started: (
        test_lifecycle.test_a_stored_task_that_waits_for_a_start_that_fails_runs_after_the_next_one
    ),
    bugs.closing_ignores_a_start_in_progress: test_lifecycle.test_closing_undoes_a_start_in_progress,
    bugs.the_first_caller_of_a_key_takes_the_task_with_it: (
        test_overflow.test_a_keyed_task_goes_on_unless_all_its_callers_leave_while_the_store_decides
    ),
    bugs.only_those_who_wait_for_the_store_keep_a_keyed_task: (
        test_overflow.test_a_keyed_task_goes_on_for_a_caller_that_got_it_without_waiting
    ),
    bugs.the_key_of_a_task_that_comes_back_is_not_known: (
        test_overflow.test_the_key_of_a_task_that_comes_back_is_known_though_nobody_held_its_ticket
    ),
    bugs.background_work_that_is_cancelled_gives_nothing_back: (
        test_cancelled_tasks.test_work_that_is_cancelled_before_its_first_step_gives_back_what_it_was_given
    ),
    bugs.no_deadline_ends_a_task_whose_start_is_not_recorded: (
        test_leases.test_a_deadline_ends_a_task_whose_start_the_store_does_not_record
    ),
    bugs.an_earlier_task_of_the_same_id_ends_a_later_one: (
        test_overflow.test_an_id_may_be_used_again_once_its_task_has_ended_wherever_it_waited
    ),
    bugs.a_task_costs_more_the_more_types_its_worker_has: (
        test_pools.test_a_task_costs_the_same_on_a_worker_of_a_thousand_types
    ),
    bugs.a_worker_of_many_types_never_serves_the_pool_that_it_passes_over: (
        test_pools.test_the_waiting_pool_with_the_most_urgent_head_is_next_and_none_is_passed_over_for_long
    ),
    bugs.a_submission_waits_for_a_silent_overflow_without_a_bound: (
        test_silent_store.test_nobody_waits_for_the_overflow_for_longer_than_the_task_may_take
    ),
    bugs.draining_does_not_report_what_the_overflow_has_not_answered: (
        test_silent_store.test_draining_reports_the_tasks_whose_end_the_overflow_has_not_stored
    ),
    bugs.a_drain_does_not_notice_that_a_run_begins_to_wait: (
        test_drain.test_a_run_that_awaits_a_task_of_the_supervisor_above_finishes_though_others_here_cannot_start
    ),
    bugs.a_drain_takes_a_run_that_awaits_another_supervisor_for_stuck: (
        test_drain.test_a_run_that_awaits_a_task_of_the_supervisor_above_finishes_though_others_here_cannot_start
    ),
    bugs.draining_without_a_limit_waits_for_a_silent_overflow: (
        test_silent_store.test_draining_without_a_limit_waits_for_what_runs_and_not_for_a_silent_overflow
    ),
    bugs.a_task_that_is_stored_as_draining_begins_waits_for_the_close: (
        test_silent_store.test_a_task_that_is_stored_as_draining_begins_does_not_wait_for_the_close
    ),
    bugs.draining_does_not_wait_for_the_end_of_a_task_in_the_overflow: (
        test_silent_store.test_draining_waits_for_the_end_of_a_cancelled_task_that_waits_in_the_overflow
    ),
    bugs.a_task_that_is_stored_after_its_ticket_has_ended_runs_again: (
        test_silent_store.test_a_task_that_is_stored_after_its_ticket_has_ended_does_not_run_again
    ),
    bugs.a_slow_overflow_gets_more_and_more_work: (
        test_shared_overflow.test_a_slow_store_gets_no_more_work_until_it_is_faster
    ),
    bugs.leases_that_nobody_could_renew_are_taken_back_at_once: (
        test_shared_overflow.test_leases_that_nobody_could_renew_are_not_taken_back_at_once
    ),
    bugs.an_end_that_the_overflow_did_not_take_is_forgotten: (
        test_shared_overflow.test_the_end_of_a_task_is_kept_until_the_store_is_back
    ),
    bugs.a_repeated_write_is_acknowledged_before_the_replicas_have_it: (
        test_redis_failover.test_a_repeated_write_is_acknowledged_only_once_a_replica_has_it
    ),
    bugs.closing_leaves_a_submission_to_a_store_that_does_not_answer: (
        test_drain.test_closing_ends_a_submission_that_the_store_does_not_answer
    ),
    bugs.closing_awaits_a_stop_without_a_bound: (
        test_lifecycle.test_a_stop_that_does_not_return_does_not_keep_a_supervisor_from_closing
    ),
    bugs.a_start_that_is_cancelled_is_not_tried_again: (
        test_cancelled_tasks.test_a_start_that_is_cancelled_has_failed_and_is_tried_again
    ),
    bugs.a_keyed_task_ends_while_others_wait_for_the_lookup_of_its_key: (
        test_overflow.test_a_keyed_task_goes_on_for_those_who_still_wait_for_the_lookup_of_its_key
    ),
    bugs.an_ended_task_holds_what_its_handler_held: (
        test_events.test_an_ended_task_keeps_no_local_variable_of_its_handler
    ),
    bugs.ended_tasks_are_kept_whatever_their_size: test_events.test_the_memory_of_ended_tasks_is_bounded_in_bytes,
    bugs.a_stored_error_is_raised_again_itself: (
        test_events.test_an_error_that_is_raised_again_and_again_collects_no_traceback
    ),
    bugs.a_limit_that_raises_costs_a_permit: test_guarded_limit.test_a_limit_that_raises_costs_no_permit,
    bugs.a_bound_that_the_endpoint_ignores_bounds_its_cost: (
        test_budget_attacks.test_a_bound_that_the_endpoint_does_not_know_bounds_nothing
    ),
    bugs.a_list_of_prompts_is_reserved_as_one: (
        test_budget_attacks.test_each_prompt_of_a_legacy_completion_is_reserved
    ),
    bugs.tools_within_the_input_pass: test_metering.test_a_tool_within_the_input_is_looked_at_too,
    bugs.models_that_may_answer_instead_are_free: test_budget_attacks.test_of_several_models_the_dearest_is_reserved,
    bugs.a_field_whose_cost_no_usage_tells_passes: test_metering.test_a_field_whose_cost_no_usage_tells_is_unpriced,
    bugs.each_spelling_of_a_key_is_an_account: test_credentials.test_every_spelling_of_a_key_is_one_account,
    bugs.junk_in_a_header_that_is_not_read_makes_an_account: (
        test_credentials.test_headers_that_the_provider_does_not_read_make_no_account
    ),
    bugs.another_provider_gets_all_headers: test_reroute.test_another_provider_gets_no_header_that_it_does_not_need,
    bugs.a_complete_stream_without_usage_costs_its_text: (
        test_budget_attacks.test_a_whole_stream_without_usage_counts_as_reserved
    ),
    bugs.a_dropped_answer_goes_on_at_its_provider: (
        test_dropped_streams.test_a_stream_that_is_dropped_unread_is_closed_before_its_permit_is_released
    ),
    bugs.an_alias_is_sent_as_it_was_named: (test_gateway_models.test_an_alias_is_sent_as_the_model_that_it_stands_for),
    bugs.the_account_of_a_caller_is_sent_with_the_key_of_the_gateway: (
        test_gateway_models.test_the_keys_of_a_target_share_its_calls_and_no_caller_s_key_is_sent
    ),
    bugs.a_full_account_gets_the_next_call_while_another_is_free: (
        test_load_balancing.test_a_full_account_gets_no_call_while_another_has_room
    ),
    bugs.a_key_that_is_refused_ends_the_call: (
        test_gateway_models.test_a_key_that_the_provider_refuses_fails_no_call_and_is_soon_left_alone
    ),
    bugs.any_caller_may_use_the_key_of_a_fallback: (
        test_gateway_attacks.test_callers_whose_key_was_not_tried_get_no_key_of_a_fallback
    ),
    bugs.a_call_is_judged_by_all_that_wait: (
        test_decisions.test_a_flood_of_one_tenant_and_of_new_runs_keeps_nobody_out_who_goes_before_it
    ),
    bugs.calls_that_leave_take_their_turns_with_them: (
        test_call_queue.test_a_patient_call_takes_the_turn_of_those_that_have_left_before_it
    ),
    bugs.a_call_waits_for_the_slot_of_its_own_caller: (
        test_nested_calls.test_a_call_that_waits_for_the_slot_of_its_own_caller_is_rejected_at_once
    ),
    bugs.what_a_nested_upstream_has_judged_counts_again: (
        test_upstream_retries.test_an_error_of_a_nested_upstream_is_no_fault_of_the_guarded_one
    ),
    # fan-outs and waiting for room
    bugs.who_leaves_a_fan_out_leaves_its_tasks_behind: test_fan_out.test_leaving_the_loop_cancels_what_is_outstanding,
    bugs.agents_that_read_a_fan_out_keep_their_slots: test_fan_out.test_nested_fan_outs_never_deadlock,
    bugs.runs_take_their_slots_back_before_they_look_for_room: (
        test_fan_out.test_runs_that_look_for_room_do_not_take_it_themselves
    ),
    bugs.the_next_in_line_for_room_is_not_woken: (
        test_room.test_a_thousand_producers_are_admitted_in_the_order_in_which_they_came
    ),
    bugs.a_fan_out_has_no_limit: test_fan_out.test_the_limit_counts_tasks_of_all_types,
    bugs.a_leaving_worker_runs_no_nested_task: (
        test_worker_changes.test_a_run_on_a_leaving_worker_may_use_nested_tasks_of_the_same_worker
    ),
    bugs.a_leaving_worker_begins_new_runs: (
        test_worker_changes.test_a_leaving_worker_begins_nothing_new_and_has_no_slots
    ),
    bugs.what_waits_for_a_worker_that_is_gone_waits_forever: (
        test_worker_changes.test_what_waits_for_the_last_worker_of_a_type_fails_once_that_is_gone
    ),
    bugs.a_stored_task_of_a_stopped_worker_is_lost: (
        test_worker_changes.test_a_stored_task_that_is_cut_off_keeps_its_ticket_and_runs_on_another_worker
    ),
    bugs.a_selection_keeps_workers_that_are_gone: test_worker_changes.test_nothing_of_an_unregistered_worker_is_kept,
    bugs.a_record_is_leased_for_a_type_that_is_paused: (
        test_worker_changes.test_what_is_stored_of_a_paused_type_stays_in_the_overflow
    ),
    bugs.a_paused_type_has_the_room_of_its_slots: (
        test_worker_changes.test_a_paused_type_takes_what_fits_into_its_queue_and_no_more
    ),
    bugs.a_drain_waits_for_a_type_that_is_paused: (test_worker_changes.test_draining_does_not_wait_for_what_is_paused),
    bugs.a_larger_worker_waits_for_the_next_event: test_worker_changes.test_more_slots_take_waiting_tasks_at_once,
    # supervision
    bugs.a_start_that_only_connects_is_not_told_what_a_life_is: (
        test_supervision.test_an_async_start_that_only_connects_is_told_what_a_life_is
    ),
    bugs.a_worker_whose_life_has_ended_is_not_started_again: (
        test_supervision.test_a_worker_whose_life_crashed_is_started_again_and_goes_on_with_what_waits
    ),
    bugs.a_transient_worker_is_restarted_like_a_permanent_one: (
        test_supervision.test_a_restart_depends_on_the_type_of_the_worker_and_the_end_of_its_life
    ),
    bugs.restarts_are_not_bounded: (
        test_supervision.test_one_restart_too_many_makes_a_worker_failed_until_it_is_revived
    ),
    bugs.restarts_of_any_time_count: (test_supervision.test_restarts_that_are_far_apart_are_not_too_many),
    bugs.workers_that_are_restarted_together_are_stopped_in_order: (
        test_supervision.test_a_nested_supervisor_is_stopped_and_started_with_others
    ),
    bugs.what_runs_on_a_worker_that_is_restarted_goes_on: (
        test_supervision.test_a_worker_whose_life_crashed_is_started_again_and_goes_on_with_what_waits
    ),
    bugs.what_runs_on_a_worker_that_is_restarted_is_forgotten: (
        test_supervision.test_a_worker_whose_life_crashed_is_started_again_and_goes_on_with_what_waits
    ),
    bugs.what_runs_on_a_worker_goes_on_until_it_is_restarted: (
        test_supervision.test_what_runs_on_a_worker_ends_with_its_life_although_another_one_is_being_restarted
    ),
    bugs.a_worker_is_given_tasks_after_the_end_of_its_life: (
        test_supervision.test_workers_without_a_life_are_restarted_with_others_too
    ),
    bugs.background_work_that_a_close_cuts_off_sets_timers: test_timers.test_closed_timers_do_not_fire,
    bugs.a_task_of_a_nested_supervisor_is_over_before_its_handler_has_stopped: (
        test_nested.test_a_retry_waits_for_the_last_attempt_to_stop_in_a_nested_supervisor
    ),
    bugs.an_end_that_was_dealt_with_is_handled_again: (
        test_supervision.test_lives_that_end_at_once_beyond_the_intensity_are_failed_together
    ),
    bugs.ends_of_lives_are_ignored_while_other_workers_start: (
        test_supervision.test_a_life_that_ends_while_others_start_is_restarted_once_all_have_started
    ),
    bugs.the_supervisor_above_does_not_learn_that_one_gives_up: (
        test_supervision.test_a_nested_supervisor_that_gives_up_is_restarted_as_a_whole
    ),
    bugs.a_worker_that_is_failed_for_good_is_tried_again: (
        test_supervision.test_one_restart_too_many_makes_a_worker_failed_until_it_is_revived
    ),
    bugs.what_waits_for_a_worker_that_is_failed_for_good_goes_on_waiting: (
        test_supervision.test_one_restart_too_many_makes_a_worker_failed_until_it_is_revived
    ),
    bugs.a_task_of_a_restarted_worker_counts_against_those_above: (
        test_supervision.test_a_task_that_failed_because_its_worker_was_restarted_has_that_as_its_cause_at_every_level
    ),
    bugs.a_task_of_a_restarted_worker_is_not_retried: (
        test_supervision.test_a_task_with_a_policy_is_retried_after_its_worker_was_restarted
    ),
    bugs.a_life_that_was_never_begun_is_left_behind: (
        test_supervision.test_a_life_that_is_cancelled_before_its_first_step_has_ended_by_a_shutdown
    ),
    bugs.a_restart_that_is_cut_off_leaves_its_workers_behind: (
        test_supervision.test_a_program_that_cancels_every_asyncio_task_leaves_no_worker_behind
    ),
    bugs.a_worker_that_was_unregistered_while_it_started_lives_on: (
        test_supervision.test_a_worker_that_is_unregistered_while_it_starts_again_is_stopped_and_the_others_go_on
    ),
    bugs.a_restart_is_tried_again_before_the_ends_of_other_lives: (
        test_supervision.test_a_worker_that_does_not_start_again_keeps_no_other_from_it
    ),
    # --- workers that go, and what waits for them ---
    bugs.tasks_of_a_tenant_that_is_blocked_outlive_the_last_worker_of_their_type: (
        test_worker_changes.test_tasks_of_a_tenant_that_runs_as_much_as_it_may_end_with_the_last_worker_of_their_type
    ),
    bugs.a_record_comes_back_for_workers_that_are_gone: (
        test_worker_changes.test_a_record_that_comes_back_while_a_zombie_keeps_its_type_waits_for_the_next_worker
    ),
    bugs.a_task_goes_back_to_memory_for_workers_that_are_gone: (
        test_worker_changes.test_a_task_that_runs_on_the_last_worker_and_goes_back_to_an_overflow_in_memory_ends
    ),
    bugs.a_worker_of_no_run_is_revived: test_worker_changes.test_reviving_a_worker_that_is_gone_does_nothing,
    bugs.a_removal_that_is_cancelled_is_forgotten: (
        test_worker_changes.test_a_program_that_cancels_every_asyncio_task_does_not_keep_a_worker_that_goes
    ),
    bugs.a_restart_that_is_cancelled_is_forgotten: (
        test_supervision.test_a_restart_that_is_cancelled_while_it_waits_for_handlers_is_not_forgotten
    ),
    bugs.a_stop_that_is_cancelled_leaves_the_others_running: (
        test_supervision.test_a_close_while_a_failed_start_is_undone_leaves_no_life_behind
    ),
    bugs.a_run_that_is_cancelled_before_its_first_step_is_forgotten: (
        test_runners.test_a_run_that_a_program_cancels_before_its_first_step_ends
    ),
    # --- what a web app needs ---
    bugs.a_task_that_expires_as_it_comes_back_cannot_be_found: (
        test_overflow.test_a_deadline_that_passed_before_a_restart_ends_the_task_unstarted
    ),
    bugs.orphans_return_their_slot_to_the_next_run: (
        test_restart.test_a_handler_that_outlived_the_close_has_no_slot_in_the_next_run
    ),
    bugs.workers_keep_what_happened_to_them_when_their_supervisor_starts_again: (
        test_restart.test_a_failed_worker_begins_the_next_run_with_its_breaker_closed
    ),
    bugs.a_run_outlives_its_event_loop: test_restart.test_a_nested_supervisor_whose_loop_ended_starts_again_too,
    bugs.a_store_waits_for_a_loop_that_has_ended: (
        test_restart.test_a_store_whose_loop_ended_before_it_was_closed_opens_again
    ),
    bugs.a_log_of_events_has_what_handlers_report: test_json.test_events_for_a_log_leave_out_what_handlers_return,
    bugs.the_slot_of_a_thread_is_free_when_its_time_is_up: (
        test_portal.test_a_block_that_takes_too_long_keeps_its_slot_until_it_is_left
    ),
    bugs.workers_count_no_failed_attempts: (
        test_worker_counters.test_a_retried_task_counts_each_attempt_and_the_supervisor_the_task
    ),
    bugs.a_found_task_runs_as_it_was_read: (
        test_stored_tickets.test_a_task_that_was_found_before_its_type_was_declared_runs_with_its_declared_type
    ),
    # tasks with deadlines that wait
    bugs.every_task_is_judged_as_if_it_were_like_the_others: (
        test_start_deadlines.test_a_task_with_an_estimate_is_compared_with_tasks_of_its_size
    ),
    bugs.estimates_that_predict_nothing_are_used: (
        test_estimated_times.test_estimates_that_grow_where_times_fall_are_not_used
    ),
    bugs.a_burst_is_judged_as_a_queue_that_stands: (
        test_start_deadlines.test_a_task_is_rejected_if_the_wait_leaves_too_little_time_for_most_tasks
    ),
    bugs.no_queue_stands: (test_pool.test_a_task_may_not_wait_that_long_while_the_queue_of_its_priority_stands),
    bugs.a_task_that_may_be_cut_off_takes_the_slot_of_those_not_admitted: (
        test_start_deadlines.test_a_task_that_may_be_cut_off_gives_way_only_while_others_are_not_admitted
    ),
    bugs.answers_of_the_overflow_wake_who_waits_for_room: (
        test_room.test_whoever_waits_does_not_ask_the_overflow_all_the_time
    ),
    bugs.who_is_blocked_holds_up_the_line_for_room: (
        test_room.test_a_message_whose_conversation_is_full_lets_others_pass
    ),
    bugs.a_reader_that_is_cancelled_submits_its_task_again: (
        test_fan_out.test_a_reader_that_is_cancelled_while_the_overflow_answers_can_go_on
    ),
    bugs.tasks_of_a_declared_type_outlive_their_fan_out: (
        test_fan_out.test_leaving_cancels_tasks_whose_payload_was_made_of_the_declared_type
    ),
    bugs.a_quorum_waits_for_its_reader: (
        test_fan_out.test_a_quorum_cancels_the_rest_however_slowly_the_results_are_read
    ),
    bugs.a_task_that_is_left_in_the_overflow_is_an_error_of_a_callback: (
        test_fan_out.test_tasks_that_are_left_in_the_overflow_end_the_iteration_unless_a_quorum_was_made
    ),
    bugs.second_attempts_run_in_the_context_of_a_timer: (
        test_fan_out.test_a_second_attempt_is_nested_in_the_run_that_reads_the_fan_out
    ),
    bugs.tasks_without_variables_run_in_one_context: (
        test_handler_context.test_what_a_handler_sets_is_seen_by_no_other_task_of_a_submitter_without_variables
    ),
    bugs.the_reader_of_a_fan_out_that_is_left_waits_on: (
        test_fan_out.test_the_reader_of_a_fan_out_that_is_left_meanwhile_ends
    ),
    # retries of tasks
    bugs.a_task_has_one_attempt_more_than_its_policy: test_retries.test_a_task_ends_as_its_last_attempt_did,
    bugs.a_task_keeps_its_slot_between_its_attempts: test_retries.test_a_task_holds_no_slot_between_its_attempts,
    bugs.retries_take_nothing_from_the_budget: test_retries.test_the_retry_budget_bounds_the_retries_of_all_tasks,
    bugs.a_retry_goes_before_all_that_wait: test_retries.test_a_retry_goes_to_the_end_of_its_queue,
    bugs.a_key_remembers_a_task_that_failed: test_retries.test_a_key_remembers_success_only,
    bugs.a_restart_forgets_the_attempts_that_failed: (
        test_delayed_tasks.test_another_process_makes_the_next_attempt_and_counts_those_before
    ),
    bugs.a_ticket_that_is_looked_up_knows_no_attempts: (
        test_delayed_tasks.test_a_task_that_is_cancelled_where_it_was_looked_up_has_the_attempts_of_its_record
    ),
    bugs.a_stored_task_that_failed_for_good_is_no_dead_letter: (
        test_stored_retries.test_a_spilled_task_is_retried_until_it_is_a_dead_letter
    ),
    bugs.a_retry_in_the_store_waits_for_maintenance: (
        test_delayed_tasks.test_a_retry_in_the_store_does_not_wait_for_maintenance
    ),
    bugs.the_store_does_not_count_the_attempts_that_failed: test_task_store.test_failures_and_delays_add_up,
    bugs.a_woken_record_that_has_ended_is_counted_as_waiting: (
        test_delayed_tasks.test_a_delayed_record_that_was_woken_and_has_ended_is_counted_no_more
    ),
    bugs.a_task_on_its_way_to_the_store_needs_its_pool: (
        test_delayed_tasks.test_a_drain_ends_though_the_store_is_slow_to_take_back_a_task_whose_worker_is_gone
    ),
    bugs.an_orderly_stop_forgets_the_attempts_that_failed_here: (
        test_stored_retries.test_an_orderly_stop_keeps_the_failures_of_a_message_whose_followers_are_here
    ),
    bugs.attempts_that_failed_here_count_as_lost_leases: (
        test_stored_retries.test_the_store_knows_the_failures_of_a_message_that_is_tried_again_here
    ),
    # tasks that wait for their time, and overflows that processes share
    bugs.a_task_does_not_wait_for_its_time: test_not_before.test_a_task_starts_at_its_time,
    bugs.a_drain_waits_for_a_task_of_tomorrow: test_not_before.test_draining_cancels_what_nothing_keeps,
    bugs.a_conversation_waits_behind_one_that_waits_for_its_time: (
        test_task_store.test_a_record_joins_its_conversation_at_its_time
    ),
    bugs.a_task_that_waits_here_passes_its_conversation_in_the_overflow: (
        test_not_before.test_one_that_may_not_spill_waits_here_and_not_ahead_of_its_conversation_in_the_overflow
    ),
    bugs.a_cancelled_task_leaves_its_time_behind: test_not_before.test_cancelling_many_keeps_no_times_of_them,
    bugs.a_task_that_another_process_has_stored_waits_for_the_heartbeat: (
        test_many_supervisors.test_a_task_starts_soon_in_an_idle_process
    ),
    bugs.a_busy_process_overlooks_what_others_have_stored: (
        test_many_supervisors.test_a_record_that_waits_for_nothing_but_a_slot_starts_when_one_is_free
    ),
    bugs.the_result_of_another_process_waits_for_the_heartbeat: (
        test_many_supervisors.test_a_result_of_another_process_is_noticed_by_all_who_await_it
    ),
    bugs.all_processes_ask_for_a_record_at_once: (
        test_many_supervisors.test_idle_supervisors_do_not_all_ask_for_the_same_record
    ),
    bugs.a_process_takes_records_that_its_upstream_cannot_serve: (
        test_many_supervisors.test_records_are_left_to_others_while_an_upstream_is_under_pressure
    ),
    bugs.a_call_whose_answer_was_lost_is_done_again: (
        test_redis_store.test_a_call_whose_connection_breaks_is_done_once
    ),
    bugs.producers_wait_for_workers_that_are_given_up: (
        test_supervision.test_nobody_waits_for_room_at_workers_that_are_given_up
    ),
    bugs.a_client_goes_on_with_records_that_are_gone: (
        test_redis_lost.test_a_store_says_once_that_its_records_are_gone_and_goes_on
    ),
    bugs.what_runs_here_is_not_stored_again_after_its_record_was_lost: (
        test_redis_lost.test_what_runs_and_waits_in_a_live_process_is_stored_again_and_ends
    ),
    bugs.what_waited_here_is_not_stored_again_after_its_lease_lapsed_and_its_record_was_lost: (
        test_redis_lost.test_a_task_whose_lease_lapsed_while_the_server_was_away_runs_once_it_is_back_without_records
    ),
    bugs.what_another_process_runs_is_stored_again_at_once: (
        test_redis_lost.test_what_another_process_runs_is_not_run_again_after_the_loss
    ),
    bugs.what_is_returned_to_a_store_that_loses_its_records_is_lost: (
        test_redis_lost.test_closing_leaves_what_waits_to_the_next_process_though_the_loss_was_not_noticed
    ),
    bugs.the_result_of_a_handler_whose_record_has_gone_is_dropped: (
        test_redis_lost.test_a_handler_whose_record_has_gone_delivers_its_result
    ),
    bugs.a_store_that_is_away_is_logged_for_each_task: (
        test_failure_log.test_a_store_that_is_away_is_logged_in_one_line_now_and_then
    ),
    bugs.a_call_that_arrives_after_later_ones_is_done: (
        test_redis_store.test_a_group_that_arrives_after_the_client_has_gone_on_is_not_done
    ),
    bugs.a_record_that_redis_did_not_acknowledge_stays: (
        test_redis_store.test_a_record_whose_storing_was_reported_as_failed_is_taken_back
    ),
    bugs.a_record_is_taken_back_that_another_process_runs: (
        test_redis_store.test_a_record_that_another_process_runs_is_not_taken_back
    ),
    bugs.a_record_is_taken_back_that_another_call_has_put: (
        test_redis_store.test_what_is_taken_back_was_put_by_that_call
    ),
    bugs.the_end_of_a_lease_whose_answer_was_lost_is_rejected: (
        test_redis_store.test_the_end_of_a_lease_that_was_reported_as_failed_succeeds_when_it_is_tried_again
    ),
    bugs.a_write_is_acknowledged_before_the_replicas_have_it: (
        test_redis_store.test_a_record_that_too_few_replicas_have_is_rejected_and_taken_back
    ),
    bugs.a_record_can_be_leased_before_it_is_acknowledged: (
        test_redis_store.test_a_record_cannot_be_leased_before_it_is_acknowledged
    ),
    bugs.a_parked_record_can_be_leased_before_it_is_acknowledged: (
        test_redis_store.test_a_recorded_task_that_is_parked_does_not_wait_before_it_is_acknowledged
    ),
    bugs.leases_expire_by_the_clock_of_whoever_looks: (
        test_redis_store.test_the_clock_is_compared_when_a_store_is_opened
    ),
    bugs.a_redis_that_drops_the_memory_of_calls_is_opened: test_redis_store.test_a_server_that_drops_keys_is_not_opened,
    bugs.a_mistyped_url_shows_the_value_of_any_option: (
        test_url.test_a_rejection_shows_nothing_that_could_be_a_password
    ),
    bugs.the_smallest_bound_says_what_redis_keeps: (
        test_task_store.test_a_process_with_a_smaller_bound_drops_nothing_of_the_others
    ),
    bugs.a_clock_that_agrees_within_a_second_is_corrected: (
        test_redis_clock.test_it_is_in_whole_seconds_and_zero_for_clocks_that_agree
    ),
    bugs.a_handler_starts_before_the_replicas_know_its_lease: (
        test_redis_failover.test_a_start_that_a_replica_does_not_have_is_not_acknowledged
    ),
    bugs.a_lost_lease_is_hidden_by_replicas_that_are_missing: (
        test_redis_failover.test_a_recorded_task_whose_lease_is_lost_with_the_master_does_not_start
    ),
    bugs.leases_that_lapsed_while_redis_was_away_are_taken_at_once: (
        test_redis_away.test_after_the_server_was_away_for_a_lease_no_process_takes_what_another_runs
    ),
    bugs.a_redis_that_was_away_is_not_noticed: (test_redis_store.test_a_master_that_one_call_waited_for_was_away),
    bugs.a_full_redis_lets_no_task_end: (test_redis_store.test_a_full_server_rejects_records_and_lets_those_it_has_end),
    bugs.a_redis_that_drops_keys_is_opened: test_redis_store.test_a_server_that_drops_keys_is_not_opened,
    bugs.a_redis_that_was_away_is_waited_for_by_each_call: (
        test_redis_store.test_a_store_that_is_away_answers_within_its_patience_and_then_at_once
    ),
    bugs.the_event_loop_lists_what_a_process_has_started: (
        test_process_engine.test_what_a_process_has_started_is_not_listed_in_the_event_loop
    ),
    bugs.a_checkpoint_is_written_before_its_values: (
        test_langgraph_saver.test_a_run_that_is_killed_before_any_of_its_writes_goes_on_where_it_was
    ),
    bugs.a_thread_loses_its_values_before_its_checkpoints: (
        test_langgraph_saver.test_a_deletion_that_is_killed_leaves_no_damaged_checkpoint
    ),
    bugs.a_task_that_writes_again_replaces_what_it_wrote: (
        test_langgraph_saver.test_a_write_stays_and_one_of_a_special_kind_is_replaced
    ),
    bugs.the_writes_of_a_task_are_entries_of_their_own: (
        test_langgraph_saver.test_the_writes_of_a_task_are_there_as_a_whole_or_not_at_all
    ),
    bugs.the_latest_checkpoint_is_found_among_all: (
        test_langgraph_saver.test_reading_the_latest_checkpoint_costs_the_same_however_many_there_are
    ),
    bugs.pruning_deletes_what_a_delta_channel_is_made_from: (
        test_langgraph_saver.test_pruning_keeps_what_a_delta_channel_is_made_from
    ),
    bugs.pruning_deletes_what_is_written_meanwhile: (
        test_langgraph_saver.test_a_checkpoint_that_is_written_while_others_are_pruned_stays
    ),
    bugs.pruning_leaves_what_a_crash_left: test_langgraph_saver.test_what_a_crash_left_is_pruned_once_it_is_old,
    bugs.a_checkpoint_that_was_deleted_is_damaged: (
        test_langgraph_saver.test_a_checkpoint_that_is_deleted_while_it_is_read_is_gone_or_whole
    ),
    bugs.a_thread_is_entered_in_the_index_on_any_shard: test_langgraph_saver.test_a_thread_needs_no_shard_but_its_own,
    bugs.a_thread_that_is_deleted_counts_as_entered: (
        test_langgraph_saver.test_a_thread_that_is_written_to_after_it_was_deleted_is_listed
    ),
    bugs.two_runs_from_one_checkpoint_give_their_values_the_same_version: (
        test_langgraph_saver.test_a_run_from_an_earlier_checkpoint_does_not_touch_the_later_ones
    ),
    bugs.reading_an_item_does_not_put_its_expiry_off: test_langgraph_store.test_reading_an_item_puts_its_expiry_off,
    bugs.an_operation_does_not_move_its_entry_first: (
        test_moving.test_updates_lose_nothing_while_processes_move_entries_and_die
    ),
    bugs.what_was_removed_while_it_moved_leaves_no_tombstone: (
        test_moving.test_what_was_deleted_or_has_expired_does_not_come_back
    ),
    bugs.a_call_that_fails_late_opens_a_closed_shard_again: (
        test_state_misuse.test_a_call_that_fails_once_the_state_is_closed_does_not_open_the_shard_again
    ),
    bugs.an_entry_is_moved_to_where_it_is: test_state_moving.test_a_server_under_another_name_keeps_its_entries,
    bugs.a_scan_does_not_read_the_old_shards: test_moving.test_a_scan_sees_each_entry_once_while_it_is_moved,
    bugs.a_read_that_an_invalidation_has_overtaken_is_kept: (
        test_near_cache.test_a_read_that_an_invalidation_has_overtaken_keeps_nothing
    ),
    bugs.a_near_cache_is_kept_while_nobody_listens: (
        test_near_cache.test_nothing_is_kept_unless_the_server_that_is_read_from_is_listened_to
    ),
    bugs.a_near_cache_answers_for_another_master: (
        test_near_cache.test_nothing_is_kept_unless_the_server_that_is_read_from_is_listened_to
    ),
    bugs.an_update_begins_from_the_near_cache: (
        test_state_near_cache.test_updates_and_conditions_are_decided_by_the_server
    ),
    bugs.a_probe_that_fails_is_the_last_one: test_guarded_shard.test_whatever_a_probe_raises_another_one_follows,
    bugs.a_closed_state_is_used_on: test_guarded_shard.test_a_closed_state_says_so_and_stays_closed,
    bugs.a_blocked_loop_has_missed_the_answers: (
        test_time_limits.test_an_answer_that_came_while_the_loop_was_blocked_is_in_time
    ),
    bugs.an_answer_is_given_with_each_attempt: (
        test_langgraph_resume.test_an_answer_is_not_taken_for_that_to_the_next_question
    ),
    bugs.a_decision_about_an_older_state_of_a_saga_is_written: (
        test_saga_admin.test_of_two_people_one_decides_and_the_other_learns_what_was_decided
    ),
    bugs.a_step_that_is_done_is_said_not_to_be: (test_saga_admin.test_what_can_be_said_of_a_step_depends_on_its_state),
    bugs.a_saga_that_is_not_parked_is_changed: test_saga_admin.test_only_a_parked_saga_is_changed,
    bugs.the_outputs_of_a_saga_are_shown_unasked: test_saga_admin.test_outputs_are_shown_on_demand_alone,
    bugs.a_step_is_called_before_the_log_has_its_start: (
        test_resumed_sagas.test_the_log_has_the_start_of_a_step_before_it_is_called
    ),
    bugs.a_step_is_undone_before_the_log_knows_that_it_has_failed: (
        test_resumed_sagas.test_the_log_knows_that_a_step_has_failed_before_it_is_undone
    ),
    bugs.whoever_lost_a_saga_goes_on_as_if_its_entries_were_written: (
        test_resumed_sagas.test_a_process_whose_clock_is_behind_begins_no_step_of_a_saga_that_was_taken
    ),
    bugs.a_process_that_was_paused_does_not_look_at_its_lease: (
        test_resumed_sagas.test_a_process_paused_between_the_start_of_a_step_and_its_call_does_not_call_it
    ),
    bugs.the_steps_of_a_saga_are_undone_in_the_order_of_their_ends: (
        test_sagas.test_a_saga_whose_step_fails_is_undone_in_reverse_order
    ),
    bugs.a_step_of_unknown_outcome_is_repeated_though_it_may_not_be: (
        test_sagas.test_a_step_whose_outcome_is_unknown_parks_the_saga
    ),
    bugs.a_compensation_has_the_priority_of_its_task: (
        test_sagas.test_a_compensation_passes_a_full_supervisor_and_a_drain
    ),
    bugs.a_saga_waits_for_a_scan_though_its_worker_is_there: (
        test_resumed_sagas.test_a_saga_goes_on_as_soon_as_its_worker_is_registered
    ),
    bugs.a_resumed_task_that_is_tried_again_begins_another_saga: (
        test_resumed_sagas.test_a_saga_that_goes_on_is_the_same_saga_if_its_task_is_tried_again
    ),
    bugs.an_entry_of_a_saga_is_acknowledged_before_its_commit: test_sqlite_log.test_an_acknowledged_entry_is_committed,
    bugs.whoever_lost_a_saga_may_still_write_to_it: test_saga_log.test_an_entry_of_another_process_is_rejected,
    bugs.an_append_cannot_be_repeated: test_saga_log.test_a_repeated_append_writes_nothing_and_succeeds,
    bugs.a_saga_that_a_cancelled_caller_took_stays_taken: test_saga_log.test_what_a_cancelled_caller_took_is_released,
    bugs.two_people_may_decide_about_the_same_saga: test_saga_log.test_of_two_people_who_write_at_once_one_does,
    bugs.sagas_go_on_in_a_file_that_was_removed: test_sqlite_log.test_nothing_is_acknowledged_once_the_file_was_removed,
    bugs.the_end_of_a_step_is_written_by_itself: (
        test_saga_writes.test_the_end_of_a_step_is_written_with_the_start_of_the_next
    ),
    bugs.a_saga_goes_on_before_the_replicas_have_its_entry: (
        test_saga_redis.test_acknowledged_entries_survive_the_master
    ),
    bugs.a_repeated_entry_of_a_saga_is_acknowledged_before_the_replicas_have_it: (
        test_saga_redis.test_on_a_new_connection_what_is_there_already_is_not_acknowledged
    ),
    bugs.a_lost_saga_is_hidden_by_replicas_that_are_missing: (
        test_saga_redis.test_a_lost_fence_is_not_hidden_by_replicas_that_are_missing
    ),
    bugs.a_saga_that_its_caller_was_not_given_stays_leased: (
        test_saga_redis.test_what_was_taken_for_a_caller_that_was_cancelled_is_released
    ),
    bugs.the_late_copy_of_a_call_begins_a_saga_again: (test_saga_redis.test_the_late_copy_of_a_call_changes_nothing),
    bugs.a_full_redis_lets_no_saga_end: (
        test_saga_redis.test_with_its_memory_full_what_has_begun_goes_on_and_nothing_begins
    ),
    bugs.sagas_that_lapsed_while_redis_was_away_are_claimed_at_once: (
        test_saga_redis.test_nothing_is_claimed_until_holders_could_renew_their_leases
    ),
    bugs.a_key_that_expires_no_longer_vanishes_from_scans: (
        test_state.test_a_key_that_is_written_again_at_once_without_a_ttl_stays
    ),
    bugs.a_forked_child_uses_the_store_of_its_parent: (
        test_operation_queue.test_a_forked_child_is_told_that_the_store_is_its_parents
    ),
    bugs.a_call_to_redis_leaves_its_answer_to_the_next: (
        test_redis_master.test_no_call_reads_the_answer_to_one_that_was_broken_off
    ),
    bugs.a_shard_that_hangs_has_no_load: test_state_faults.test_the_load_of_a_slow_shard_is_seen_by_admission,
    bugs.a_large_group_is_one_round_trip: (
        test_operation_queue.test_a_part_has_not_too_many_bytes_unless_one_operation_has
    ),
    bugs.a_node_of_a_step_begins_before_the_checkpoint_ahead_of_it_is_written: (
        test_agent_steps.test_a_node_begins_once_the_checkpoint_before_it_is_written
    ),
    bugs.a_saga_that_is_submitted_again_has_its_agents_begin_again: (
        test_agent_steps.test_a_step_goes_on_from_its_checkpoint_if_its_saga_is_submitted_again
    ),
    bugs.a_saga_goes_on_with_the_payload_of_a_later_submission: (
        test_resubmitted_sagas.test_it_has_the_payload_with_which_it_began
    ),
    bugs.a_saga_is_driven_by_the_function_of_another_one: (
        test_resubmitted_sagas.test_the_key_of_another_saga_does_not_touch_it
    ),
    bugs.an_error_without_a_status_of_its_own_had_no_effect: (
        test_errors_of_clients.test_the_status_says_whether_it_may_have_had_an_effect
    ),
    bugs.an_error_that_says_that_nothing_was_sent_excuses_the_calls_before_it: (
        test_saga_outcomes.test_a_pivot_of_which_an_early_call_may_have_succeeded_is_parked
    ),
    bugs.a_pivot_that_was_never_called_is_called_when_its_saga_is_cut_off: (
        test_saga_outcomes.test_a_pivot_that_is_cut_off_before_the_log_has_its_start_is_not_called
    ),
    bugs.a_function_may_hide_what_ends_its_saga: (
        test_saga_outcomes.test_a_step_whose_check_cannot_be_asked_parks_the_saga_whatever_the_function_makes_of_it
    ),
    bugs.a_pivot_is_settled_for_as_long_as_it_hangs: (
        test_saga_outcomes.test_a_pivot_that_hangs_whenever_it_is_asked_after_is_parked
    ),
    bugs.a_saga_whose_lease_has_lapsed_is_driven_twice: (
        test_saga_outcomes.test_a_saga_whose_lease_has_lapsed_is_not_driven_twice_in_its_own_process
    ),
    bugs.a_step_after_the_pivot_that_gets_no_answer_had_no_effect: (
        test_saga_outcomes.test_a_step_after_the_pivot_without_an_answer_is_not_called_again_when_its_saga_is_retried
    ),
    bugs.an_idempotent_step_that_is_retried_after_the_pivot_had_no_effect_before: (
        test_saga_outcomes.test_an_idempotent_step_after_the_pivot_that_may_have_had_its_effect_is_repeated_when_its_saga_is_retried
    ),
    bugs.the_waits_of_a_step_are_bounded_each_for_itself: (
        test_saga_outcomes.test_the_waits_between_the_attempts_are_bounded_all_together
    ),
    bugs.a_compensation_is_tried_again_whatever_it_raises: (
        test_saga_outcomes.test_what_a_retry_does_not_cover_is_not_tried_again
    ),
    bugs.an_error_without_connection_is_like_one_without_answer: (
        test_step.test_any_other_error_says_that_there_is_none
    ),
    bugs.an_answer_that_cannot_be_read_says_that_there_is_no_effect: (
        test_errors_of_clients.test_an_answer_that_cannot_be_read_leaves_it_open
    ),
    bugs.an_error_after_a_successful_answer_is_a_refusal: (
        test_errors_of_clients.test_a_redirection_that_is_not_followed_leaves_it_open
    ),
    bugs.an_sdk_is_trusted_about_the_attempts_that_it_hides: (
        test_errors_of_clients.test_a_connection_that_is_refused_says_nothing_of_the_attempts_that_an_sdk_made_before
    ),
    bugs.a_step_gets_its_key_in_place_of_an_argument_of_its_own: (
        test_step.test_a_parameter_key_that_is_given_already_keeps_what_it_was_given
    ),
    bugs.a_recorded_outcome_is_given_at_once: (
        test_saga_replay.test_a_saga_ends_as_it_would_have_after_whatever_entry_its_process_is_lost
    ),
    bugs.a_step_that_was_cut_off_has_failed_in_a_replay: (
        test_saga_replay.test_a_saga_ends_as_it_would_have_after_whatever_entry_its_process_is_lost
    ),
    bugs.a_function_that_waits_outside_of_its_steps_has_changed: (
        test_saga_replay.test_a_function_that_waits_between_its_steps_is_replayed_backwards
    ),
    bugs.a_step_inside_a_step_is_let_through: test_saga_replay.test_a_step_inside_a_step_is_invalid,
    bugs.a_cancelled_agent_is_left_in_its_thread: (
        test_agent_thread.test_a_cancelled_run_lasts_until_its_thread_has_stopped_at_the_next_check
    ),
    bugs.an_agent_takes_its_stop_for_a_failed_tool: (
        test_agent_thread.test_what_a_cancelled_run_awaits_in_the_loop_is_cancelled
    ),
    bugs.a_cancelled_agent_does_not_wait_for_tools_whose_caller_was_cancelled: (
        test_tool_threads.test_waiting_lasts_until_a_tool_has_returned_whose_caller_was_cancelled
    ),
    bugs.a_task_of_an_agent_that_exits_ends_the_loop: (
        test_run_tasks.test_a_task_that_exits_fails_instead_of_ending_the_loop
    ),
    bugs.a_failed_agent_leaves_its_tasks: (
        test_run_tasks.test_a_failed_run_cancels_its_tasks_and_lasts_until_they_have_cleaned_up
    ),
    bugs.the_clean_up_of_a_cancelled_tool_is_cancelled_again: (
        test_run_tasks.test_a_task_that_its_framework_has_cancelled_cleans_up_undisturbed
    ),
    bugs.plain_tools_take_the_threads_of_the_loop: (
        test_run_tasks.test_jobs_of_the_loop_itself_run_in_the_executor_that_it_had
    ),
    bugs.an_agent_that_keeps_state_serves_all_tasks: (
        test_as_handler.test_an_agent_that_keeps_state_is_taken_from_a_factory_only
    ),
    bugs.a_factory_may_return_an_agent_that_keeps_state_again: (
        test_as_handler.test_an_agent_that_keeps_state_is_not_taken_twice_from_a_factory
    ),
    bugs.the_first_agent_of_a_factory_is_made_in_the_context_of_its_registration: (
        test_as_handler.test_what_a_factory_sets_for_its_first_agent_is_not_seen_by_later_tasks
    ),
    bugs.a_bound_async_client_sends_in_a_loop_that_a_thread_of_an_agent_makes: (
        test_blocking_client.test_a_bound_async_client_in_a_loop_of_a_thread_sends_in_that_of_the_run
    ),
    bugs.the_agents_of_a_factory_take_any_payload: test_chat_handler.test_the_agents_of_a_factory_check_the_payloads,
    bugs.an_overloaded_in_an_exception_of_a_framework_is_a_failure: (
        test_chat_handler.test_an_overloaded_behind_an_exception_of_a_framework_is_raised
    ),
    bugs.a_thread_that_an_agent_has_left_behind_goes_on: (
        test_agent_thread.test_a_thread_that_a_run_has_left_behind_stops_at_its_next_call
    ),
    bugs.one_of_the_calls_of_an_agent_is_stopped: (
        test_agent_thread.test_all_that_the_threads_of_a_run_await_is_cancelled
    ),
    bugs.the_stream_of_a_stopped_agent_stays_open: (
        test_blocking_client.test_a_stopped_run_closes_the_stream_that_it_reads
    ),
    bugs.a_call_of_an_agent_that_blocks_is_made_in_its_thread: test_blocking_client.test_a_request_is_made_in_the_loop,
    bugs.an_async_client_is_used_in_every_loop: test_blocking_client.test_an_async_client_serves_one_event_loop,
    bugs.a_package_is_taken_for_a_framework_by_its_name: (
        test_as_handler.test_a_package_of_yours_with_the_name_of_a_framework_is_not_taken_for_it
    ),
    bugs.a_model_that_has_crashed_is_not_loaded_again: (
        test_gguf_server.test_a_process_that_has_crashed_is_started_again_at_the_next_call
    ),
    bugs.the_process_of_a_model_outlives_its_workers: (
        test_gguf_server.test_its_process_is_that_of_all_workers_and_ends_with_the_last_one
    ),
    bugs.a_start_that_is_cut_off_leaves_a_process: (test_gguf_server.test_a_start_that_is_cancelled_leaves_no_process),
    bugs.a_request_that_a_local_server_refuses_is_a_fault: (
        test_local_model.test_a_request_that_the_server_refuses_does_not_count_against_the_worker
    ),
    bugs.a_worker_that_has_not_started_takes_a_user_off_its_model: (
        test_gguf_server.test_a_worker_that_is_stopped_after_a_start_that_failed_takes_the_model_from_no_other
    ),
    bugs.a_call_to_a_process_that_has_crashed_is_not_made_again: (
        test_gguf_server.test_a_call_to_a_process_that_is_about_to_end_is_made_once_more
    ),
    bugs.an_event_that_cannot_be_read_is_dropped: test_local_model.test_a_stream_that_fails_fails_its_task,
    bugs.a_conversation_that_json_cannot_carry_is_admitted: (
        test_local_model.test_a_conversation_that_json_cannot_carry_is_refused_when_it_is_submitted
    ),
    bugs.a_compensation_waits_for_the_slot_of_its_saga: (
        test_saga_slots.test_a_compensation_at_the_end_of_a_saga_may_need_its_slot
    ),
    bugs.a_saga_goes_on_without_its_slot_after_an_undo: test_saga_slots.test_a_saga_goes_on_once_it_has_its_slot_again,
    bugs.who_waits_for_a_saga_keeps_the_slot_that_it_needs: (
        test_saga_slots.test_who_waits_for_a_saga_that_is_undone_lends_its_slot_to_the_compensations
    ),
    bugs.an_error_ends_the_scans_for_sagas: test_saga_scans.test_scans_go_on_after_any_error,
    bugs.a_saga_that_was_undone_is_a_fault_of_its_worker: (
        test_saga_breaker.test_sagas_that_fail_leave_their_worker_to_others
    ),
    bugs.a_process_takes_its_own_sagas: (
        test_saga_leases.test_a_supervisor_whose_loop_stood_still_does_not_take_its_own_sagas
    ),
    bugs.a_lease_of_an_hour_ago_lasts_as_long_as_the_clock_was_set_back: (
        test_saga_leases.test_after_the_clock_was_set_back_what_a_lost_process_left_goes_on_and_what_lives_is_not_taken
    ),
    bugs.what_is_no_exception_passes_through_a_step: (
        test_saga_errors.test_a_function_that_catches_what_its_step_raised_leaves_no_step_of_unknown_outcome
    ),
    bugs.a_pivot_that_a_signal_has_ended_counts_as_not_done: (
        test_saga_errors.test_a_pivot_that_ends_with_no_exception_is_parked
    ),
    bugs.a_saga_that_cannot_be_parked_is_tried_again_at_once: (
        test_saga_errors.test_a_saga_that_cannot_even_be_parked_is_tried_once_a_lease_and_counted
    ),
    bugs.what_cannot_be_written_is_written_again_and_again: (
        test_saga_errors.test_a_log_that_raises_is_not_written_without_end
    ),
    bugs.a_compensation_that_the_code_no_longer_has_is_called: (
        test_saga_errors.test_a_saga_that_goes_back_is_parked_if_a_compensation_is_gone
    ),
    # reserved slots
    bugs.an_urgent_task_whose_turn_comes_waits_behind_others_for_their_slots: (
        test_reserve.test_an_urgent_task_that_has_waited_outside_of_the_queue_takes_a_reserved_slot
    ),
    # routing by cost
    bugs.a_task_goes_to_the_worker_that_finishes_first_whatever_it_costs: (
        test_cost_routing.test_a_task_goes_to_the_cheapest_worker_that_makes_its_deadline
    ),
    bugs.a_cheap_worker_is_chosen_though_it_misses_the_deadline: (
        test_cost_routing.test_a_task_goes_to_the_cheapest_worker_that_makes_its_deadline
    ),
    bugs.half_of_the_tasks_of_a_cheap_worker_may_be_late: (
        test_cost_selection.test_a_worker_whose_times_vary_is_not_trusted_with_a_deadline_that_half_of_them_miss
    ),
    bugs.a_fast_worker_is_not_found_behind_a_slow_one_of_its_cost: (
        test_cost_selection.test_of_one_cost_the_least_score_is_picked_and_a_fast_one_if_that_is_too_slow
    ),
    bugs.a_run_that_was_cut_off_says_nothing: (
        test_cost_routing.test_a_worker_that_never_makes_the_deadline_does_not_get_every_task
    ),
    bugs.a_cost_that_was_slow_once_is_never_tried_again: (
        test_cost_selection.test_a_cost_that_was_slow_for_a_time_is_tried_again_and_less_often_if_in_vain
    ),
    bugs.a_worker_that_fails_stays_the_cheapest: (
        test_cost_selection.test_one_that_fails_is_passed_over_although_nobody_has_told_the_selector
    ),
    bugs.a_cheap_worker_is_never_tried_so_that_its_cost_is_not_learned: (
        test_cost_selection.test_a_worker_whose_cost_is_not_known_is_tried_with_one_task
    ),
    bugs.a_cheap_worker_whose_first_run_cost_nothing_is_never_tried_again: (
        test_cost_selection.test_a_run_that_cost_nothing_is_not_the_last_trial
    ),
    bugs.a_hopeless_task_is_used_to_try_a_slow_cost: (
        test_cost_selection.test_a_task_without_the_time_of_the_fastest_success_never_tries_a_slow_cost
    ),
    bugs.many_slots_make_a_slow_worker_fast: test_cost_selection.test_many_slots_make_no_worker_fast,
    bugs.what_stops_one_worker_of_a_type_stops_all: (
        test_cost_routing.test_a_worker_whose_upstream_is_short_keeps_no_task_from_another_one_of_its_cost
    ),
    bugs.learned_costs_differ_by_the_noise_of_runs: (
        test_cost_selection.test_learned_costs_of_equal_workers_count_as_equal_though_runs_differ
    ),
    bugs.what_a_call_is_charged_reaches_no_run: (
        test_cost_routing.test_what_a_task_costs_is_learned_from_what_its_calls_are_charged
    ),
    bugs.a_cheap_worker_without_calls_to_spare_keeps_the_queue: (
        test_cost_routing.test_a_cheap_worker_whose_upstream_is_short_keeps_no_task_from_another_worker
    ),
    bugs.the_slowness_of_cheap_workers_rejects_tasks_of_fast_ones: (
        test_cost_routing.test_the_slowness_of_a_cheap_worker_rejects_no_task_that_a_free_one_makes
    ),
    bugs.a_task_is_held_however_many_wait_for_the_cheap_worker: (
        test_cost_routing.test_only_as_many_wait_as_the_cheaper_worker_can_serve_in_time
    ),
    bugs.a_held_task_waits_for_a_cheap_worker_that_does_not_come: (
        test_cost_routing.test_a_task_that_waited_in_vain_starts_on_the_dearer_worker_in_time
    ),
    bugs.a_cheap_slot_serves_no_held_task: (
        test_cost_routing.test_a_task_waits_for_a_cheaper_worker_while_that_makes_its_deadline
    ),
    bugs.a_free_slot_takes_held_tasks_for_which_it_is_too_slow: (
        test_held_tasks.test_a_held_task_is_not_started_on_a_worker_that_is_too_slow_for_it
    ),
    bugs.a_held_task_is_taken_for_a_slot_that_it_may_not_have: (
        test_held_tasks.test_a_slot_whose_upstream_is_short_keeps_no_held_task_from_another_worker
    ),
    bugs.reserved_slots_of_a_cheap_worker_are_waited_for: (
        test_held_tasks.test_no_task_waits_for_a_worker_whose_slots_are_all_reserved
    ),
    bugs.a_held_task_waits_for_a_worker_that_is_gone: (
        test_cost_routing.test_held_tasks_go_to_another_worker_once_the_cheaper_one_is_gone
    ),
    bugs.a_held_task_that_has_left_counts_for_good: test_cost_routing.test_a_held_task_can_be_cancelled,
    bugs.draining_waits_for_a_cheaper_worker: test_cost_routing.test_draining_does_not_wait_for_a_cheaper_worker,
    # --- scaling ---
    bugs.noise_of_the_arithmetic_asks_for_a_replica: (test_ratio.test_six_replicas_at_their_target_need_no_seventh),
    bugs.replicas_are_bought_while_a_quota_is_short: (
        test_decision.test_no_replica_is_added_while_something_else_is_short
    ),
    bugs.a_shortage_counts_only_in_the_moment_of_a_reading: (test_decision.test_a_shortage_that_comes_and_goes_counts),
    bugs.a_fleet_shrinks_without_stabilization: (test_decision.test_down_only_to_the_most_of_the_stabilization_window),
    bugs.a_fleet_turns_down_as_often_as_the_load: (
        test_decision.test_the_fleet_turns_down_once_in_two_stabilization_windows
    ),
    bugs.a_surge_waits_for_the_mean_of_a_minute: test_decision.test_a_surge_is_met_by_the_panic_window,
    bugs.slots_that_the_start_gate_keeps_free_are_no_sign_of_a_shortage: (
        test_autoscaling.test_no_slot_is_added_while_a_quota_is_the_bottleneck
    ),
    bugs.what_this_process_runs_counts_as_run_elsewhere: (
        test_autoscaling.test_what_this_process_has_taken_from_the_overflow_is_not_elsewhere
    ),
    bugs.an_autoscaler_ends_with_the_first_error_of_its_target: (
        test_autoscaler.test_a_target_that_fails_is_asked_again_later_and_later
    ),
    bugs.a_call_that_is_cancelled_by_itself_ends_an_autoscaler: (
        test_autoscaler.test_a_call_that_is_cancelled_by_itself_is_a_failure_like_others
    ),
    bugs.a_scale_that_has_failed_is_not_asked_for_more_until_its_backoff_is_over: (
        test_autoscaler.test_a_target_that_fails_is_read_on_and_asked_at_once_for_more_than_it_failed_at
    ),
    bugs.a_shortage_of_the_supervisor_keeps_replicas_elsewhere_from_being_added: (
        test_autoscaler.test_what_the_supervisor_itself_is_short_of_does_not_keep_replicas_elsewhere_from_being_added
    ),
    bugs.an_empty_fleet_waits_until_more_than_noise_is_asked_for: (
        test_decision.test_however_little_is_asked_for_one_replica_starts_and_stays
    ),
    bugs.a_worker_shrinks_to_the_slots_that_it_reserves: (
        test_worker_target.test_it_may_not_be_asked_for_no_more_than_it_reserves
    ),
    bugs.tasks_beyond_the_bound_of_their_tenant_ask_for_slots: (
        test_autoscaling.test_of_a_tenant_no_more_tasks_ask_for_slots_than_its_bound_lets_begin
    ),
    bugs.tasks_of_a_paused_type_ask_for_slots_here: (test_autoscaling.test_no_slot_is_added_for_tasks_of_a_paused_type),
    bugs.a_process_that_is_to_go_is_killed: (
        test_worker_processes.test_a_process_that_goes_while_it_runs_tasks_finishes_them
    ),
    bugs.the_death_of_a_process_is_seen_by_its_socket: (
        test_worker_processes.test_a_process_that_dies_is_replaced_though_its_socket_is_held_open
    ),
    bugs.a_process_that_reports_no_more_goes_on_counting: (
        test_worker_processes.test_a_process_that_reports_no_more_counts_no_more_and_is_killed
    ),
    bugs.a_process_that_drains_by_itself_counts_as_ready: (
        test_worker_processes.test_a_process_that_drains_by_itself_is_not_ready_and_replaced
    ),
    bugs.one_that_waits_to_be_replaced_holds_back_all: (
        test_worker_processes.test_one_that_waits_to_be_replaced_holds_back_no_others
    ),
    bugs.what_somebody_else_has_scaled_is_overwritten: (
        test_kubernetes.test_what_somebody_else_has_scaled_meanwhile_is_decided_again
    ),
    bugs.a_retry_after_of_kubernetes_is_not_kept: test_kubernetes.test_a_retry_after_is_kept,
    bugs.a_lost_watch_is_not_begun_from_a_list: test_kubernetes.test_a_lost_watch_is_begun_again_from_a_list,
    bugs.what_pods_are_short_of_is_not_asked: (
        test_kubernetes.test_the_pods_that_take_tasks_are_asked_what_they_are_short_of
    ),
    bugs.a_leader_acts_past_its_lease: test_leader.test_a_leader_that_is_cut_off_stops_before_another_begins,
    bugs.a_lease_is_taken_from_a_leader_that_lives: test_leader.test_one_leads_and_goes_on_leading,
    bugs.a_conflict_about_a_lease_is_taken_for_a_success: test_leader.test_two_that_begin_together_make_one_lease,
    bugs.every_autoscaler_acts: test_leader.test_of_two_autoscalers_one_acts,
    bugs.an_autoscaler_without_a_program_sees_no_tasks_that_run: (
        test_overflow_demand.test_it_counts_what_waits_and_what_runs_whoever_runs_it
    ),
    # --- scaling: EC2 ---
    bugs.a_worker_takes_tasks_while_its_machine_may_go: (
        test_worker_protection.test_the_protection_goes_off_when_idle_and_on_before_a_task
    ),
    bugs.a_protection_that_has_failed_counts_as_on: (
        test_worker_protection.test_no_task_begins_until_a_call_that_failed_has_succeeded
    ),
    bugs.a_task_that_runs_keeps_no_protection: test_worker_protection.test_a_long_task_keeps_the_protection,
    bugs.a_machine_that_is_to_go_is_not_seen: test_ec2_protection.test_its_metadata_says_whether_it_is_leaving,
    bugs.an_instance_in_trouble_is_taken_for_one_that_leaves: (
        test_ec2_protection.test_a_failure_of_a_call_does_not_mean_that_it_is_leaving
    ),
    bugs.several_processes_protect_one_instance: test_ec2_protection.test_one_process_of_an_instance_protects_it,
    bugs.an_instance_that_runs_tasks_is_released_without_a_hook: (
        test_ec2.test_the_group_chooses_among_those_without_a_task
    ),
    bugs.what_an_instance_too_many_keeps_is_never_taken_again: (
        test_ec2.test_one_that_protects_itself_in_between_is_released_at_the_next_reading
    ),
    bugs.the_bounds_of_a_group_do_not_bind: test_ec2.test_the_bounds_of_the_group_hold_and_are_named_once,
    bugs.calls_of_an_instance_group_overtake_each_other: (
        test_ec2.test_a_call_that_was_given_up_is_over_before_the_next_one
    ),
    bugs.a_quota_that_instances_are_short_of_is_never_seen: (
        test_ec2_reports.test_the_reports_of_instances_are_summed_up
    ),
    bugs.a_call_that_is_throttled_is_not_repeated: test_ec2.test_a_call_that_is_throttled_is_repeated,
    bugs.a_call_that_was_given_up_is_sent_again: test_ec2.test_a_call_that_was_given_up_is_not_sent_again,
    bugs.one_reading_after_an_outage_decides: test_autoscaler.test_the_first_reading_after_an_outage_removes_nothing,
    bugs.a_call_of_a_leader_outlasts_its_lease: test_leader.test_a_call_that_is_under_way_ends_with_the_lease,
    bugs.a_process_uses_what_it_held_after_its_lease: test_lease.test_nothing_of_a_lease_is_used_when_it_has_ended,
    bugs.a_slot_is_returned_between_two_short_calls: test_lease.test_a_slot_is_not_returned_between_two_short_calls,
    bugs.calls_under_way_hold_nothing_of_a_limit_that_is_seen_later: (
        test_rate_limiter.test_the_calls_under_way_when_a_limit_is_first_seen_may_return_what_they_hold_of_it
    ),
    bugs.a_request_that_is_repeated_counts_twice: (
        test_ledger_store.test_a_request_that_is_repeated_is_counted_once_and_gets_the_same_reply
    ),
    bugs.what_members_hold_of_a_quota_refills_meanwhile: test_ledger.test_what_is_held_does_not_refill_meanwhile,
    bugs.an_autoscaler_that_only_publishes_scales: test_autoscale.test_it_scales_or_only_publishes_and_says_how_it_is,
    bugs.an_autoscaler_that_does_not_lead_publishes_old_readings: (
        test_autoscale_metrics.test_readings_are_those_of_the_one_that_leads
    ),
    bugs.a_query_is_in_the_access_log: test_gateway_operation.test_no_query_is_logged,
    bugs.a_reload_refills_a_budget: test_gateway_reload.test_a_reload_refills_no_budget,
    bugs.each_process_has_the_rate_of_a_key_for_itself: test_caller_ledgers.test_a_rate_is_one_for_all_processes,
    bugs.a_ledger_of_a_budget_that_is_new_has_spent_nothing: (
        test_caller_ledgers.test_a_budget_begins_with_what_was_spent_before_once_for_all_processes
    ),
    bugs.a_reload_is_an_error_for_callers_until_all_processes_have_made_it: (
        test_changed_terms.test_no_call_fails_while_processes_change_their_settings_one_after_the_other
    ),
    bugs.a_reload_gives_the_new_limits_to_the_upstream_before_it_alone: (
        test_changed_terms.test_calls_in_progress_since_before_the_last_two_reloads_keep_no_call_out
    ),
    bugs.a_reload_does_not_ask_whether_all_workers_can_make_it: (
        test_gateway_worker_reload.test_settings_that_one_worker_cannot_serve_by_change_none
    ),
    bugs.a_worker_forgets_what_the_one_before_it_has_counted: (
        test_gateway_worker_metrics.test_counters_stay_while_a_worker_is_dead_and_go_on_when_it_is_replaced
    ),
    bugs.what_a_worker_has_counted_is_written_at_scrapes_alone: (
        test_worker_group.test_a_worker_that_is_killed_loses_what_it_counted_in_the_last_five_seconds_at_most
    ),
    bugs.the_removed_directory_of_the_workers_is_not_made_again: (
        test_worker_channel.test_a_worker_whose_socket_is_removed_with_its_directory_can_be_asked_again
    ),
    bugs.a_worker_that_drains_answers_for_the_whole_gateway: (
        test_gateway_worker_metrics.test_a_gateway_is_ready_if_any_worker_takes_calls
    ),
    bugs.a_worker_accepts_connections_though_another_has_fewer: (
        test_worker_listener.test_a_new_connection_goes_to_the_worker_with_the_fewest
    ),
    bugs.a_worker_leaves_connections_to_one_that_hangs: (
        test_worker_listener.test_a_worker_takes_what_one_that_hangs_does_not_and_soon_waits_for_it_no_more
    ),
    bugs.a_worker_that_drains_accepts_as_if_it_did_not: (
        test_worker_listener.test_a_worker_that_drains_leaves_connections_to_the_others
    ),
    bugs.what_a_call_holds_is_kept_if_another_limit_rejects_it: (
        test_caller_limits.test_what_was_taken_of_one_caller_is_returned_if_another_rejects_the_call
    ),
    bugs.a_gateway_drains_for_as_long_as_its_file_says: (
        test_gateway_command.test_an_option_overrides_how_long_the_file_lets_calls_drain
    ),
    bugs.members_of_a_pool_share_calls_by_independent_draws: (
        test_load_balancer.test_any_run_of_even_draws_keeps_a_share_to_a_few_calls
    ),
    bugs.a_pool_serves_a_key_by_targets_that_it_is_not_for: (
        test_gateway_models.test_an_issued_key_for_no_member_of_a_pool_is_refused_and_does_not_see_its_alias
    ),
    bugs.a_gateway_that_has_failed_once_to_follow_its_keys_does_not_try_again: (
        test_key_registry.test_a_bug_in_following_the_file_is_logged_once_and_ends_nothing
    ),
    bugs.an_issued_key_pays_for_the_api_key_of_its_name: (
        test_gateway_caller_spend.test_an_issued_key_and_a_key_of_the_provider_of_one_name_are_told_apart
    ),
    bugs.a_check_looks_for_no_secrets: test_gateway_command.test_check_names_every_variable_that_is_missing,
    # --- shared accounts ---
    bugs.a_cut_counts_for_each_process_that_makes_one: (
        test_limit_learning.test_the_first_cut_of_an_epoch_counts_and_no_other
    ),
    bugs.a_process_that_cuts_the_limit_goes_on_in_all_its_slots: (
        test_lease.test_a_process_that_cuts_the_limit_starts_no_call_in_the_slots_that_others_have
    ),
    bugs.each_process_weighs_its_refusals_alone: (
        test_leased_limit.test_refusals_of_all_processes_are_weighed_together
    ),
    bugs.each_process_gives_the_alert_of_a_shared_budget: (
        test_shared_accounts.test_an_alert_is_given_by_one_of_the_processes_that_share_a_budget
    ),
    bugs.a_new_store_of_a_shared_account_refills_a_budget: (
        test_spend_log.test_a_new_store_of_a_shared_account_begins_with_what_the_log_has
    ),
    bugs.a_ledger_of_a_newer_version_is_overwritten: (
        test_ledger_layout.test_a_ledger_of_a_newer_version_is_left_as_it_is_and_the_error_says_what_to_do
    ),
    bugs.the_first_that_reaches_its_store_again_gets_what_others_have_used: (
        test_ledger.test_the_first_to_come_back_is_not_granted_what_others_may_have_used_of_their_share
    ),
    bugs.a_member_is_back_when_it_repeats_what_was_not_answered: (
        test_ledger.test_a_member_that_comes_back_is_expected_until_it_has_repeated_what_was_not_answered
    ),
    bugs.a_store_that_comes_back_empty_expects_nobody: (
        test_ledger.test_a_store_that_comes_back_empty_expects_the_members_that_the_first_one_knew
    ),
    bugs.what_was_sent_before_a_breaker_closed_counts_after_it: (
        test_stoppages.test_faults_of_an_earlier_epoch_do_not_count
    ),
    bugs.the_probe_of_a_process_that_has_died_is_lost: (
        test_stoppages.test_the_probe_of_a_member_that_has_died_comes_back_with_its_lease
    ),
    bugs.each_process_probes_for_itself: (
        test_leased_stoppages.test_a_call_needs_a_probe_of_the_ledger_while_it_is_half_open
    ),
    bugs.a_process_with_a_broken_network_stops_all: (
        test_fault_row.test_calls_of_others_that_succeed_since_the_row_began_contradict_it
    ),
    bugs.each_process_probes_for_itself_on_redis: (
        test_ledger_store.test_calls_that_one_process_stops_are_stopped_for_all_and_one_of_them_probes
    ),
    bugs.the_use_of_other_processes_passes_for_a_wrong_count: (
        test_observed_learning.test_the_use_of_another_process_that_a_header_has_not_counted_corrects_nothing
    ),
    bugs.a_rate_is_learned_again_from_the_same_refusals: (
        test_rate_shares.test_of_two_that_learn_from_the_same_refusals_the_first_one_counts
    ),
    # --- progress ---
    bugs.progress_wakes_the_loop_though_nobody_listens: (
        test_threads.test_progress_that_nobody_listens_to_does_not_wake_the_loop
    ),
    bugs.progress_reaches_the_listeners_of_the_ticket_alone: (
        test_threads.test_a_listener_that_comes_during_a_run_gets_the_later_progress
    ),
    bugs.progress_reaches_the_listeners_of_the_supervisor_alone: (
        test_threads.test_a_listener_that_comes_during_a_run_gets_the_later_progress
    ),
    bugs.a_worker_that_was_skipped_with_a_stopped_one_is_forgotten: (
        test_cost_scripts.test_a_worker_that_was_skipped_with_one_that_the_start_gate_stopped_is_not_forgotten
    ),
}


def node_id(test: Callable[..., Any]) -> str:
    """Return a test's name, as pytest takes it."""
    path = sys.modules[test.__module__].__file__  # not of its code: a decorator may have wrapped that
    assert path is not None
    return f"{Path(path).relative_to(ROOT)}::{test.__name__}"


class ForkServer:
    """A process that has collected the tests of all bugs, and forks for each bug: `tests.mutation.plugin`."""

    def __init__(self) -> None:
        requests, mine = os.pipe()
        tests = dict.fromkeys(map(node_id, CAUGHT_BY.values()))
        command = [sys.executable, "-m", "pytest", *OPTIONS, *INJECTION, "--bugs-from", str(requests), *tests]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "400"},
            pass_fds=[requests],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a bug may leave processes behind: they end with this one
        )
        os.close(requests)
        self._requests = os.fdopen(mine, "w", encoding="utf-8")

    def run(self, bug: Callable[[], None], test: str) -> tuple[int, str]:
        """Return the exit status of pytest for `test` with `bug` injected, and what it wrote."""
        self._requests.write(f"{bug.__name__} {test}\n")
        self._requests.flush()
        written: list[str] = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ENDED):
                return int(line.removeprefix(ENDED)), "".join(written)
            written.append(line)
        raise EOFError("the process that forks has ended:\n" + "".join(written))

    def close(self) -> None:
        """End the process, and those that it has left behind."""
        self._requests.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    with contextlib.closing(ForkServer()) as server:
        yield server


def test_every_bug_has_a_test() -> None:
    injectable = {value for name, value in vars(bugs).items() if getattr(value, "__module__", "") == bugs.__name__}
    assert injectable == set(CAUGHT_BY)


@pytest.mark.slow
@pytest.mark.parametrize("bug", CAUGHT_BY, ids=lambda bug: bug.__name__)
def test_an_injected_bug_is_caught(fork_server: ForkServer, bug: Callable[[], None]) -> None:
    status, output = fork_server.run(bug, node_id(CAUGHT_BY[bug]))
    assert status == 1, f"it is not caught:\n{output[-4000:]}"
    (failure,) = re.findall(r"^FAILED .*$", output, re.MULTILINE)
    assert not failure.partition(" - ")[2].startswith(SLIPS), f"it fails for another reason: {failure}"
