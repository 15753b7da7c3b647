"""Bugs that Forebay must never have, each a few lines that break one invariant, injected by symbol.

`test_injected_bugs.py` names the test that must fail for each. A bug whose place has changed is a type error, or raises
`NothingToChange`: rewrite it for the new code, for its invariant still holds.
"""

from __future__ import annotations

import ast
import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
from tests.mutation.injection import always, pause_before, replace, skip, swap

from forebay.admission import PriorityQueue, PriorityThresholds, RetryAfterSchedule
from forebay.breaker import Breaker
from forebay.gateway.request_validator import RequestValidator
from forebay.interfaces import Completion, Outcome, PutResult, TaskRecord
from forebay.limit import AdaptiveLimit, Grant
from forebay.limit.adaptive.limit_probe import LimitProbe
from forebay.limit.adaptive.refusal_detector import RefusalDetector
from forebay.limit.adaptive.slowdown_experiment import ExperimentResult, SlowdownExperiment
from forebay.overflow import MemoryTaskStore, SqliteTaskStore
from forebay.quota import BudgetTracker
from forebay.retry import RetryBudget, RetryState
from forebay.supervisor.admission_controller import AdmissionController
from forebay.supervisor.dispatcher import Dispatcher
from forebay.supervisor.pool import Pool
from forebay.supervisor.runs.completion import RunCompletion
from forebay.supervisor.runs.run import Run
from forebay.supervisor.runs.slot_loans import SlotLoan
from forebay.supervisor.spill.stored_tasks import StoredTasks
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Priority, TaskStatus
from forebay.upstream import call_flow
from forebay.upstream.accounts import bypass
from forebay.upstream.accounts.account import Account
from forebay.upstream.accounts.account_registry import AccountRegistry
from forebay.upstream.accounts.latency import CallDurations
from forebay.upstream.accounts.shared_account import SharedAccount
from forebay.upstream.call_request import CallOutcome, Permit

# --- slots and permits: each is given back exactly once, and there are no more than the limit ---


def a_cancelled_run_keeps_its_slot() -> None:
    original = RunCompletion.handler_ended

    def handler_ended(self: RunCompletion, run: Run, value: Any, cause: BaseException | None) -> None:
        if isinstance(cause, asyncio.CancelledError):
            run.holds_slot = False
        original(self, run, value, cause)

    replace(RunCompletion, original, handler_ended)


def a_zombie_gives_its_slot_back() -> None:
    original = RunCompletion.end_early

    def end_early(self: RunCompletion, run: Run, status: TaskStatus, error: str) -> None:
        original(self, run, status, error)
        if run.holds_slot and not run.ended:
            self._dispatcher.return_slot(run)

    replace(RunCompletion, original, end_early)


def a_worker_takes_one_more_than_its_slots() -> None:
    swap(WorkerAgent.can_accept, ast.GtE, ast.Gt)


def a_run_that_awaits_its_child_keeps_its_slot() -> None:
    skip(SlotLoan.__init__, Dispatcher.return_slot)


def an_account_sends_one_call_more_than_its_limit() -> None:
    swap(Account._has_slot, ast.Lt, ast.LtE)


def an_attempt_that_is_cancelled_keeps_its_permit() -> None:
    original = SharedAccount.settle

    def settle(self: SharedAccount, permit: Permit, outcome: CallOutcome) -> None:
        if outcome is not call_flow._CANCELLED:
            original(self, permit, outcome)

    replace(SharedAccount, original, settle)


def a_permit_granted_to_a_caller_who_has_gone_is_kept() -> None:
    always(Account, Account.release_unsent, returns=None)


def a_cancelled_probe_is_not_returned() -> None:
    original = Breaker.record

    def record(self: Breaker, now: float, outcome: Outcome, epoch: int) -> Any:
        return None if outcome is Outcome.IGNORED else original(self, now, outcome, epoch)

    replace(Breaker, original, record)


# --- verdicts and order ---


def a_coroutine_pauses_between_the_check_and_the_take() -> None:
    pause_before(AdmissionController._submit, AdmissionController._new_ticket)


def a_load_at_the_threshold_is_admitted() -> None:
    swap(PriorityThresholds.rejects, ast.GtE, ast.Gt)


def better_priorities_are_served_last() -> None:
    def _next_priority(self: PriorityQueue[Any]) -> int:
        return max(priority for priority, length in enumerate(self.lengths) if length)

    replace(PriorityQueue, PriorityQueue._next_priority, _next_priority)


def low_priority_starves() -> None:
    original = PriorityQueue.__init__

    def __init__(self: PriorityQueue[Any], *, starvation_bound: int = 20) -> None:  # noqa: N807
        original(self, starvation_bound=10**9)

    replace(PriorityQueue, original, __init__)


def everybody_rejected_gets_the_same_retry_after() -> None:
    original = RetryAfterSchedule.reserve

    def reserve(self: RetryAfterSchedule, now: float, drain_rate: float | None, draw: float) -> float | None:
        return original(RetryAfterSchedule(), now, drain_rate, 0.0)

    replace(RetryAfterSchedule, original, reserve)


def a_call_that_overtakes_uses_what_the_head_of_the_queue_waits_for() -> None:
    def _leaves_enough(*_: object) -> bool:
        return True

    bypass._leaves_enough.__code__ = _leaves_enough.__code__


def tasks_of_a_conversation_never_start() -> None:
    skip(RunCompletion.handler_ended, Dispatcher.next_in_conversation)


# --- deadlines ---


def a_child_does_not_inherit_its_parents_deadline() -> None:
    original = AdmissionController._new_ticket

    def _new_ticket(self: AdmissionController, task: Any, parent: Any) -> Any:
        ticket = original(self, task, None)
        ticket.parent = parent
        return ticket

    replace(AdmissionController, original, _new_ticket)


def a_call_is_sent_that_cannot_meet_its_deadline() -> None:
    always(CallDurations, CallDurations.is_too_late, returns=False)


# --- what is stored is done once ---


def what_a_zombie_returns_is_taken_for_its_result() -> None:
    original = RunCompletion.handler_ended

    def handler_ended(self: RunCompletion, run: Run, value: Any, cause: BaseException | None) -> None:
        if cause is None:
            run.abandoned_at = None
        original(self, run, value, cause)

    replace(RunCompletion, original, handler_ended)


def whoever_lost_its_lease_may_still_finish() -> None:
    original = MemoryTaskStore.finish

    async def finish(self: MemoryTaskStore, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        entry = self._entries.get(task_id, SimpleNamespace(fence=fence))
        return await original(self, task_id, completion, fence=entry.fence)

    replace(MemoryTaskStore, original, finish)


def a_record_is_acknowledged_before_its_commit() -> None:
    original = SqliteTaskStore.put

    async def put(
        self: SqliteTaskStore, record: TaskRecord, *, fence: str | None = None, until: float = 0.0
    ) -> PutResult:
        self._writer.run_batched(self._put, (record, fence, until))
        return PutResult.STORED

    replace(SqliteTaskStore, original, put)


def a_task_starts_although_its_lease_has_lapsed() -> None:
    always(StoredTasks, StoredTasks.lease_is_valid, returns=True)


def a_start_is_not_recorded() -> None:
    always(SqliteTaskStore, SqliteTaskStore.begin_attempt, returns=True)


def new_work_overtakes_spilled_work() -> None:
    always(Pool, Pool.spilled_ahead, returns=0)


# --- spend and quotas ---


def what_others_have_reserved_is_spent_again() -> None:
    original = BudgetTracker.can_afford

    def can_afford(self: BudgetTracker, now: float, usd: float, priority: Priority = Priority.NORMAL) -> bool:
        _, reserved = self.reserved()
        return original(self, now, max(0.0, usd - reserved), priority)

    replace(BudgetTracker, original, can_afford)


def a_call_that_failed_midway_costs_nothing() -> None:
    original = Account.settle

    def settle(self: Account, now: float, permit: Permit, outcome: CallOutcome) -> None:
        if outcome.kind is Outcome.FAULT and outcome.usd is None:
            outcome = msgspec.structs.replace(outcome, usd=0.0)
        original(self, now, permit, outcome)

    replace(Account, original, settle)


def two_api_keys_share_an_account() -> None:
    original = AccountRegistry.account

    def account(self: AccountRegistry, model: str, key: str = "") -> Any:
        return original(self, model)

    replace(AccountRegistry, original, account)


# --- throttled is no fault; retries are bounded ---


def a_throttled_call_counts_as_a_fault() -> None:
    original = Breaker.record

    def record(self: Breaker, now: float, outcome: Outcome, epoch: int) -> Any:
        return original(self, now, Outcome.FAULT if outcome is Outcome.OVERLOAD else outcome, epoch)

    replace(Breaker, original, record)


def a_refusal_of_an_earlier_epoch_lowers_the_limit_again() -> None:
    original = AdaptiveLimit.observe

    def observe(
        self: AdaptiveLimit, now: float, grant: Any, outcome: Outcome, *, slowdown: float | None = None
    ) -> None:
        original(self, now, msgspec.structs.replace(grant, epoch=self.epoch), outcome, slowdown=slowdown)

    replace(AdaptiveLimit, original, observe)


# --- the limit where refusals and slow calls say little ---


def a_refusal_is_never_contradicted() -> None:
    def contradict(self: RefusalDetector, grant: Grant) -> int:
        return grant.in_flight

    replace(RefusalDetector, RefusalDetector._contradict, contradict)


def a_late_refusal_is_not_waited_for() -> None:
    def accepted(self: AdaptiveLimit, now: float, grant: Grant) -> None:
        self._confirm(now, grant)

    replace(AdaptiveLimit, AdaptiveLimit.accepted, accepted)


def a_refused_probe_is_repeated_as_soon_as_ever() -> None:
    always(LimitProbe, LimitProbe.record_failure, returns=None)


def an_experiment_that_made_nothing_faster_keeps_its_limit() -> None:
    original = SlowdownExperiment._restore

    def restore(self: SlowdownExperiment, now: float) -> ExperimentResult:
        self._our_load, self._limit_before = True, self.target_limit
        return original(self, now)

    replace(SlowdownExperiment, original, restore)


# --- retries are bounded ---


def nobody_asks_the_retry_budget() -> None:
    always(RetryBudget, RetryBudget.withdraw, returns=True)


def a_retry_ignores_retry_after() -> None:
    original = RetryState.next_delay

    def next_delay(self: RetryState, *, retry_after: float | None = None, **rest: Any) -> float | None:
        return original(self, **rest)

    replace(RetryState, original, next_delay)


# --- the gateway ---


def a_web_page_from_elsewhere_may_call() -> None:
    always(RequestValidator, RequestValidator._find_foreign_origin, returns=None)
