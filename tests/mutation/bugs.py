"""Bugs that Forebay must never have, each a few lines that break one invariant, injected by symbol.

`test_injected_bugs.py` names the test that must fail for each. A bug whose place has changed is a type error, or raises
`NothingToChange`: rewrite it for the new code, for its invariant still holds.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import itertools
import math
import signal
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextvars import Context
from dataclasses import replace as replace_fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
from aiohttp.client_proto import ResponseHandler
from redis.connection import Connection
from tests.mutation.injection import always, edit_redis_script, edit_state_script, pause_before, replace, skip, swap

from forebay import BackpressureSupervisor, _hooks, clock, errors
from forebay._text import error_text
from forebay._threads import DaemonThreadExecutor
from forebay.adapters import blocking_client, chat, detect, factory, local_model
from forebay.adapters.agent_thread import AgentThread, Stoppable
from forebay.adapters.gguf_server import Address, GgufServer
from forebay.adapters.handler import Handler
from forebay.adapters.langgraph import ShardedSaver, ShardedStore, large_value, thread_checkpoints
from forebay.adapters.langgraph.checkpoint_keys import digest
from forebay.adapters.langgraph.handler import _repeated_answer
from forebay.adapters.langgraph.thread_checkpoints import Record, StoredWrite, ThreadCheckpoints
from forebay.adapters.langgraph.thread_index import ThreadIndex
from forebay.adapters.run_tasks import RunTasks, _Contained
from forebay.adapters.tool_threads import ToolThreads
from forebay.admission import (
    EstimatedTimes,
    PriorityQueue,
    PriorityThresholds,
    RetryAfterSchedule,
    StandingQueue,
    TenantRetrySchedules,
    TenantTurns,
    feasibility,
)
from forebay.breaker import Breaker, BreakerRules, FaultWindow, MinimumSampleTrigger
from forebay.call_usage import NO_USAGE
from forebay.cli import autoscale_metrics
from forebay.cli import gateway as gateway_command
from forebay.context import running_task
from forebay.engine.child_process import ChildProcess
from forebay.errors import ScalingFailed
from forebay.events import Event, EventBus, Subscription, TaskProgress
from forebay.gateway import GatewaySettings, forwarded_call, rewritten_request
from forebay.gateway.abortable_block import AbortableBlock
from forebay.gateway.call_record import CallRecord
from forebay.gateway.callers.caller import CallerReader
from forebay.gateway.callers.caller_ledgers import CallerLedgers
from forebay.gateway.callers.caller_limits import CallerLimits, CallerPermit
from forebay.gateway.callers.issued_keys import IssuedKey
from forebay.gateway.callers.key_file import KeySnapshot
from forebay.gateway.callers.key_registry import KeyRegistry
from forebay.gateway.connections import connection_pool
from forebay.gateway.connections.connection_pool import ConnectionPool, PooledConnection
from forebay.gateway.connections.direct_request import RawHeaders
from forebay.gateway.forwarded_call import ForwardedCall
from forebay.gateway.metrics.bounded_label import BoundedLabel
from forebay.gateway.requests.body_memory import BodyMemory
from forebay.gateway.requests.request_head import RequestHead, RequestHeads
from forebay.gateway.requests.request_validator import RequestValidator
from forebay.gateway.server import _Server
from forebay.gateway.targets import provider_key
from forebay.gateway.targets.deployments import DeploymentPool
from forebay.gateway.targets.provider_key import ProviderKey
from forebay.gateway.workers import worker_reload
from forebay.gateway.workers.worker_channel import WorkerChannel
from forebay.gateway.workers.worker_group import Readiness, WorkerGroup
from forebay.gateway.workers.worker_listener import WorkerListener
from forebay.interfaces import Charge, Completion, Lease, Outcome, PutResult, TaskRecord
from forebay.limit import AdaptiveLimit, Grant
from forebay.limit.adaptive.limit_probe import LimitProbe
from forebay.limit.adaptive.refusal_detector import RefusalDetector
from forebay.limit.adaptive.slowdown_experiment import ExperimentResult, SlowdownExperiment
from forebay.overflow import MemoryTaskStore, SqliteTaskStore, memory, redis, sqlite
from forebay.overflow.redis import RedisTaskStore
from forebay.overflow.sqs import SqsTaskStore
from forebay.quota import (
    BilledUsage,
    Budget,
    BudgetReservation,
    BudgetTracker,
    Price,
    RateLimiter,
    RateScope,
    rate_limiter,
)
from forebay.quota.bucket import Bucket
from forebay.quota.observed import ObservedLimit
from forebay.quota.quota_doubt import QuotaDoubt
from forebay.retry import Retry, RetryBudget, RetryState
from forebay.saga import SagaAdmin, memory_log, redis_log, saga_admin, sqlite_log, step
from forebay.saga import run as saga_run
from forebay.saga.held_saga import HeldSaga
from forebay.saga.records import LogWrite, SagaHistory, StartedEntry
from forebay.saga.redis_log import RedisSagaLog
from forebay.saga.run import SagaRun
from forebay.saga.sqlite_log import SqliteSagaLog
from forebay.saga.step import Raised, Step, is_ambiguous
from forebay.scale import (
    Autoscaler,
    AutoscalerStatistics,
    Ec2Target,
    KubernetesLease,
    KubernetesTarget,
    LeaderLease,
    LeaseRecord,
    ProcessTarget,
    PublishedTarget,
    ScaleDecider,
    ScalePolicy,
    WorkerTarget,
    decision,
    ec2,
    ec2_client,
    ec2_protection,
    kubernetes_api,
    leader,
    process_target,
    ratio,
    slots_asked,
)
from forebay.scale.ec2_client import AwsClient
from forebay.scale.ec2_reports import InstanceReports
from forebay.spend_log import SpendLog
from forebay.spend_log.unwritten_spend import UnwrittenSpend
from forebay.state.guarded_shard import GuardedShard
from forebay.state.memory import MemoryShard
from forebay.state.moving import Move
from forebay.state.near_cache import CachedServer, Read
from forebay.state.redis import RedisShard
from forebay.state.time_limits import TimeLimit, TimeLimits
from forebay.storage import (
    OperationError,
    OperationQueue,
    SqliteWriter,
    redis_clock,
    redis_master,
    shown_url,
    sqlite_file,
)
from forebay.storage.file_watch import FileWatch
from forebay.storage.operation_queue import in_parts
from forebay.storage.redis_clock import RedisClock
from forebay.storage.redis_master import RedisMaster
from forebay.supervisor import (
    admission_controller,
    cost_selection,
    demand,
    drain,
    failure_log,
    fan_out,
    held_tasks,
    nested_supervisor,
    pools,
    registration,
    room,
    saga_driver,
)
from forebay.supervisor.admission_controller import AdmissionController, _Undecided
from forebay.supervisor.conversations import Conversations
from forebay.supervisor.core import Core
from forebay.supervisor.cost_selection import CostSelector, RunTimes, _CostClass, _SpeedSelector, _Trial
from forebay.supervisor.dispatcher import Dispatcher
from forebay.supervisor.drain import Drain, DrainReport
from forebay.supervisor.fan_out import FanOut
from forebay.supervisor.held_tasks import HeldTasks
from forebay.supervisor.overflow_demand import OverflowDemand
from forebay.supervisor.pool import Pool
from forebay.supervisor.pools import FewPools, PoolGroup
from forebay.supervisor.portal import PortalSlot
from forebay.supervisor.queue_spill import QueueSpill, is_movable
from forebay.supervisor.room import RoomQueue
from forebay.supervisor.runs import completion, runner, slot_loans
from forebay.supervisor.runs.completion import RunCompletion
from forebay.supervisor.runs.retries import TaskRetries
from forebay.supervisor.runs.run import ActiveRuns, Run, SlotClaims
from forebay.supervisor.runs.runner import Runner
from forebay.supervisor.runs.scheduled_tasks import ScheduledTasks
from forebay.supervisor.runs.slot_loans import SlotLoan
from forebay.supervisor.runs.stopping import RunStopper
from forebay.supervisor.runs.timers import Timers
from forebay.supervisor.saga_driver import SagaDriver
from forebay.supervisor.slot import Slot
from forebay.supervisor.spill import delayed_records, stored_tasks
from forebay.supervisor.spill.ask_jitter import AskJitter
from forebay.supervisor.spill.delayed_records import DelayedRecords
from forebay.supervisor.spill.leases import HeldLeases
from forebay.supervisor.spill.lost_records import LostRecords
from forebay.supervisor.spill.maintenance import StoreMaintenance
from forebay.supervisor.spill.refill import Refiller
from forebay.supervisor.spill.spill import Spill
from forebay.supervisor.spill.store_changes import AwaitedResults, WaitingRecords
from forebay.supervisor.spill.store_load import StoreLoad
from forebay.supervisor.spill.stored_tasks import StoredTasks
from forebay.supervisor.spilled_counts import SpilledCounts
from forebay.supervisor.start_gate import OtherWorkers, StartGate
from forebay.supervisor.tenants import Tenants
from forebay.supervisor.ticket import Ticket, TicketRun, found_ticket
from forebay.supervisor.ticket_registry import TicketRegistry
from forebay.supervisor.tree import supervision, worker_life
from forebay.supervisor.tree.restart_intensity import RestartIntensity
from forebay.supervisor.tree.restart_policy import RestartType
from forebay.supervisor.tree.supervision import Supervision
from forebay.supervisor.tree.worker_life import WorkerLife
from forebay.supervisor.worker import WorkerAgent
from forebay.supervisor.worker_protection import WorkerProtection
from forebay.supervisor.worker_removal import WorkerRemoval
from forebay.supervisor.worker_selection import WorkerSelector
from forebay.supervisor.worker_starts import WorkerStarts
from forebay.task import Deadline, Priority, Task, TaskResult, TaskStatus
from forebay.upstream import call_flow, sdk_exceptions
from forebay.upstream.accounts import bypass, spend_suspension
from forebay.upstream.accounts.account import Account
from forebay.upstream.accounts.account_registry import AccountRegistry
from forebay.upstream.accounts.call_queue import CallQueue, QueuedCall
from forebay.upstream.accounts.fair_order import FairOrder
from forebay.upstream.accounts.guarded_limit import GuardedLimit
from forebay.upstream.accounts.kept_places import KeptPlaces
from forebay.upstream.accounts.latency import CallDurations
from forebay.upstream.accounts.open_answers import OpenAnswers
from forebay.upstream.accounts.refusals import RefusalControl, refusal_cause
from forebay.upstream.accounts.refusals.learned_rate import LearnedRate, _Check, _Mark
from forebay.upstream.accounts.refusals.refusal_cause import RefusalCause
from forebay.upstream.accounts.refusals.refusal_pause import Block, RefusalPause
from forebay.upstream.accounts.refusals.refusal_trial import RefusalTrial
from forebay.upstream.accounts.spend import LoggedBudget, ThreadSafeBudget
from forebay.upstream.accounts.spend_recorder import RecordedCall, SpendRecorder
from forebay.upstream.accounts.spend_suspension import SpendSuspension, Suspended
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.accounts.timeout_evidence import TimeoutEvidence, TimeoutVerdict
from forebay.upstream.accounts.usage_recorder import UsageRecorder
from forebay.upstream.accounts.waiters import Waiter
from forebay.upstream.call_meter import CallMeter
from forebay.upstream.call_request import Caller, CallOutcome, CallPrice, CallRequest, Permit, Rejected
from forebay.upstream.core import UpstreamCore
from forebay.upstream.exchange import Exchange
from forebay.upstream.fallbacks.even_draws import EvenDraws
from forebay.upstream.fallbacks.fallback_chain import FallbackChain
from forebay.upstream.fallbacks.load_balancer import LoadBalancer, Peer
from forebay.upstream.fallbacks.reroute import ReroutedRequest
from forebay.upstream.httpx_binding import httpx_transport
from forebay.upstream.metered_stream import MeteredStream
from forebay.upstream.providers import (
    ProviderProfile,
    Usage,
    UsageMeter,
    credentials,
    endpoints,
    http_headers,
    metering,
    rate_limit_headers,
    request,
    rewrite,
)
from forebay.upstream.providers.content_encoding import _Inflater
from forebay.upstream.shared.leases.account_lease import AccountLease
from forebay.upstream.shared.leases.fault_row import FaultRow
from forebay.upstream.shared.leases.lease import LedgerLease
from forebay.upstream.shared.leases.leased_budget import LeasedBudget
from forebay.upstream.shared.leases.leased_stoppages import LeasedStoppages
from forebay.upstream.shared.ledger import (
    budget_shares,
    ledger,
    limit_learning,
    observed_learning,
    quota_shares,
    rate_shares,
    stoppages,
)
from forebay.upstream.shared.ledger.ledger import AccountLedger
from forebay.upstream.shared.ledger.ledger_state import LedgerState, MemberState
from forebay.upstream.shared.ledger.messages import (
    BudgetRequest,
    BudgetTerms,
    ExchangeReply,
    ExchangeRequest,
    LimitRequest,
    SlotRequest,
)
from forebay.upstream.shared.ledger.rate_messages import RateRequest
from forebay.upstream.shared.ledger.stoppage_messages import StoppageRequest
from forebay.upstream.shared.stores import redis_store
from forebay.upstream.upstream_settings import UpstreamSettings

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

    def end_early(self: RunCompletion, run: Run, status: TaskStatus, error: str, cause: Any = None) -> None:
        original(self, run, status, error, cause)
        if run.holds_slot and not run.ended:
            self._dispatcher.return_slot(run)

    replace(RunCompletion, original, end_early)


def a_worker_takes_one_more_than_its_slots() -> None:
    swap(WorkerAgent.can_accept, ast.GtE, ast.Gt)


def a_run_that_awaits_its_child_keeps_its_slot() -> None:
    skip(SlotLoan.__init__, Dispatcher.lend_slot)


def an_account_sends_one_call_more_than_its_limit() -> None:
    swap(Account._has_slot, ast.Lt, ast.LtE)


def an_attempt_that_is_cancelled_keeps_its_permit() -> None:
    original = ThreadSafeAccount.settle

    def settle(self: ThreadSafeAccount, permit: Permit, outcome: CallOutcome) -> None:
        if outcome is not call_flow._CANCELLED:
            original(self, permit, outcome)

    replace(ThreadSafeAccount, original, settle)


def a_permit_granted_to_a_caller_who_has_gone_is_kept() -> None:
    always(Account, Account.release_unsent, returns=None)


def a_permit_granted_in_a_loop_that_has_closed_is_kept() -> None:
    always(Account, Account._release_lost, returns=None)


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


# --- conversations, and runs that wait: order, and bounds that starve and deadlock nobody ---


def each_message_that_comes_too_late_ends_in_a_call_of_its_own() -> None:
    original = Dispatcher._may_still_start

    def _may_still_start(self: Dispatcher, ticket: Ticket, pool: Pool) -> bool:
        may_start = original(self, ticket, pool)
        if not may_start:
            self.next_in_conversation(ticket)
        return may_start

    replace(Dispatcher, original, _may_still_start)


def a_handler_that_runs_itself_goes_deeper_than_the_bound() -> None:
    admission_controller._MAX_NESTING = 1500


def a_handler_that_runs_itself_stays_ahead_of_its_cancellation() -> None:
    admission_controller._DEEP = 10**9


def a_nested_task_that_is_queued_starts_the_next_one_at_once() -> None:
    original = Dispatcher.enqueue

    def enqueue(self: Dispatcher, ticket: Ticket, pool: Pool) -> None:
        original(self, ticket, pool)
        if ticket.nested:
            for worker in pool.workers:
                self.dispatch(worker)

    replace(Dispatcher, original, enqueue)


def a_nested_task_that_is_too_late_at_its_turn_is_counted_out_twice() -> None:
    def remove(self: Pool, ticket: Ticket, entry: Any) -> None:
        self.queue.remove(entry)
        self.nested -= ticket.nested

    replace(Pool, Pool.remove, remove)


def a_worker_with_many_open_runs_serves_by_priority_alone() -> None:
    replace(PriorityQueue, PriorityQueue.serving_order, lambda _: list(Priority))


def a_worker_with_many_open_runs_passes_a_pool_over_uncounted() -> None:
    skip(pools.first_for, Pool.pass_over)


def draining_waits_for_a_message_behind_one_that_cannot_start() -> None:
    def _has_startable(self: Drain, *, without_store: bool = False) -> bool:
        tickets = filter(self._is_unfinished, self._registry.live.values())
        return any(self._may_run(ticket, without_store=without_store) for ticket in tickets)

    replace(Drain, Drain._has_startable, _has_startable)


def records_of_one_conversation_are_leased_together() -> None:
    replace(MemoryTaskStore, MemoryTaskStore._wait, lambda self, entry: self._enqueue(entry))


def a_new_message_overtakes_stored_ones() -> None:
    always(Conversations, Conversations.waits_in_overflow, returns=False)


def the_next_message_of_a_conversation_is_not_looked_for() -> None:
    always(StoredTasks, StoredTasks.conversation_moved, returns=None)


def the_next_message_starts_while_those_before_it_move() -> None:
    original = QueueSpill._take

    def _take(self: QueueSpill, ticket: Ticket) -> None:
        if is_movable(ticket):
            self._conversations.clear()
            original(self, ticket)

    replace(QueueSpill, original, _take)


def what_may_not_move_overtakes_what_moves() -> None:
    def _behind_moved(tickets: list[Ticket]) -> list[Ticket]:
        del tickets
        return []

    drain._behind_moved.__code__ = _behind_moved.__code__


def a_message_stored_while_draining_overtakes_those_that_move() -> None:
    def _is_left(ticket: Ticket, spill: Any) -> bool:
        del ticket, spill
        return False

    admission_controller._is_left.__code__ = _is_left.__code__


def stored_messages_are_free_while_those_before_them_run_here() -> None:
    def _without_unstored_ahead(self: QueueSpill) -> list[str]:
        return [ticket.task_id for ticket in self._queued if ticket.stored]

    replace(QueueSpill, QueueSpill._without_unstored_ahead, _without_unstored_ahead)


def a_message_stored_while_draining_is_free_while_those_before_it_run_here() -> None:
    always(Conversations, Conversations.is_ahead_here, returns=False)


def a_conversation_parks_without_bound() -> None:
    always(Pool, Pool.may_park, returns=True)


def parked_messages_count_as_load() -> None:
    original = Pool.load

    def load(self: Pool, *priority: Priority, **of: Any) -> float:
        return original(self, *priority, **of) + self.parked / max(1, self.queue_bound)

    replace(Pool, original, load)


def new_runs_begin_however_many_wait() -> None:
    always(WorkerAgent, WorkerAgent.bars_new_runs, returns=False)


def a_run_that_waits_for_work_keeps_it_from_beginning() -> None:
    always(Run, Run.begin_exemption, returns=False)
    always(Run, Run.end_exemption, returns=None)


def runs_of_low_priority_keep_better_ones_from_beginning() -> None:
    original = WorkerAgent.bars_new_runs

    def bars_new_runs(self: WorkerAgent, _: Priority) -> bool:
        return original(self, Priority.LOW)

    replace(WorkerAgent, original, bars_new_runs)


def work_that_has_not_begun_takes_the_room_of_nested_tasks() -> None:
    original = Pool.load

    def load(self: Pool, *priority: Priority, nested: bool = False, **of: Any) -> float:
        return original(self, *priority, nested=nested and not self.task_type, **of)

    replace(Pool, original, load)


def a_nested_task_is_stored_behind_work_that_has_not_begun() -> None:
    original = Ticket.nest

    def nest(self: Ticket, *, order_time: float | None) -> None:
        original(self, order_time=None if order_time is None else self.submitted_at)

    replace(Ticket, original, nest)


def the_submitters_mistake_counts_against_the_worker() -> None:
    def _is_submitters_mistake(_: object) -> bool:
        return False

    completion._is_submitters_mistake.__code__ = _is_submitters_mistake.__code__


# --- workers of many task types ---


def a_task_costs_more_the_more_types_its_worker_has() -> None:
    pools._MANY = 10**9


def a_worker_of_many_types_never_serves_the_pool_that_it_passes_over() -> None:
    skip(PoolGroup.next_pool, PoolGroup._serve)


# --- deadlines ---


def a_child_does_not_inherit_its_parents_deadline() -> None:
    original = AdmissionController._new_ticket

    def _new_ticket(self: AdmissionController, task: Any, parent: Any, **how: Any) -> Any:
        ticket = original(self, task, None, **how)
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
        self: SqliteTaskStore, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        self._writer.run_batched(self._put, (record, fence, until, now))
        return PutResult.STORED

    replace(SqliteTaskStore, original, put)


def a_task_starts_although_its_lease_has_lapsed() -> None:
    always(StoredTasks, StoredTasks.lease_is_valid, returns=True)


def a_start_is_not_recorded() -> None:
    always(SqliteTaskStore, SqliteTaskStore.begin_attempt, returns=True)


def new_work_overtakes_spilled_work() -> None:
    always(Pool, Pool.spilled_ahead, returns=0)


def an_earlier_task_of_the_same_id_ends_a_later_one() -> None:
    skip(TicketRegistry.hold_weakly, TicketRegistry.forget_end)


# --- tenants and reserved slots: nobody waits for the flood of another ---


def tenants_are_served_in_the_order_of_arrival() -> None:
    always(Pool, Pool._take_turns, returns=None)


def the_flood_of_a_tenant_fills_the_queue_for_all() -> None:
    original = Pool.load

    def load(
        self: Pool, priority: Priority = Priority.CRITICAL, *, nested: bool = False, tenant: str | None = None
    ) -> float:
        del tenant
        return original(self, priority, nested=nested)

    replace(Pool, original, load)


def new_tasks_wait_behind_the_records_of_all_tenants() -> None:
    def spilled_ahead(self: Pool, priority: Priority, tenant: str) -> int:
        del tenant
        return self.spilled.better(priority) + self.spilled.totals[priority] + self.spilled.spilling[priority]

    replace(Pool, Pool.spilled_ahead, spilled_ahead)


def records_come_back_tenant_after_tenant() -> None:
    def shares(
        self: TenantTurns, turns: int, *, here: object, elsewhere: Mapping[str, int], blocked: object = ()
    ) -> dict[str, int]:
        del self, here, blocked
        tenant = next(iter(elsewhere))
        return {tenant: min(turns, elsewhere[tenant])} if turns > 0 else {}

    replace(TenantTurns, TenantTurns.shares, shares)


def new_tasks_take_the_slots_of_records_on_their_way_back() -> None:
    always(Pool, Pool._is_promised, returns=False)


def all_tenants_come_back_by_one_schedule() -> None:
    original = TenantRetrySchedules.reserve

    def reserve(  # noqa: PLR0913 - as the original
        self: TenantRetrySchedules,
        tenant: str,
        now: float,
        drain_rate: float | None,
        draw: float,
        *,
        most: float = math.inf,
    ) -> float | None:
        del tenant
        return original(self, "all", now, drain_rate, draw, most=most)

    replace(TenantRetrySchedules, original, reserve)


def producers_of_all_tenants_stand_in_one_line() -> None:
    entered, is_behind = RoomQueue.enter, RoomQueue.is_behind
    replace(
        RoomQueue,
        entered,
        lambda self, task, *rest: entered(self, msgspec.structs.replace(task, tenant="all"), *rest),
    )
    replace(RoomQueue, is_behind, lambda self, task: is_behind(self, msgspec.structs.replace(task, tenant="all")))


def a_store_that_is_silent_keeps_slots_free() -> None:
    always(Refiller, Refiller._expect_no_records, returns=None)


def records_of_a_blocked_tenant_come_back() -> None:
    replace(SpilledCounts, SpilledCounts.servable, lambda self, _: self.totals)


def a_tenant_runs_as_much_as_it_likes() -> None:
    always(Tenants, Tenants.count_running, returns=False)


def new_tasks_of_a_tenant_go_before_what_has_begun() -> None:
    always(Tenants, Tenants.count_claims, returns=False)


def what_waits_for_a_bound_stays_without_a_worker() -> None:
    def fail_queued(self: Dispatcher, pool: Pool, error: str, **more: Any) -> None:
        while (entry := pool.queue.head()) is not None:
            self.fail_waiting(entry[2], error, **more)

    replace(Dispatcher, Dispatcher.fail_queued, fail_queued)


def a_drain_waits_for_slots_that_are_reserved_for_others() -> None:
    replace(WorkerAgent, WorkerAgent.slots_for, lambda self, _: self.max_concurrent)


def a_free_slot_is_room_for_tasks_that_fail_at_once() -> None:
    always(Pool, Pool.delayed_load, returns=0.0)


def the_bound_of_a_tenant_says_nothing_of_its_waits() -> None:
    always(Pool, Pool._max_rate, returns=math.inf)


def better_tasks_that_need_not_wait_pass_over_nobody() -> None:
    always(FewPools, FewPools.pass_over, returns=None)


def normal_tasks_take_reserved_slots() -> None:
    always(Pool, Pool.reserved_slots, returns=(0, 0))


def calls_of_all_tenants_weigh_the_same() -> None:
    always(FairOrder, FairOrder._step, returns=1.0)


# --- shutdown, and stores that fail: nothing acknowledged is lost, and an orderly stop is no crash ---


def waiting_tasks_are_moved_one_commit_each() -> None:
    original = QueueSpill._write

    async def write(self: QueueSpill, batch: dict[Ticket, bytes]) -> None:
        for ticket, envelope in batch.items():
            await original(self, {ticket: envelope})

    replace(QueueSpill, original, write)


def a_task_whose_write_is_not_answered_never_ends() -> None:
    skip(Drain._run, QueueSpill.abandon)


def zombies_keep_a_drain_from_ending() -> None:
    always(ActiveRuns, ActiveRuns.are_all_zombies, returns=False)


def a_handler_that_does_not_stop_works_without_a_slot() -> None:
    original = SlotClaims.claim

    def claim(self: SlotClaims, run: Run) -> Any:
        return None if run.abandoned_at is not None else original(self, run)

    replace(SlotClaims, original, claim)


def a_count_of_conversations_forgets_what_is_stored_meanwhile() -> None:
    original = Conversations.recount

    def recount(self: Conversations, *counts: Any) -> None:
        self._stored_since.clear()
        original(self, *counts)

    replace(Conversations, original, recount)


def closing_starts_what_waits() -> None:
    skip(Drain._run, QueueSpill.empty_queue)


def a_ticket_asked_for_by_id_has_no_deadline() -> None:
    skip(found_ticket, Ticket.restore)


def deadlines_follow_the_wall_clock() -> None:
    replace(Deadline, Deadline.remaining, lambda self: self.at - clock.wall_time())


def leases_are_valid_by_the_wall_clock() -> None:
    replace(HeldLeases, HeldLeases.is_valid, lambda self, task_id: clock.wall_time() < self._held[task_id].lease.until)


def a_clock_that_was_set_is_not_noticed() -> None:
    always(StoreMaintenance, StoreMaintenance._watch_clock, returns=None)


# --- tasks in a queue service ---


def a_reservation_is_never_ended() -> None:
    always(SqsTaskStore, SqsTaskStore._remove_reservations, returns=None)


def a_dead_letter_loses_its_envelope() -> None:
    always(SqsTaskStore, SqsTaskStore._keep_dead, returns=None)


def a_message_without_a_record_is_ignored() -> None:
    always(SqsTaskStore, SqsTaskStore._adopt, returns=3600.0)


def a_message_is_deleted_before_the_end_of_its_task_is_stored() -> None:
    original = SqsTaskStore.finish

    async def finish(self: SqsTaskStore, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        if (held := self._held.get(task_id)) is not None:
            await self._queues.delete([held.message])
        return await original(self, task_id, completion, fence=fence)

    replace(SqsTaskStore, original, finish)


def a_process_waits_long_between_its_attempts_to_write() -> None:
    sqlite_file._POLL_INTERVAL_MS = 5_000


def the_log_grows_until_the_disk_is_full() -> None:
    always(SqliteWriter, SqliteWriter._look, returns=None)


def nobody_looks_whether_the_file_is_still_there() -> None:
    always(FileWatch, FileWatch._find_change, returns=None)


def the_text_of_an_error_is_stored_as_it_came() -> None:
    error_text.__code__ = (lambda text: text).__code__


def an_orderly_stop_counts_as_a_crash() -> None:
    original = SqliteTaskStore.release

    async def release(self: SqliteTaskStore, leases: Sequence[Lease]) -> None:
        counted = [msgspec.structs.replace(each.record, attempts=each.record.attempts + 1) for each in leases]
        await original(
            self, [msgspec.structs.replace(each, record=record) for each, record in zip(leases, counted, strict=True)]
        )

    replace(SqliteTaskStore, original, release)


def a_submission_waits_for_a_silent_overflow_without_a_bound() -> None:
    async def _answer_in_time(_: AdmissionController, *arguments: Any) -> Any:
        return await arguments[-1]

    replace(AdmissionController, AdmissionController._answer_in_time, _answer_in_time)


def draining_does_not_report_what_the_overflow_has_not_answered() -> None:
    original = Drain._report

    def _report(self: Drain, inside: list[Ticket], cut: list[Ticket]) -> DrainReport:
        return msgspec.structs.replace(original(self, inside, cut), unanswered=0)

    replace(Drain, original, _report)


def a_drain_does_not_notice_that_a_run_begins_to_wait() -> None:
    always(Dispatcher, Dispatcher._tell_drains, returns=None)


def a_drain_takes_a_run_that_awaits_another_supervisor_for_stuck() -> None:
    def begin_await(self: Run, dispatcher: Any) -> None:
        del dispatcher
        self.awaited_tasks += 1

    replace(Run, Run.begin_await, begin_await)


def draining_without_a_limit_waits_for_a_silent_overflow() -> None:
    always(Drain, Drain._watch_store, returns=None)


def a_task_that_is_stored_as_draining_begins_waits_for_the_close() -> None:
    skip(AdmissionController._await_store, StoredTasks.release_if_left)


def draining_does_not_wait_for_the_end_of_a_task_in_the_overflow() -> None:
    original = Drain._is_unfinished

    def _is_unfinished(self: Drain, ticket: Ticket) -> bool:
        return original(self, ticket) and not (ticket.stored and ticket.status is TaskStatus.SPILLED)

    replace(Drain, original, _is_unfinished)


def a_task_that_is_stored_after_its_ticket_has_ended_runs_again() -> None:
    skip(QueueSpill._write, StoredTasks.complete_again)


def a_slow_overflow_gets_more_and_more_work() -> None:
    always(StoreLoad, StoreLoad.slowness, returns=0.0)


def leases_that_nobody_could_renew_are_taken_back_at_once() -> None:
    original = StoreMaintenance.reap

    async def reap(self: StoreMaintenance) -> None:
        self._store_failed = False
        await original(self)

    replace(StoreMaintenance, original, reap)


def an_end_that_the_overflow_did_not_take_is_forgotten() -> None:
    always(StoredTasks, StoredTasks._may_finish_later, returns=False)


# --- spend and quotas ---


def the_usage_of_an_attempt_that_failed_is_lost() -> None:
    original = Ticket.start

    def start(self: Ticket, run: TicketRun) -> None:
        original(self, run)
        self.usage = NO_USAGE

    replace(Ticket, original, start)


def a_call_without_a_price_passes_a_spent_budget() -> None:
    original = BudgetTracker.can_afford

    def can_afford(self: BudgetTracker, now: float, usd: float, priority: Priority = Priority.NORMAL) -> bool:
        return usd == 0.0 or original(self, now, usd, priority)

    replace(BudgetTracker, original, can_afford)


def a_call_under_way_when_its_task_ends_is_not_mentioned() -> None:
    always(UsageRecorder, UsageRecorder.begin, returns=None)


def what_others_have_reserved_is_spent_again() -> None:
    original = BudgetTracker.can_afford

    def can_afford(self: BudgetTracker, now: float, usd: float, priority: Priority = Priority.NORMAL) -> bool:
        _, reserved = self.reserved()
        return original(self, now, max(0.0, usd - reserved), priority)

    replace(BudgetTracker, original, can_afford)


def a_call_that_failed_midway_costs_nothing() -> None:
    original = Account.settle

    def settle(self: Account, now: float, permit: Permit, outcome: CallOutcome) -> float:
        if outcome.kind is Outcome.FAULT and outcome.usd is None:
            outcome = msgspec.structs.replace(outcome, usd=0.0)
        return original(self, now, permit, outcome)

    replace(Account, original, settle)


# --- money: every call is metered or rejected, and no table forgets what it protects ---


def dollars_that_another_account_has_taken_are_reserved() -> None:
    def try_reserve(
        self: BudgetTracker, now: float, usd: float, priority: Priority = Priority.NORMAL
    ) -> BudgetReservation:
        del priority
        return self.reserve(now, usd)

    replace(BudgetTracker, BudgetTracker.try_reserve, try_reserve)


def a_free_call_is_told_to_come_back_for_a_budget_that_never_refills() -> None:
    def can_afford_unreserved(
        self: BudgetTracker, now: float, usd: float, priority: Priority = Priority.NORMAL
    ) -> bool:
        del priority
        return usd <= self.budget.usd - self.spent(now)

    replace(BudgetTracker, BudgetTracker.can_afford_unreserved, can_afford_unreserved)


def a_restart_refills_a_budget() -> None:
    always(ThreadSafeBudget, ThreadSafeBudget.restore, returns=None)


def a_restart_refills_the_budget_of_a_key() -> None:
    def _new_budget(self: CallerLimits, budget: Budget) -> ThreadSafeBudget:
        return ThreadSafeBudget(f"the budget of {self.title}", budget)

    replace(CallerLimits, CallerLimits._new_budget, _new_budget)


def the_budget_of_a_key_is_named_as_that_of_its_target() -> None:
    original = ThreadSafeAccount._overloaded

    def _overloaded(self: ThreadSafeAccount, rejected: Rejected, *, sole_account: bool) -> errors.Overloaded:
        return original(self, rejected._replace(owner=""), sole_account=sole_account)

    replace(ThreadSafeAccount, original, _overloaded)


def calls_of_an_issued_key_are_attributed_to_the_key_of_its_provider() -> None:
    original = CallerReader.read_with_key

    def read_with_key(self: CallerReader, *given: Any, **how: Any) -> Caller:
        return msgspec.structs.replace(original(self, *given, **how), key_name="")

    replace(CallerReader, original, read_with_key)


def a_restart_alerts_again() -> None:
    always(SpendLog, SpendLog.alerted, returns=0.0)


def a_clock_that_was_ahead_refills_a_shared_budget() -> None:
    swap(budget_shares.begin_period, ast.Eq, ast.NotEq)


def a_small_call_that_is_rejected_does_not_alert() -> None:
    skip(LeasedBudget.rejection, LeasedBudget._report_rejection)


def spend_that_could_not_be_written_is_lost() -> None:
    always(UnwrittenSpend, UnwrittenSpend.return_batch, returns=None)


def a_tenant_that_has_spent_is_forgotten() -> None:
    always(ThreadSafeBudget, ThreadSafeBudget.is_fresh, returns=True)


def debts_of_a_given_quota_are_forgiven() -> None:
    original = Bucket.take

    def take(self: Bucket, now: float, amount: float) -> None:
        original(self, now, amount)
        self.level = max(self.level, -self.amount)

    replace(Bucket, original, take)


def any_refusal_lowers_a_given_quota() -> None:
    original = RateLimiter._empty_tightest

    def _empty_tightest(self: RateLimiter, now: float, charge: Charge, wanted: float, scope: RateScope | None) -> None:
        original(self, now, charge, wanted, scope or RateScope())

    replace(RateLimiter, original, _empty_tightest)


def what_a_strict_quota_has_lent_refills() -> None:
    replace(Bucket, Bucket.reserve, Bucket.take)


def a_strict_quota_reserves_what_is_expected() -> None:
    always(CallMeter, CallMeter._reserve_most, returns=None)


def a_used_quota_is_forgotten_with_its_account() -> None:
    original = AccountRegistry._make

    def _make(self: AccountRegistry, place: tuple[str, str], levels: object = None, lease: Any = None) -> Any:
        del levels
        return original(self, place, None, lease)

    replace(AccountRegistry, original, _make)


def after_a_suspension_all_calls_go() -> None:
    always(SpendSuspension, SpendSuspension.record_sent, returns=None)


def callers_who_hang_up_use_up_the_budget_of_others() -> None:
    original = CallRequest.unreported_cost

    def cost_within(self: CallRequest, seconds: float) -> float:
        return original(self, seconds)

    replace(CallRequest, CallRequest.cost_within, cost_within)


def a_model_never_thinks_between_two_words() -> None:
    always(MeteredStream, MeteredStream._add_silence, returns=None)


def one_request_that_is_too_dear_stops_the_key() -> None:
    always(SpendSuspension, SpendSuspension.confirm, returns=Suspended(60.0, math.inf))


def two_seconds_of_402s_suspend_the_quietest_key() -> None:
    vars(spend_suspension)["_GAPS"] = 0.0


def the_caller_that_was_refused_takes_every_probe_of_a_suspension() -> None:
    original = SpendSuspension.begin

    def begin(self: SpendSuspension, now: float, seconds: float) -> None:
        original(self, now, seconds)
        self._until_same = now + seconds

    replace(SpendSuspension, original, begin)


def a_call_that_cannot_be_metered_passes() -> None:
    original = CallMeter._price

    def _price(self: CallMeter, body: bytes, estimates: Any) -> CallPrice:
        return original(self, body, estimates)._replace(unmetered=None)

    replace(CallMeter, original, _price)


def an_escaped_path_is_another_endpoint() -> None:
    def normalize_path(path: str) -> str:
        return path.rstrip("/")

    endpoints.normalize_path.__code__ = normalize_path.__code__


def writes_to_a_cache_cost_as_much_as_other_input() -> None:
    def cost(self: Price, usage: BilledUsage) -> float:
        return self.usd(usage.input_tokens, usage.output_tokens, usage.cached_input_tokens)

    replace(Price, Price.cost, cost)


def hidden_output_of_a_stream_that_is_left_is_free() -> None:
    original = UsageMeter.unfinished_usage

    def unfinished_usage(self: UsageMeter, hidden_tokens: int, bound: int | None = None) -> Usage:
        del hidden_tokens
        return original(self, 0, bound)

    replace(UsageMeter, original, unfinished_usage)


def the_usage_of_a_response_in_the_background_is_ignored() -> None:
    always(CallMeter, CallMeter._correct_background, returns=None)


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


def a_high_background_is_never_compared() -> None:
    always(RefusalDetector, RefusalDetector._compare, returns=None)


def a_late_refusal_is_not_waited_for() -> None:
    def accepted(self: AdaptiveLimit, now: float, grant: Grant) -> None:
        self._confirm(now, grant)

    replace(AdaptiveLimit, AdaptiveLimit.accepted, accepted)


def only_ended_calls_raise_a_limit_above_the_best_one() -> None:
    always(AdaptiveLimit, AdaptiveLimit._may_leap, returns=False)


def a_refused_probe_is_repeated_as_soon_as_ever() -> None:
    always(LimitProbe, LimitProbe.record_failure, returns=None)


def an_experiment_that_made_nothing_faster_keeps_its_limit() -> None:
    original = SlowdownExperiment._restore

    def restore(self: SlowdownExperiment, now: float) -> ExperimentResult:
        self._our_load, self._limit_before = True, self.target_limit
        return original(self, now)

    replace(SlowdownExperiment, original, restore)


def calls_that_a_stalled_provider_kept_waiting_are_the_norm() -> None:
    original = SlowdownExperiment._restore

    def restore(self: SlowdownExperiment, now: float) -> ExperimentResult:
        self._before = sorted([*self._before, *[math.inf] * (2 * len(self._before))])
        return original(self, now)

    replace(SlowdownExperiment, original, restore)


def only_a_limit_that_is_used_up_is_suspected_of_slow_calls() -> None:
    original = SlowdownExperiment._watch

    def watch(
        self: SlowdownExperiment, now: float, level: float, in_flight: float, slowdown: float, **rest: Any
    ) -> ExperimentResult | None:
        if self._used < 0.9 * level - 1:
            self._used = 0
        return original(self, now, level, in_flight, slowdown, **rest)

    replace(SlowdownExperiment, original, watch)


# --- retries are bounded ---


def nobody_asks_the_retry_budget() -> None:
    always(RetryBudget, RetryBudget.withdraw, returns=True)


def a_retry_ignores_retry_after() -> None:
    original = RetryState.next_delay

    def next_delay(self: RetryState, *, retry_after: float | None = None, **rest: Any) -> float | None:
        return original(self, **rest)

    replace(RetryState, original, next_delay)


# --- a fault counts for whom it belongs to, and a call that waits is not forgotten ---


def a_timeout_of_the_caller_is_a_fault() -> None:
    always(TimeoutEvidence, TimeoutEvidence.judge, returns=TimeoutVerdict(fault=True, retry_may_help=True))


def an_exception_never_carries_an_answer() -> None:
    def find_error_answer(error: BaseException) -> None:
        del error

    sdk_exceptions.find_error_answer.__code__ = find_error_answer.__code__


def a_wrong_request_that_is_to_be_retried_uses_no_attempt() -> None:
    original = RetryState.next_delay

    def next_delay(self: RetryState, *, uses_attempt: bool, **rest: Any) -> float | None:
        del uses_attempt
        return original(self, uses_attempt=False, **rest)

    replace(RetryState, original, next_delay)


def all_models_share_an_account() -> None:
    always(UpstreamSettings, UpstreamSettings.model_group, returns="")


def a_few_faults_open_a_breaker() -> None:
    def should_open(self: MinimumSampleTrigger, window: FaultWindow) -> bool:
        calls, faults = window.recent()
        return calls >= self.min_calls and faults >= self.min_faults

    replace(MinimumSampleTrigger, MinimumSampleTrigger.should_open, should_open)


def the_rules_of_a_workers_breaker_are_dropped() -> None:
    def _with_time(rules: BreakerRules, timeout: float) -> BreakerRules:
        return registration._default_rules(10.0, timeout)

    registration._with_time = _with_time


def a_call_that_has_failed_probes() -> None:
    original = Account._provider_unavailable

    def _provider_unavailable(self: Account, now: float, request: CallRequest | None = None) -> Any:
        return original(self, now, None if request is None else msgspec.structs.replace(request, failed=False))

    replace(Account, original, _provider_unavailable)


def calls_that_fail_again_and_again_take_all_retries() -> None:
    original = RetryBudget.withdraw

    def withdraw(self: RetryBudget, now: float, *, keep: float = 0.0) -> bool:
        del keep
        return original(self, now)

    replace(RetryBudget, original, withdraw)


def spent_money_stops_one_model_only() -> None:
    always(AccountRegistry, AccountRegistry._accounts_of_key, returns=())


def spent_money_stops_only_the_models_that_were_called() -> None:
    skip(AccountRegistry._open, AccountRegistry._continue_suspension)


def a_call_waits_however_long_it_takes() -> None:
    original = CallQueue.enqueue

    def enqueue(self: CallQueue, now: float, request: CallRequest, waiter: Waiter) -> QueuedCall:
        self._longest_wait = math.inf
        return original(self, now, request, waiter)

    replace(CallQueue, original, enqueue)


def a_stream_that_is_dropped_keeps_its_permit() -> None:
    always(OpenAnswers, OpenAnswers.begin_collection, returns=False)


def a_throttled_call_goes_to_a_busier_account() -> None:
    def skips_retry(self: FallbackChain[Any], route: Any) -> bool:
        return route is self.own and any(self._untried)

    replace(FallbackChain, FallbackChain.skips_retry, skips_retry)


def a_forked_child_inherits_the_calls_of_its_parent() -> None:
    always(ThreadSafeAccount, ThreadSafeAccount.reset_after_fork, returns=None)


# --- accounts that processes share ---


def a_process_uses_what_it_held_after_its_lease() -> None:
    def apply(self: LedgerLease, now: float, request: ExchangeRequest, reply: ExchangeReply) -> None:
        original(self, now, request, reply)
        self.until = math.inf

    original = LedgerLease.apply
    replace(LedgerLease, LedgerLease.apply, apply)


def a_slot_is_returned_between_two_short_calls() -> None:
    def slot_request(self: AccountLease, now: float, waiting: int) -> SlotRequest | None:
        self._peak = 0
        return original(self, now, waiting)

    original = AccountLease._slot_request
    replace(AccountLease, AccountLease._slot_request, slot_request)


def calls_under_way_hold_nothing_of_a_limit_that_is_seen_later() -> None:
    def observe(  # noqa: PLR0913, PLR0917 - as the original
        self: RateLimiter, now: float, unit: str, limit: float, period: float, level: float
    ) -> ObservedLimit:
        self._under_way[unit] = 0
        return original(self, now, unit, limit, period, level)

    original = RateLimiter._observe
    replace(RateLimiter, RateLimiter._observe, observe)


def a_request_that_is_repeated_counts_twice() -> None:
    def exchange(self: AccountLedger, now: float, request: ExchangeRequest) -> ExchangeReply:
        if (known := self.state.members.get(request.member)) is not None:
            known.reply = None
        return original(self, now, request)

    original = AccountLedger.exchange
    replace(AccountLedger, AccountLedger.exchange, exchange)


def what_members_hold_of_a_quota_refills_meanwhile() -> None:
    quota_shares.bound_level = lambda *_: None


# --- refusals: hints, weighed against what was accepted ---


def words_alone_tell_the_cause_of_a_refusal() -> None:
    def is_rate(_: RefusalCause, *, measured: bool, named: bool = False) -> bool:
        return named

    replace(RefusalCause, RefusalCause.is_rate, is_rate)


def evidence_fades_and_calls_in_flight_are_forgotten_in_a_pause() -> None:
    always(RefusalCause, RefusalCause.leave_out, returns=None)


def a_call_that_is_refused_later_was_in_flight_at_the_provider() -> None:
    always(RefusalCause, RefusalCause._discount, returns=None)
    always(RefusalDetector, RefusalDetector._discount, returns=None)


def a_long_row_of_refusals_passes_for_a_short_one() -> None:
    always(LearnedRate, LearnedRate._is_short, returns=True)


def calls_accepted_right_after_a_refusal_say_nothing() -> None:
    always(RefusalTrial, RefusalTrial.record_accepted, returns=None)


def nothing_is_sent_right_after_a_refusal() -> None:
    always(RefusalTrial, RefusalTrial.wants_call, returns=False)


def a_call_that_is_refused_for_what_it_asks_counts_again_and_again() -> None:
    original = RefusalControl.record_refused

    def record_refused(self: RefusalControl, *args: Any, repeated: bool = False, **said: Any) -> bool:
        del repeated
        return original(self, *args, **said)

    replace(RefusalControl, original, record_refused)


def refused_calls_are_sent_again_at_once() -> None:
    always(RefusalPause, RefusalPause.wait, returns=0.0)


def a_retry_after_is_believed_before_it_was_right() -> None:
    original = RefusalPause.__init__

    def begin(self: RefusalPause) -> None:
        original(self)
        self._trusted = True

    replace(RefusalPause, original, begin)


def no_rate_is_learned() -> None:
    always(LearnedRate, LearnedRate.learn, returns=None)


def calls_that_are_refused_late_count_as_accepted() -> None:
    replace(_Mark, _Mark.without, lambda self, _: self)


def a_guess_is_expected_to_stay_as_it_is() -> None:
    def wait(self: LearnedRate, now: float, ahead: int = 0) -> float:
        return max(0.0, self._next_at - now) + ahead / self.rate if self.known else 0.0

    replace(LearnedRate, LearnedRate.wait, wait)


def refusals_at_once_are_no_first_guess() -> None:
    original = LearnedRate._is_far_too_fast
    replace(LearnedRate, original, lambda self: self.known and original(self))


def what_late_refusals_say_is_forgotten_when_they_end() -> None:
    original = RefusalControl.record_accepted

    def record_accepted(self: RefusalControl, now: float, sent_at: float, in_flight: int) -> None:
        self._named = False
        original(self, now, sent_at, in_flight)

    replace(RefusalControl, original, record_accepted)


def a_learned_rate_is_believed_however_far_it_falls() -> None:
    always(LearnedRate, LearnedRate.is_disproved, returns=False)


def a_call_that_is_rejected_earns_retries() -> None:
    original = ThreadSafeAccount._overloaded

    def _overloaded(self: ThreadSafeAccount, rejected: Rejected, *, sole_account: bool) -> errors.Overloaded:
        self.retries.record_first_attempt()
        return original(self, rejected, sole_account=sole_account)

    replace(ThreadSafeAccount, original, _overloaded)


def a_learned_rate_that_falls_is_never_checked() -> None:
    always(LearnedRate, LearnedRate._begin_check, returns=None)


def a_check_that_fails_says_nothing_for_a_rate() -> None:
    original = LearnedRate._end_check

    def end_check(self: LearnedRate, now: float, block: Block, check: _Check) -> None:
        falls, passes = self._falls, self._passes
        original(self, now, block, check)
        self._falls, self._passes = falls, max(passes, self._passes)

    replace(LearnedRate, original, end_check)


def a_raised_rate_that_is_refused_at_once_is_guessed_again() -> None:
    original = LearnedRate.learn

    def learn(self: LearnedRate, now: float, block: Block, *, guess: bool) -> None:
        self._before_rise = 0.0
        original(self, now, block, guess=guess)

    replace(LearnedRate, original, learn)


def a_refused_call_waits_for_a_retry_after_that_was_too_long_before() -> None:
    always(Account, Account.disbelieves_retry_after, returns=False)


def a_penalty_is_tried_again_at_once() -> None:
    original = RefusalControl.limit

    def limit(_: RefusalControl, __: float, limit: int) -> int:
        return limit

    replace(RefusalControl, original, limit)


def a_refusal_empties_the_quota_of_a_day() -> None:
    def fits(_: str, __: float, ___: float, ____: Any) -> bool:
        return True

    rate_limiter._fits.__code__ = fits.__code__


def a_remaining_amount_that_never_changes_is_believed() -> None:
    always(ObservedLimit, ObservedLimit._is_stuck, returns=False)


def a_refusal_makes_a_made_up_remaining_amount_credible() -> None:
    always(ObservedLimit, ObservedLimit._is_repetition_explained, returns=True)


def what_headers_took_off_one_window_is_returned_to_another() -> None:
    always(ObservedLimit, ObservedLimit._forget_earlier_windows, returns=None)


def a_call_that_is_refused_again_and_again_waits_at_the_head_of_the_queue() -> None:
    original = call_flow._Retrying._waits_for_quota

    def _waits_for_quota(self: Any, retry_after: float) -> bool:
        request = self._route.call_request
        retries, request.retries = request.retries, 0
        try:
            return original(self, retry_after)
        finally:
            request.retries = retries

    replace(call_flow._Retrying, original, _waits_for_quota)


def a_retry_for_which_no_time_is_left_hides_the_answer_of_the_provider() -> None:
    vars(call_flow)["_is_out_of_time"] = lambda *_: False


# --- which calls a provider had in flight ---


def a_call_accepted_at_once_contradicts_refusals_before_those_beside_it_are_known() -> None:
    vars(refusal_cause)["_KNOWN_AFTER"] = 0.0


def a_call_that_is_refused_again_was_in_flight() -> None:
    original = RefusalControl.record_refused

    def record_refused(self: RefusalControl, *args: Any, repeated: bool = False, **kwargs: Any) -> bool:
        if not repeated:
            return original(self, *args, **kwargs)
        cause, self._cause = self._cause, RefusalCause()
        try:
            return original(self, *args, repeated=repeated, **kwargs)
        finally:
            self._cause = cause

    replace(RefusalControl, original, record_refused)


# --- quotas that headers show, and the places of retries ---


def a_quota_that_headers_show_is_never_doubted() -> None:
    always(QuotaDoubt, QuotaDoubt.trial_wait, returns=math.inf)


def refused_trials_of_a_quota_are_repeated_at_once() -> None:
    always(QuotaDoubt, QuotaDoubt.record_refused, returns=None)


def a_trial_that_was_left_is_sent_again_soon() -> None:
    replace(QuotaDoubt, QuotaDoubt.record_unanswered, QuotaDoubt.cancel)


def a_call_that_timed_out_was_accepted() -> None:
    original = Exchange.connection_failed

    def connection_failed(self: Exchange, permit: Permit, error: Exception, **circumstances: bool) -> Any:
        result = original(self, permit, error, **circumstances)
        result.outcome = msgspec.structs.replace(result.outcome, answered=True)
        return result

    replace(Exchange, original, connection_failed)


def accepted_calls_do_not_tell_a_period() -> None:
    always(ObservedLimit, ObservedLimit._count_accepted, returns=None)


def limits_that_come_and_go_are_believed() -> None:
    always(QuotaDoubt, QuotaDoubt.refute, returns=None)


def a_used_up_window_gets_refunds() -> None:
    always(RateLimiter, RateLimiter._forget_reserved, returns=None)


def a_retry_loses_its_place_in_its_backoff() -> None:
    always(KeptPlaces, KeptPlaces.keep, returns=None)


def the_place_of_a_call_that_left_is_kept() -> None:
    always(ThreadSafeAccount, ThreadSafeAccount.drop_place, returns=None)


def of_two_retries_the_one_with_the_earlier_deadline_goes_first() -> None:
    original = FairOrder.rank

    def rank(self: FairOrder, request: CallRequest) -> tuple[float, float]:
        return (original(self, request)[0], request.deadline)

    replace(FairOrder, original, rank)


def retries_that_help_use_up_the_budget_for_failures() -> None:
    always(RetryBudget, RetryBudget.refund, returns=None)


def a_call_that_is_refused_for_a_quota_loses_its_place() -> None:
    always(ThreadSafeAccount, ThreadSafeAccount.quota_wait, returns=0.0)


def a_call_that_is_not_retried_is_tried() -> None:
    always(Account, Account._may_try, returns=True)


# --- the gateway ---


def a_web_page_from_elsewhere_may_call() -> None:
    always(RequestValidator, RequestValidator._find_foreign_origin, returns=None)


def a_revoked_key_is_valid_until_a_restart() -> None:
    always(KeyRegistry, KeyRegistry._read_if_changed, returns=None)


def a_changed_key_has_its_budget_again() -> None:
    original = KeyRegistry._replace

    def _replace(self: KeyRegistry, snapshot: KeySnapshot) -> None:
        self._limits.clear()
        original(self, snapshot)

    replace(KeyRegistry, original, _replace)


def a_key_for_some_models_is_for_all() -> None:
    always(IssuedKey, IssuedKey.allows_model, returns=True)


def credentials_of_a_caller_go_with_the_held_key() -> None:
    def replace_credentials(self: ProviderKey, raw_headers: RawHeaders, path: str) -> RawHeaders:
        name, value = self.header(path)
        kept = [pair for pair in raw_headers if pair[0].decode().lower() != name]
        return (*kept, (name.encode(), value.encode()))

    replace(ProviderKey, ProviderKey.replace_credentials, replace_credentials)


def callers_of_different_keys_share_connections() -> None:
    def hash_credentials(headers: object) -> int:
        return 0

    connection_pool.hash_credentials.__code__ = hash_credentials.__code__


def heads_that_differ_in_their_headers_are_taken_for_the_same() -> None:
    original = RequestHeads.read

    def read(self: RequestHeads, method: str, path: str, raw_headers: RawHeaders) -> RequestHead:
        return next(iter(self._heads.values()), None) or original(self, method, path, raw_headers)

    replace(RequestHeads, original, read)


def bytes_of_a_provider_do_not_begin_its_read_timeout_again() -> None:
    original = PooledConnection._reschedule_timeout

    def _reschedule_timeout(self: PooledConnection) -> None:
        if self._read_timeout_handle is None:
            original(self)

    replace(PooledConnection, original, _reschedule_timeout)


def a_call_that_has_ended_is_aborted() -> None:
    def abort(self: AbortableBlock) -> None:
        assert self._task is not None
        self._task.cancel()

    replace(AbortableBlock, AbortableBlock.abort, abort)


def a_retry_after_that_litellm_has_renamed_is_not_read() -> None:
    vars(rate_limit_headers)["RETRY_AFTER_HEADERS"] = http_headers.RETRY_AFTER_HEADERS[:2]


def a_connection_is_lent_with_bytes_of_an_earlier_answer() -> None:
    def is_connected(self: PooledConnection) -> bool:
        return self.transport is not None

    replace(PooledConnection, PooledConnection.is_connected, is_connected)


def a_connection_is_lent_that_is_about_to_be_closed() -> None:
    always(ConnectionPool, ConnectionPool.may_be_closing, returns=False)


def bytes_behind_a_response_lose_it() -> None:
    replace(PooledConnection, PooledConnection.data_received, ResponseHandler.data_received)


def a_body_that_becomes_invalid_leaves_its_reader_waiting() -> None:
    def _parse(self: PooledConnection, data: bytes) -> bool:
        ResponseHandler.data_received(self, data)
        return self.exception() is None

    replace(PooledConnection, PooledConnection._parse, _parse)


def decompression_ends_with_the_first_member() -> None:
    original = _Inflater._begin

    def _begin(self: _Inflater, chunk: bytes) -> bytes:
        return b"" if self._members else original(self, chunk)

    replace(_Inflater, original, _begin)


def responses_take_any_memory_together() -> None:
    always(BodyMemory, BodyMemory.check, returns=None)


def what_is_bound_to_fail_again_is_sent_again() -> None:
    original = ForwardedCall._failed

    def _failed(self: ForwardedCall, permit: Permit, error: Exception, connection: Any) -> Any:
        result = original(self, permit, error, connection)
        result.retryable = True
        return result

    replace(ForwardedCall, original, _failed)


def a_process_without_files_blames_its_provider() -> None:
    def _is_out_of_files(_: object) -> bool:
        return False

    forwarded_call._is_out_of_files.__code__ = _is_out_of_files.__code__


def a_models_name_beyond_the_bound_has_series_of_its_own() -> None:
    always(BoundedLabel, BoundedLabel.has_room, returns=True)


def tokens_of_a_stored_response_are_counted_at_each_fetch() -> None:
    always(ForwardedCall, ForwardedCall._was_counted, returns=False)


def the_last_callers_are_reset() -> None:
    always(_Server, _Server.answer_last_requests, returns=None)


# --- user code at hooks, and what ended tasks hold ---


def sinks_are_called_in_the_middle_of_the_supervisors_work() -> None:
    original = EventBus.emit

    def emit(self: EventBus, event: Event) -> None:
        sinks, self._sinks = self._sinks, ()
        original(self, event)
        self._sinks = sinks
        for name, sink in sinks:
            _hooks.call_plain_hook(name, sink, event)

    replace(EventBus, original, emit)


def a_hook_that_raises_stops_its_caller() -> None:
    def call_hook(what: str, hook: Any, *arguments: Any) -> Any:
        return hook(*arguments)

    _hooks.call_hook.__code__ = call_hook.__code__


def ctrl_c_is_taken_for_a_failure() -> None:
    def raise_again_if_interrupt(error: BaseException | None) -> None:
        """Do nothing."""

    _hooks.raise_again_if_interrupt.__code__ = raise_again_if_interrupt.__code__


def a_cancelled_await_goes_on_without_its_slot() -> None:
    async def _wait_for_slot(run: Run, granted: asyncio.Future[None]) -> None:
        await granted

    slot_loans._wait_for_slot.__code__ = _wait_for_slot.__code__


def a_slot_that_was_ended_at_once_raises_a_bare_cancellation() -> None:
    always(Slot, Slot._was_stopped, returns=False)


def only_one_reader_of_a_subscription_is_woken() -> None:
    def _wake(self: Subscription) -> None:
        if self._waiters and not self._waiters[-1].done():
            self._waiters[-1].set_result(None)

    replace(Subscription, Subscription._wake, _wake)


def a_worker_takes_tasks_before_its_handler_has_started() -> None:
    original = WorkerAgent.can_accept

    def can_accept(self: WorkerAgent) -> bool:
        accepting, self.accepting = self.accepting, True
        accepts = original(self)
        self.accepting = accepting
        return accepts

    replace(WorkerAgent, original, can_accept)


def a_worker_that_cannot_be_started_leaves_its_tasks_waiting() -> None:
    always(WorkerStarts, WorkerStarts._end_waiting, returns=None)


def a_stored_task_is_held_though_its_worker_cannot_be_started() -> None:
    replace(Spill, Spill.return_to_store, lambda self, ticket: self.stored.requeue(ticket))


def closing_ignores_a_start_in_progress() -> None:
    original = BackpressureSupervisor._close

    async def _close(self: BackpressureSupervisor, dispatcher: Dispatcher) -> None:
        self._starting = None
        await original(self, dispatcher)

    replace(BackpressureSupervisor, original, _close)


def the_first_caller_of_a_key_takes_the_task_with_it() -> None:
    original = _Undecided.wait

    async def wait(self: _Undecided) -> None:
        try:
            await original(self)
        except asyncio.CancelledError:
            self._ticket.cancel("its submitter has gone")
            raise

    replace(_Undecided, original, wait)


def only_those_who_wait_for_the_store_keep_a_keyed_task() -> None:
    replace(_Undecided, _Undecided.is_abandoned, lambda self: not self.callers)


def the_key_of_a_task_that_comes_back_is_not_known() -> None:
    skip(Refiller._start_or_queue, TicketRegistry.remember_key)


def background_work_that_is_cancelled_gives_nothing_back() -> None:
    original = Core.run_in_background

    def run_in_background(self: Core, work: Any, **_: Any) -> None:
        original(self, work)

    replace(Core, original, run_in_background)


def no_deadline_ends_a_task_whose_start_is_not_recorded() -> None:
    skip(StoredTasks.record_start, Run.set_timer)


def closing_leaves_a_submission_to_a_store_that_does_not_answer() -> None:
    replace(Core, Core.close, lambda self: self.timers.close())


def closing_awaits_a_stop_without_a_bound() -> None:
    async def _ends(future: asyncio.Future[Any], _: float) -> bool:
        await asyncio.wait((future,))
        return True

    worker_life._ends.__code__ = _ends.__code__


def a_start_that_is_cancelled_is_not_tried_again() -> None:
    skip(WorkerStarts._ended, WorkerStarts._failed)


def a_keyed_task_ends_while_others_wait_for_the_lookup_of_its_key() -> None:
    original = AdmissionController._new_ticket

    def _new_ticket(self: AdmissionController, task: Any, parent: Any, **how: Any) -> Ticket:
        ticket = original(self, task, parent, **how)
        ticket.shared = False
        return ticket

    replace(AdmissionController, original, _new_ticket)


def an_ended_task_holds_what_its_handler_held() -> None:
    def without_cause(self: Ticket, result: TaskResult) -> Ticket:
        return self

    replace(Ticket, Ticket.without_cause, without_cause)


def ended_tasks_are_kept_whatever_their_size() -> None:
    always(Ticket, Ticket.measure, returns=None)


def a_stored_error_is_raised_again_itself() -> None:
    def fresh_copy(error: Any) -> Any:
        return error

    errors.fresh_copy.__code__ = fresh_copy.__code__


def a_limit_that_raises_costs_a_permit() -> None:
    def observe(self: GuardedLimit, now: float, grant: Any, outcome: Outcome, **options: Any) -> None:
        self._guarded.observe(now, grant, outcome, **options)

    replace(GuardedLimit, GuardedLimit.observe, observe)


# --- what calls cost, and whose they are ---


def a_complete_stream_without_usage_costs_its_text() -> None:
    original = CallMeter.stream_usage

    def stream_usage(self: CallMeter, permit: Permit, meter: Any, end: Any) -> Usage | None:
        usage = original(self, permit, meter, end)
        found: Usage | None = meter.usage if usage is None and meter.complete else usage
        return found

    replace(CallMeter, original, stream_usage)


def each_spelling_of_a_key_is_an_account() -> None:
    def normalize_credential(credential: str) -> str:
        return credential

    credentials.normalize_credential.__code__ = normalize_credential.__code__


def junk_in_a_header_that_is_not_read_makes_an_account() -> None:
    original = ProviderProfile.read_credential

    def read_credential(self: ProviderProfile, request: Any, headers: Any) -> str:
        return credentials.read_credential(headers)

    replace(ProviderProfile, original, read_credential)


def another_provider_gets_all_headers() -> None:
    always(ReroutedRequest, ReroutedRequest.keeps, returns=True)


def a_bound_that_the_endpoint_ignores_bounds_its_cost() -> None:
    bounds = request._BOUNDS  # of all endpoints, for each
    names = tuple(dict.fromkeys(name for known in bounds.values() for name in known))
    bounds.update(dict.fromkeys(bounds, names))


def a_list_of_prompts_is_reserved_as_one() -> None:
    def _count_prompts(prompt: bytes) -> int:
        return 1

    request._count_prompts.__code__ = _count_prompts.__code__


def tools_within_the_input_pass() -> None:
    def _tools_within(content: object) -> list[Any]:
        return []

    metering._tools_within.__code__ = _tools_within.__code__


def models_that_may_answer_instead_are_free() -> None:
    def _names(models: object) -> tuple[str, ...]:
        return ()

    request._names.__code__ = _names.__code__


def a_field_whose_cost_no_usage_tells_passes() -> None:
    def _billed_apart(body: Any, endpoint: Any) -> str:
        return ""

    request._billed_apart.__code__ = _billed_apart.__code__


# --- callers that keep others out ---


def a_dropped_answer_goes_on_at_its_provider() -> None:
    def _close_dropped(response: Any, stream: MeteredStream) -> None:
        stream.abandon()

    httpx_transport._close_dropped.__code__ = _close_dropped.__code__


def any_caller_may_use_the_key_of_a_fallback() -> None:
    always(Exchange, Exchange.may_use_key, returns=True)


def a_call_is_judged_by_all_that_wait() -> None:
    def ahead_of(self: CallQueue, request: CallRequest) -> int:
        return self.ahead(request.priority)

    replace(CallQueue, CallQueue.ahead_of, ahead_of)


def calls_that_leave_take_their_turns_with_them() -> None:
    always(CallQueue, CallQueue._close_gaps, returns=None)


def a_call_waits_for_the_slot_of_its_own_caller() -> None:
    always(Account, Account._deadlocked, returns=None)


def what_a_nested_upstream_has_judged_counts_again() -> None:
    def is_judged(_: BaseException) -> bool:
        return False

    sdk_exceptions.is_judged.__code__ = is_judged.__code__


# --- workers that change while they run ------------------------------------------------------------------------------


def a_leaving_worker_runs_no_nested_task() -> None:
    def _update_accepting(self: WorkerAgent) -> None:
        self.accepting = self.ready and not self.leaving

    replace(WorkerAgent, WorkerAgent._update_accepting, _update_accepting)


def a_leaving_worker_begins_new_runs() -> None:
    replace(WorkerAgent, WorkerAgent.leave, lambda self: setattr(self, "leaving", True))


def what_waits_for_a_worker_that_is_gone_waits_forever() -> None:
    always(WorkerRemoval, WorkerRemoval.end_waiting, returns=None)


def a_stored_task_of_a_stopped_worker_is_lost() -> None:
    always(RunStopper, RunStopper._return_to_store, returns=None)


def a_selection_keeps_workers_that_are_gone() -> None:
    def _drop(self: WorkerSelector, worker: WorkerAgent) -> None:
        self._stamps.pop(worker, None)

    replace(WorkerSelector, WorkerSelector._drop, _drop)


def a_record_is_leased_for_a_type_that_is_paused() -> None:
    replace(Refiller, Refiller._may_refill, lambda self, _: not self._stored.refill_stopped)


def a_paused_type_has_the_room_of_its_slots() -> None:
    original = Pool.load

    def load(self: Pool, *priority: Priority, **of: Any) -> float:
        paused, self.paused = self.paused, False
        value = original(self, *priority, **of)
        self.paused = paused
        return value

    replace(Pool, original, load)


def a_drain_waits_for_a_type_that_is_paused() -> None:
    original = Drain._may_run

    def _may_run(self: Drain, ticket: Ticket, *, without_store: bool) -> bool:
        pool = self._core.pools.by_type.get(ticket.task.task_type)
        return original(self, ticket, without_store=without_store) or (pool is not None and pool.paused)

    replace(Drain, original, _may_run)


def a_larger_worker_waits_for_the_next_event() -> None:
    skip(RunCompletion.slots_changed, Dispatcher.update_slots)


# --- fan-outs and waiting for room ---


def who_leaves_a_fan_out_leaves_its_tasks_behind() -> None:
    always(FanOut, FanOut._stop, returns=None)


def agents_that_read_a_fan_out_keep_their_slots() -> None:
    always(AdmissionController, AdmissionController.lend_slots, returns=None)


def runs_take_their_slots_back_before_they_look_for_room() -> None:
    async def _wait(self: FanOut) -> None:
        reclaim = None
        if (running := running_task()) is not None:
            reclaim = self._admission.lend_slots(running, self._awaited_by(running))
        try:
            await self._wait_for_change()
        finally:
            if reclaim is not None:
                await reclaim()

    replace(FanOut, FanOut._wait, _wait)


def the_next_in_line_for_room_is_not_woken() -> None:
    always(RoomQueue, RoomQueue._wake_first, returns=None)


def a_fan_out_has_no_limit() -> None:
    always(FanOut, FanOut._is_window_full, returns=False)


# --- supervision: lives, restarts, trees -----------------------------------------------------------------------------


def a_start_that_only_connects_is_not_told_what_a_life_is() -> None:
    supervision._RETURNED = ""


def a_worker_whose_life_has_ended_is_not_started_again() -> None:
    always(RestartType, RestartType.restarts_after, returns=False)


def a_transient_worker_is_restarted_like_a_permanent_one() -> None:
    always(RestartType, RestartType.restarts_after, returns=True)


def restarts_are_not_bounded() -> None:
    always(RestartIntensity, RestartIntensity.allow, returns=True)


def restarts_of_any_time_count() -> None:
    original = RestartIntensity.allow
    replace(RestartIntensity, original, lambda self, _: original(self, 0.0))


def workers_that_are_restarted_together_are_stopped_in_order() -> None:
    original = Supervision._stop

    async def _stop(self: Supervision, workers: Sequence[WorkerAgent], error: str) -> None:
        for worker in workers:
            await original(self, [worker], error)

    replace(Supervision, original, _stop)


def what_runs_on_a_worker_that_is_restarted_goes_on() -> None:
    always(RunStopper, RunStopper.stop, returns=None)


def what_runs_on_a_worker_that_is_restarted_is_forgotten() -> None:
    async def stop(self: RunStopper, worker: WorkerAgent, *_: object, limit: float, **__: object) -> None:
        for run in self._dispatcher.runs.on(worker):
            run.abandon()
        await self.wait(worker, limit)

    replace(RunStopper, RunStopper.stop, stop)


def what_runs_on_a_worker_goes_on_until_it_is_restarted() -> None:
    always(Supervision, Supervision._begin_to_end_runs, returns=None)


def a_worker_is_given_tasks_after_the_end_of_its_life() -> None:
    always(WorkerAgent, WorkerAgent.begin_restart, returns=None)


def background_work_that_a_close_cuts_off_sets_timers() -> None:
    original = Timers.close

    def close(self: Timers) -> None:
        original(self)
        self._closed = False

    replace(Timers, original, close)


def a_task_of_a_nested_supervisor_is_over_before_its_handler_has_stopped() -> None:
    always(BackpressureSupervisor, BackpressureSupervisor.when_stopped, returns=None)


def an_end_that_was_dealt_with_is_handled_again() -> None:
    original = WorkerLife.stop

    async def stop(self: WorkerLife, *, grace: float, for_good: bool = True) -> None:
        ended = self.ended
        await original(self, grace=grace, for_good=for_good)
        self.ended = ended

    replace(WorkerLife, original, stop)


def ends_of_lives_are_ignored_while_other_workers_start() -> None:
    original = Supervision.exited

    def exited(self: Supervision, worker: WorkerAgent, end: Any) -> None:
        if self._active:
            original(self, worker, end)

    replace(Supervision, original, exited)


def the_supervisor_above_does_not_learn_that_one_gives_up() -> None:
    skip(Supervision._give_up, asyncio.Future.cancel)


def a_worker_that_is_failed_for_good_is_tried_again() -> None:
    replace(Breaker, Breaker.hold_open, lambda self, now: self.trip(now))


def what_waits_for_a_worker_that_is_failed_for_good_goes_on_waiting() -> None:
    always(Dispatcher, Dispatcher.fail_all_waiting, returns=None)


def a_task_of_a_restarted_worker_counts_against_those_above() -> None:
    def _is_stop_of_other_worker(_: BaseException | None) -> bool:
        return False

    completion._is_stop_of_other_worker.__code__ = _is_stop_of_other_worker.__code__


def a_task_of_a_restarted_worker_is_not_retried() -> None:
    def covers(self: Retry, error: BaseException) -> bool:
        return original(self, error) and not isinstance(error, errors.WorkerStopped)

    original = Retry.covers
    replace(Retry, original, covers)


def a_life_that_was_never_begun_is_left_behind() -> None:
    def _discard(life: Any, _: Any) -> None:
        """Leave it."""

    worker_life._discard.__code__ = _discard.__code__


def a_restart_that_is_cut_off_leaves_its_workers_behind() -> None:
    replace(Supervision, Supervision._worked, lambda self, _: setattr(self, "_working", None))


def a_worker_that_was_unregistered_while_it_started_lives_on() -> None:
    skip(Supervision._start, WorkerLife.stop)


def a_restart_is_tried_again_before_the_ends_of_other_lives() -> None:
    original = Supervision._start_or_try_again

    async def _start_or_try_again(self: Supervision, workers: Sequence[WorkerAgent]) -> None:
        await original(self, workers)
        if self._jobs and getattr(self._jobs[-1], "func", None) == self._try_again:
            self._jobs.rotate(1)

    replace(Supervision, original, _start_or_try_again)


# --- workers that go, and what waits for them ---


def tasks_of_a_tenant_that_is_blocked_outlive_the_last_worker_of_their_type() -> None:
    def fail_queued(self: Dispatcher, pool: Pool, error: str, **why: Any) -> None:
        while (entry := pool.queue.head()) is not None:
            self.fail_waiting(entry[2], error, **why)

    replace(Dispatcher, Dispatcher.fail_queued, fail_queued)


def a_record_comes_back_for_workers_that_are_gone() -> None:
    replace(Refiller, Refiller._takes_records, Refiller._is_served)


def a_task_goes_back_to_memory_for_workers_that_are_gone() -> None:
    always(StoredTasks, StoredTasks._is_to_be_served, returns=True)


def a_worker_of_no_run_is_revived() -> None:
    def _revive(self: BackpressureSupervisor, worker: WorkerAgent) -> None:
        if self._dispatcher is not None:
            self._dispatcher.supervision.revive(worker)

    replace(BackpressureSupervisor, BackpressureSupervisor._revive, _revive)


def a_removal_that_is_cancelled_is_forgotten() -> None:
    skip(BackpressureSupervisor._go_on_with_removal, Timers.at)


def a_restart_that_is_cancelled_is_forgotten() -> None:
    original = Supervision._pick_up
    replace(Supervision, original, lambda self, _: original(self, None))


def a_stop_that_is_cancelled_leaves_the_others_running() -> None:
    async def stop_handlers(workers: Iterable[WorkerAgent], *, grace: float = 0.0) -> None:
        for worker in reversed(list(workers)):
            await worker.life.stop(grace=grace)

    nested_supervisor.stop_handlers.__code__ = stop_handlers.__code__


def a_run_that_is_cancelled_before_its_first_step_is_forgotten() -> None:
    always(Runner, Runner._check_start, returns=None)


# --- what a web app needs ---


def a_task_that_expires_as_it_comes_back_cannot_be_found() -> None:
    skip(Refiller._start_or_queue, TicketRegistry.add)


def orphans_return_their_slot_to_the_next_run() -> None:
    always(RunCompletion, RunCompletion.close, returns=None)


def workers_keep_what_happened_to_them_when_their_supervisor_starts_again() -> None:
    skip(BackpressureSupervisor._forget_run, WorkerAgent.begin_run)


def a_run_outlives_its_event_loop() -> None:
    skip(BackpressureSupervisor.start, BackpressureSupervisor._end_if_cut_off)


def a_store_waits_for_a_loop_that_has_ended() -> None:
    skip(OperationQueue.open, OperationQueue._abandon_connection)


def a_log_of_events_has_what_handlers_report() -> None:
    replace(TaskProgress, TaskProgress._field_as_dict, Event._field_as_dict)


def the_slot_of_a_thread_is_free_when_its_time_is_up() -> None:
    async def wait_until_left(_: PortalSlot, __: Any, left: asyncio.Future[BaseException | None]) -> Any:
        try:
            await asyncio.wait((left,))
        except asyncio.CancelledError as error:
            return error
        return left.result()

    replace(PortalSlot, PortalSlot._wait_until_left, wait_until_left)


def workers_count_no_failed_attempts() -> None:
    skip(RunCompletion._failed, WorkerAgent.record_other_end)


def a_found_task_runs_as_it_was_read() -> None:
    skip(found_ticket, Ticket.mark_found)


# --- tasks with deadlines that wait ---


def every_task_is_judged_as_if_it_were_like_the_others() -> None:
    always(EstimatedTimes, EstimatedTimes.of, returns=None)


def estimates_that_predict_nothing_are_used() -> None:
    feasibility._PREDICTS = math.inf


def a_burst_is_judged_as_a_queue_that_stands() -> None:
    always(StandingQueue, StandingQueue.stands, returns=True)


def no_queue_stands() -> None:
    always(StandingQueue, StandingQueue.stands, returns=False)


def a_task_that_may_be_cut_off_takes_the_slot_of_those_not_admitted() -> None:
    always(Pool, Pool.is_crowded, returns=False)


def answers_of_the_overflow_wake_who_waits_for_room() -> None:
    original = Core._background_task_done

    def _background_task_done(self: Core, future: asyncio.Future[Any]) -> None:
        original(self, future)
        self.registry.notify_progress()

    replace(Core, original, _background_task_done)


def who_is_blocked_holds_up_the_line_for_room() -> None:
    def _first(line: Any) -> Any:
        return next((turn for turns in line for turn in turns), None)

    room._first.__code__ = _first.__code__
    always(RoomQueue, RoomQueue.pass_turn, returns=None)


def a_reader_that_is_cancelled_submits_its_task_again() -> None:
    async def _ticket_of(self: FanOut, task: Task) -> Ticket | None:
        return await self._admission.submit_once(task)

    replace(FanOut, FanOut._ticket_of, _ticket_of)


def tasks_of_a_declared_type_outlive_their_fan_out() -> None:
    def _is_own(ticket: Ticket, task: Task) -> bool:
        return ticket.task is task

    fan_out._is_own.__code__ = _is_own.__code__


def a_quorum_waits_for_its_reader() -> None:
    always(FanOut, FanOut._cancel_if_decided, returns=None)


def a_task_that_is_left_in_the_overflow_is_an_error_of_a_callback() -> None:
    original = FanOut.branch_ended

    def branch_ended(self: FanOut, branch: Any) -> None:
        fan_out._result_of(branch)
        original(self, branch)

    replace(FanOut, original, branch_ended)


def second_attempts_run_in_the_context_of_a_timer() -> None:
    original = AdmissionController.submit_hedge

    def submit_hedge(self: AdmissionController, task: Task, ticket: Ticket) -> Ticket | None:
        return Context().run(original, self, task, ticket)

    replace(AdmissionController, original, submit_hedge)


def the_reader_of_a_fan_out_that_is_left_waits_on() -> None:
    skip(FanOut._cancel, asyncio.Event.set)


# --- the context of handlers ---


def tasks_without_variables_run_in_one_context() -> None:
    vars(runner).update(NO_VARIABLES=Context())


# --- retries of tasks ---


def a_task_has_one_attempt_more_than_its_policy() -> None:
    swap(RetryState.next_delay, ast.GtE, ast.Gt)


def a_task_keeps_its_slot_between_its_attempts() -> None:
    original = Dispatcher.return_slot

    def return_slot(self: Dispatcher, run: Run, now: float | None = None) -> None:
        if not run.ticket.awaits_retry:
            original(self, run, now)

    replace(Dispatcher, original, return_slot)


def retries_take_nothing_from_the_budget() -> None:
    always(RetryBudget, RetryBudget.withdraw, returns=True)


def a_retry_goes_before_all_that_wait() -> None:
    original = Dispatcher.enqueue

    def enqueue(self: Dispatcher, ticket: Ticket, pool: Pool) -> None:
        number = self._sequence_number
        self._sequence_number = -number if ticket.retries is not None else number
        original(self, ticket, pool)
        self._sequence_number = number + 1

    replace(Dispatcher, original, enqueue)


def a_key_remembers_a_task_that_failed() -> None:
    skip(TicketRegistry.settle, TicketRegistry.forget_key)


def a_ticket_that_is_looked_up_knows_no_attempts() -> None:
    always(Ticket, Ticket.read_attempts, returns=None)


def a_restart_forgets_the_attempts_that_failed() -> None:
    always(TaskRetries, TaskRetries.resume, returns=None)


def a_stored_task_that_failed_for_good_is_no_dead_letter() -> None:
    def _is_dead(status: TaskStatus, lease: Lease | None) -> bool:
        return False

    stored_tasks._is_dead.__code__ = _is_dead.__code__


def a_retry_in_the_store_waits_for_maintenance() -> None:
    always(DelayedRecords, DelayedRecords._arm, returns=None)


def the_store_does_not_count_the_attempts_that_failed() -> None:
    def _with_failures(entry: Any, lease: Lease) -> TaskRecord:
        record: TaskRecord = entry.record
        return record

    memory._with_failures.__code__ = _with_failures.__code__


def a_woken_record_that_has_ended_is_counted_as_waiting() -> None:
    original = Refiller._set_depths

    def _set_depths(self: Refiller, depths: Any, pools: Iterable[Pool], spills: int, *further: Any) -> None:
        waiting = {task_type for task_type, _, _ in depths}
        original(self, depths, [pool for pool in pools if pool.task_type in waiting], spills, *further)

    replace(Refiller, original, _set_depths)


def a_task_on_its_way_to_the_store_needs_its_pool() -> None:
    original = Dispatcher._leave

    def _leave(self: Dispatcher, ticket: Ticket) -> None:
        self._pools[ticket.task.task_type]
        original(self, ticket)

    replace(Dispatcher, original, _leave)


def an_orderly_stop_forgets_the_attempts_that_failed_here() -> None:
    always(HeldLeases, HeldLeases.update, returns=None)


def attempts_that_failed_here_count_as_lost_leases() -> None:
    always(StoredTasks, StoredTasks.record_failures, returns=None)


# --- tasks that wait for their time, and overflows that processes share ---


def a_task_does_not_wait_for_its_time() -> None:
    always(ScheduledTasks, ScheduledTasks.hold, returns=False)


def a_drain_waits_for_a_task_of_tomorrow() -> None:
    original = Drain._may_run

    def _may_run(self: Drain, ticket: Ticket, *, without_store: bool) -> bool:
        return bool(ticket.run is None and ticket.task.starts_in()) or original(
            self, ticket, without_store=without_store
        )

    replace(Drain, original, _may_run)


def a_conversation_waits_behind_one_that_waits_for_its_time() -> None:
    sqlite._STATE_SCHEDULED = -2


def a_task_that_waits_here_passes_its_conversation_in_the_overflow() -> None:
    def _on_due(self: ScheduledTasks, ticket: Ticket) -> None:
        self.leave(ticket)
        self._dispatcher.join_queue(ticket)

    replace(ScheduledTasks, ScheduledTasks._on_due, _on_due)


def a_cancelled_task_leaves_its_time_behind() -> None:
    delayed_records._MAX_STALE = 1_000_000


def a_task_that_another_process_has_stored_waits_for_the_heartbeat() -> None:
    always(WaitingRecords, WaitingRecords.notice, returns=None)


def a_busy_process_overlooks_what_others_have_stored() -> None:
    always(WaitingRecords, WaitingRecords.room_appeared, returns=None)


def the_result_of_another_process_waits_for_the_heartbeat() -> None:
    always(AwaitedResults, AwaitedResults.notice, returns=None)


def all_processes_ask_for_a_record_at_once() -> None:
    always(AskJitter, AskJitter.delay, returns=0.0)


def a_process_takes_records_that_its_upstream_cannot_serve() -> None:
    always(Pool, Pool._calls_wait, returns=False)


def producers_wait_for_workers_that_are_given_up() -> None:
    def is_given_up(_: Pool) -> bool:
        return False

    Pool.is_given_up = property(is_given_up)  # type: ignore[assignment,method-assign]


# --- records that the store has lost ---


def a_client_goes_on_with_records_that_are_gone() -> None:
    edit_redis_script("call('GET', store_id) ~= group.store", "false")


def what_runs_here_is_not_stored_again_after_its_record_was_lost() -> None:
    always(LostRecords, LostRecords._restore_in_background, returns=None)


def what_waited_here_is_not_stored_again_after_its_lease_lapsed_and_its_record_was_lost() -> None:
    always(LostRecords, LostRecords.lapsed, returns=None)


def what_another_process_runs_is_stored_again_at_once() -> None:
    def is_settling(_: LostRecords) -> bool:
        return False

    LostRecords.settling = property(is_settling)  # type: ignore[assignment]


def what_is_returned_to_a_store_that_loses_its_records_is_lost() -> None:
    always(LostRecords, LostRecords.store_again, returns=False)


def the_result_of_a_handler_whose_record_has_gone_is_dropped() -> None:
    always(StoredTasks, StoredTasks._is_gone, returns=False)


def a_store_that_is_away_is_logged_for_each_task() -> None:
    failure_log._INTERVAL = 0.0


# --- the store on Redis: each call is done once, and what is acknowledged is there ---


def a_call_whose_answer_was_lost_is_done_again() -> None:
    edit_redis_script("remembered and remembered[1] == group.number", "false")


def a_call_that_arrives_after_later_ones_is_done() -> None:
    edit_redis_script("remembered and remembered[1] > group.number", "false")


def a_record_that_redis_did_not_acknowledge_stays() -> None:
    always(RedisTaskStore, RedisTaskStore._settle, returns=())


def a_record_can_be_leased_before_it_is_acknowledged() -> None:
    edit_redis_script("if hidden_until then", "if false then")


def a_parked_record_can_be_leased_before_it_is_acknowledged() -> None:
    edit_redis_script("if hidden_until then", "if hidden_until and not fence then")


def leases_expire_by_the_clock_of_whoever_looks() -> None:
    always(RedisClock, RedisClock.ahead, returns=0.0)


def a_redis_that_drops_the_memory_of_calls_is_opened() -> None:
    redis_master._NOTHING_DROPPED = "volatile-lru"


def a_mistyped_url_shows_the_value_of_any_option() -> None:
    shown_url._PUBLIC_OPTIONS = frozenset({"password", "passwrod"})


def the_smallest_bound_says_what_redis_keeps() -> None:
    edit_redis_script("math.max(group.bound, tonumber(call('GET', bound) or 0))", "group.bound")


def a_clock_that_agrees_within_a_second_is_corrected() -> None:
    redis_clock._STEP = 0.0


def a_record_is_taken_back_that_another_process_runs() -> None:
    edit_redis_script("if record[STATE] == 'leased' and record[FENCE] ~= fence then", "if false then")


def a_record_is_taken_back_that_another_call_has_put() -> None:
    edit_redis_script("record[ORIGIN] ~= origin", "false")


def the_end_of_a_lease_whose_answer_was_lost_is_rejected() -> None:
    always(RedisTaskStore, RedisTaskStore._remember, returns=None)


def a_repeated_write_is_acknowledged_before_the_replicas_have_it() -> None:
    edit_redis_script("call('EXPIRE', last, REMEMBERED)", "")


def a_write_is_acknowledged_before_the_replicas_have_it() -> None:
    always(RedisTaskStore, RedisTaskStore._shortage, returns=None)


def a_handler_starts_before_the_replicas_know_its_lease() -> None:
    redis._REPLICATED = frozenset()


def a_lost_lease_is_hidden_by_replicas_that_are_missing() -> None:
    def _is_refused_start(op: Any, reply: Any) -> bool:
        return False

    redis._is_refused_start.__code__ = _is_refused_start.__code__


def leases_that_lapsed_while_redis_was_away_are_taken_at_once() -> None:
    always(StoreMaintenance, StoreMaintenance.notice_interruption, returns=None)


def a_redis_that_was_away_is_not_noticed() -> None:
    always(RedisMaster, RedisMaster._notice_interruption, returns=None)


def a_full_redis_lets_no_task_end() -> None:
    edit_redis_script("call('ZREM', waiting, '')", "")


def a_redis_that_drops_keys_is_opened() -> None:
    def _check(info: Any, url: Any) -> None:
        return None

    redis_master._check.__code__ = _check.__code__


def a_redis_that_was_away_is_waited_for_by_each_call() -> None:
    original = RedisMaster.call

    def call(self: RedisMaster, *commands: Any) -> Any:
        self._is_away = False
        return original(self, *commands)

    replace(RedisMaster, original, call)


# --- workers' processes ---


def the_event_loop_lists_what_a_process_has_started() -> None:
    replace(ChildProcess, ChildProcess.kill, lambda self: self._kill_tree())


# --- LangGraph's checkpoints and items in sharded state ---


def a_checkpoint_is_written_before_its_values() -> None:
    original_blob, original = ThreadCheckpoints.put_blob, ThreadCheckpoints.put
    waiting: list[tuple[Any, ...]] = []

    async def put_blob(self: ThreadCheckpoints, *blob: Any) -> None:
        waiting.append((self, *blob))

    async def put(self: ThreadCheckpoints, record: Record) -> None:
        await original(self, record)
        while waiting:
            await original_blob(*waiting.pop())

    replace(ThreadCheckpoints, original_blob, put_blob)
    replace(ThreadCheckpoints, original, put)


def a_thread_loses_its_values_before_its_checkpoints() -> None:
    original = large_value.remove_prefix

    async def delete_all(self: ThreadCheckpoints) -> None:
        for prefix in ("b/", "w/", "c/"):
            await original(self.space, prefix)

    replace(ThreadCheckpoints, ThreadCheckpoints.delete_all, delete_all)


def a_task_that_writes_again_replaces_what_it_wrote() -> None:
    original = large_value.put_value

    async def put_value(space: Any, key: str, value: Any, if_version: int | None = None) -> None:
        await original(space, key, value)

    vars(thread_checkpoints)["put_value"] = put_value


def the_writes_of_a_task_are_entries_of_their_own() -> None:
    original = ThreadCheckpoints.put_writes

    async def put_writes(self: ThreadCheckpoints, ns: str, checkpoint_id: str, writes: Sequence[StoredWrite]) -> None:
        for write in writes:
            await original(self, ns, checkpoint_id, [write])

    replace(ThreadCheckpoints, original, put_writes)


def the_latest_checkpoint_is_found_among_all() -> None:
    async def latest(self: ThreadCheckpoints, checkpoint_ns: str) -> Record | None:
        found = [record async for record in self.records(checkpoint_ns)]
        return found[0] if found else None

    replace(ThreadCheckpoints, ThreadCheckpoints.latest, latest)


def pruning_deletes_what_a_delta_channel_is_made_from() -> None:
    async def needed(self: ThreadCheckpoints, checkpoint_ns: str, keep: int) -> set[str]:
        return {record.id async for record in self.records(checkpoint_ns, limit=keep)}

    needed.__name__ = "_needed"
    replace(ThreadCheckpoints, ThreadCheckpoints._needed, needed)


def pruning_deletes_what_is_written_meanwhile() -> None:
    async def prune(self: ThreadCheckpoints, checkpoint_ns: str, keep: int) -> None:
        needed = await self._needed(checkpoint_ns, keep)
        await self.delete_where(checkpoint_ns, lambda each: each.id not in needed)

    replace(ThreadCheckpoints, ThreadCheckpoints.prune, prune)


def pruning_leaves_what_a_crash_left() -> None:
    always(ThreadCheckpoints, ThreadCheckpoints._delete_orphans, returns=None)


def a_checkpoint_that_was_deleted_is_damaged() -> None:
    always(ThreadCheckpoints, ThreadCheckpoints.has, returns=True)


def a_thread_is_entered_in_the_index_on_any_shard() -> None:
    def bucket_of(self: ThreadIndex, _thread: Any, thread_id: str) -> int:
        return int(digest(thread_id), 16) % len(self._buckets)

    bucket_of.__name__ = "_bucket_of"
    replace(ThreadIndex, ThreadIndex._bucket_of, bucket_of)


def a_thread_that_is_deleted_counts_as_entered() -> None:
    original = ThreadIndex.remove

    async def remove(self: ThreadIndex, thread: Any, thread_id: str) -> None:
        markers = [entry async for entry in thread.scan("i/")]
        await original(self, thread, thread_id)
        for marker in markers:
            await thread.put(marker.key, marker.value)

    replace(ThreadIndex, original, remove)


def two_runs_from_one_checkpoint_give_their_values_the_same_version() -> None:
    def get_next_version(_self: ShardedSaver, current: str | None, _channel: None) -> str:
        return f"{int(current or 0) + 1:032}"

    replace(ShardedSaver, ShardedSaver.get_next_version, get_next_version)


def reading_an_item_does_not_put_its_expiry_off() -> None:
    always(ShardedStore, ShardedStore._refresh, returns=None)


# --- shared state: moving entries, and the near cache ---


def an_operation_does_not_move_its_entry_first() -> None:
    always(Move, Move.settle, returns=None)


def what_was_removed_while_it_moved_leaves_no_tombstone() -> None:
    always(MemoryShard, MemoryShard._leave_tombstone, returns=None)


def an_entry_is_moved_to_where_it_is() -> None:
    always(Move, Move._is_misplaced, returns=True)


def a_scan_does_not_read_the_old_shards() -> None:
    always(Move, Move.sources, returns=[])


def a_read_that_an_invalidation_has_overtaken_is_kept() -> None:
    always(Read, Read.invalidate, returns=None)


def a_near_cache_is_kept_while_nobody_listens() -> None:
    def listen(self: CachedServer, address: Any) -> None:
        self._listening_to = address

    replace(CachedServer, CachedServer.listen, listen)


def a_near_cache_answers_for_another_master() -> None:
    always(CachedServer, CachedServer._is_current, returns=True)


def an_update_begins_from_the_near_cache() -> None:
    original = RedisShard.get

    async def get(self: RedisShard, namespace: str, key: bytes, *, cached: bool = False) -> Any:
        return await original(self, namespace, key, cached=True)

    replace(RedisShard, original, get)


def a_call_that_fails_late_opens_a_closed_shard_again() -> None:
    original = GuardedShard.close

    async def close(self: GuardedShard) -> None:
        await original(self)
        self._is_closed = False

    replace(GuardedShard, original, close)


# --- shared state: shards that are down, closed or not answered in time, and answers to graphs ---


def a_probe_that_fails_is_the_last_one() -> None:
    async def probe(self: GuardedShard) -> None:
        await asyncio.sleep(0.5)
        await self.shard.open()
        await self.shard.ping()
        self._error = None
        self.load.came_up()

    replace(GuardedShard, GuardedShard._probe, probe)


def a_closed_state_is_used_on() -> None:
    async def close(self: GuardedShard) -> None:
        await self.shard.close()

    replace(GuardedShard, GuardedShard.close, close)


def a_blocked_loop_has_missed_the_answers() -> None:
    always(TimeLimit, TimeLimit.extend, returns=None)


def an_answer_is_given_with_each_attempt() -> None:
    swap(_repeated_answer, ast.Gt, ast.Lt)


# --- sagas: what people decide ---


def a_decision_about_an_older_state_of_a_saga_is_written() -> None:
    original = SagaAdmin._write

    async def write(self: SagaAdmin, stored: Any, *decision: Any) -> None:
        try:
            await original(self, stored, *decision)
        except errors.SagaConflict:
            now = await self._log.get(stored.header.saga_id)
            await original(self, now or stored, *decision)

    replace(SagaAdmin, original, write)


def a_step_that_is_done_is_said_not_to_be() -> None:
    saga_admin._KNOWN.clear()


def a_saga_that_is_not_parked_is_changed() -> None:
    replace(SagaAdmin, SagaAdmin._read_parked, SagaAdmin._read)


def the_outputs_of_a_saga_are_shown_unasked() -> None:
    original = SagaAdmin.show

    async def show(self: SagaAdmin, saga_id: str, *, outputs: bool = False) -> Any:
        return await original(self, saga_id, outputs=True)

    replace(SagaAdmin, original, show)


# --- sagas that go on in another process ---


def a_step_is_called_before_the_log_has_its_start() -> None:
    original = HeldSaga.write

    async def write(self: HeldSaga, entry: Any) -> None:
        if isinstance(entry, StartedEntry):
            self.note(entry)
        else:
            await original(self, entry)

    replace(HeldSaga, original, write)


def a_step_is_undone_before_the_log_knows_that_it_has_failed() -> None:
    skip(SagaRun._undo, HeldSaga.flush)


def whoever_lost_a_saga_goes_on_as_if_its_entries_were_written() -> None:
    always(HeldSaga, HeldSaga._write_batch, returns=None)


def a_process_that_was_paused_does_not_look_at_its_lease() -> None:
    always(HeldSaga, HeldSaga.check_lease, returns=None)


def the_steps_of_a_saga_are_undone_in_the_order_of_their_ends() -> None:
    original = SagaHistory.to_undo
    replace(SagaHistory, original, lambda self: original(self)[::-1])


def a_step_of_unknown_outcome_is_repeated_though_it_may_not_be() -> None:
    async def resume(self: SagaRun, step: Any, _: Any) -> Any:
        return await self._do(step)

    replace(SagaRun, SagaRun._resume, resume)


def a_compensation_has_the_priority_of_its_task() -> None:
    async def detached(_: SagaRun, work: Any) -> Any:
        return await work

    replace(SagaRun, SagaRun._detached, detached)


def a_saga_waits_for_a_scan_though_its_worker_is_there() -> None:
    always(SagaDriver, SagaDriver.scan_soon, returns=None)


def a_resumed_task_that_is_tried_again_begins_another_saga() -> None:
    original = SagaDriver._queue

    class ForgottenTasks(dict[str, Any]):
        def get(self, _: str, default: Any = None) -> Any:
            return default

    async def queue(self: SagaDriver, *arguments: Any) -> None:
        await original(self, *arguments)
        self._originals = ForgottenTasks(self._originals)

    replace(SagaDriver, original, queue)


# --- saga logs ---


def an_entry_of_a_saga_is_acknowledged_before_its_commit() -> None:
    async def append(self: SqliteSagaLog, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        self._writer.run_batched(sqlite_log._append, sqlite_log._Append(saga_id, write, fence, now))
        return True

    replace(SqliteSagaLog, SqliteSagaLog.append, append)


def whoever_lost_a_saga_may_still_write_to_it() -> None:
    original = SqliteSagaLog.append

    async def append(self: SqliteSagaLog, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        stored = await self.get(saga_id)
        return await original(self, saga_id, write, fence=fence if stored is None else stored.holder, now=now)

    replace(SqliteSagaLog, original, append)


def an_append_cannot_be_repeated() -> None:
    swap(sqlite_log._stands, ast.Eq, ast.NotEq)


def a_saga_that_a_cancelled_caller_took_stays_taken() -> None:
    always(SqliteSagaLog, SqliteSagaLog._release_late, returns=None)


def two_people_may_decide_about_the_same_saga() -> None:
    original = SqliteSagaLog.amend

    async def amend(self: SqliteSagaLog, saga_id: str, write: LogWrite, *, now: float) -> bool:
        if await original(self, saga_id, write, now=now):
            return True
        stored = await self.get(saga_id)
        return stored is not None and await original(self, saga_id, write._replace(number=len(stored.entries)), now=now)

    replace(SqliteSagaLog, original, amend)


def sagas_go_on_in_a_file_that_was_removed() -> None:
    skip(SqliteSagaLog.append, SqliteWriter.check_file)


def the_end_of_a_step_is_written_by_itself() -> None:
    replace(HeldSaga, HeldSaga._write_later, HeldSaga._begin_writing)


# --- the saga log on Redis --------------------------------------------------------------------------------------------


def a_saga_goes_on_before_the_replicas_have_its_entry() -> None:
    always(RedisSagaLog, RedisSagaLog._shortage, returns=None)


def a_repeated_entry_of_a_saga_is_acknowledged_before_the_replicas_have_it() -> None:
    edit_redis_script("call('HSET', header, 'state', state)", "", of=redis_log)


def a_lost_saga_is_hidden_by_replicas_that_are_missing() -> None:
    def _value(op: Any, answers: Any, shortage: Any) -> Any:
        value = op.decode(answers)
        return OperationError(shortage) if shortage is not None and op.is_acknowledged else value

    redis_log._value = _value


def a_saga_that_its_caller_was_not_given_stays_leased() -> None:
    async def _hold(_: Any, taking: Any, __: Any) -> Any:
        return await taking

    replace(RedisSagaLog, RedisSagaLog._hold, _hold)


def the_late_copy_of_a_call_begins_a_saga_again() -> None:
    edit_redis_script(
        "return client == own_client and tonumber(own_number) <= tonumber(number)", "return false", of=redis_log
    )


def a_full_redis_lets_no_saga_end() -> None:
    edit_redis_script("call('HDEL', header, '')", "", of=redis_log)


def sagas_that_lapsed_while_redis_was_away_are_claimed_at_once() -> None:
    always(RedisSagaLog, RedisSagaLog._notice_interruption, returns=None)


# --- shared state: fewer steps for each operation ---


def a_key_that_expires_no_longer_vanishes_from_scans() -> None:
    edit_state_script("has_expiries[expiries] = true", "")


def a_forked_child_uses_the_store_of_its_parent() -> None:
    always(OperationQueue, OperationQueue.reset_after_fork, returns=None)


def a_call_to_redis_leaves_its_answer_to_the_next() -> None:
    skip(redis_master._send_each, Connection.disconnect)


def a_shard_that_hangs_has_no_load() -> None:
    always(TimeLimits, TimeLimits.oldest_start, returns=None)


def a_large_group_is_one_round_trip() -> None:
    swap(in_parts, ast.LtE, ast.GtE)


# --- agents as steps of sagas ---


def a_node_of_a_step_begins_before_the_checkpoint_ahead_of_it_is_written() -> None:
    original = Step.call

    async def call(self: Step, key: str, threads: Any) -> Any:
        if self.handler is None:
            return await original(self, key, threads)
        return await self.handler.call(Task(self.name, *self.args, task_id=key, thread_id=key))

    replace(Step, original, call)


def a_saga_that_is_submitted_again_has_its_agents_begin_again() -> None:
    always(Run, Run.continue_submission, returns=None)


# --- sagas that are submitted again, and what errors say ---


def a_saga_goes_on_with_the_payload_of_a_later_submission() -> None:
    swap(SagaDriver._take, ast.NotEq, ast.Eq)


def a_saga_is_driven_by_the_function_of_another_one() -> None:
    def _check_name(*_: object) -> None:
        return None

    saga_driver._check_name.__code__ = _check_name.__code__


def an_error_without_a_status_of_its_own_had_no_effect() -> None:
    def _http_status(error: Any) -> int | None:
        return getattr(error, "status", None)

    step._http_status.__code__ = _http_status.__code__


# --- sagas: what may have had an effect ---


def an_error_that_says_that_nothing_was_sent_excuses_the_calls_before_it() -> None:
    original = SagaRun._failed

    async def failed(self: SagaRun, failed_step: Any, error: BaseException, *, may_be_done: bool) -> Any:
        return await original(self, failed_step, error, may_be_done=False)

    replace(SagaRun, original, failed)


def a_pivot_that_was_never_called_is_called_when_its_saga_is_cut_off() -> None:
    always(SagaRun, SagaRun._note_uncalled, returns=None)


def a_function_may_hide_what_ends_its_saga() -> None:
    replace(SagaRun, SagaRun._take_or_stop, SagaRun._take)


def a_pivot_is_settled_for_as_long_as_it_hangs() -> None:
    async def without_limit(self: SagaRun, _: Any, work: Any, __: str) -> Any:
        return await self._detached(work)

    replace(SagaRun, SagaRun._within_timeout, without_limit)


def a_saga_whose_lease_has_lapsed_is_driven_twice() -> None:
    replace(SagaDriver, SagaDriver._give_up_lapsed, SagaDriver._resume)


def a_step_after_the_pivot_that_gets_no_answer_had_no_effect() -> None:
    original = SagaRun._note_failed
    replace(SagaRun, SagaRun._needs_outcome, lambda _, asked: asked.pivot)

    def note_failed(self: SagaRun, failed_step: Any, error: BaseException, *, clean: bool) -> None:
        original(self, failed_step, error, clean=clean or self._history.past_pivot)

    replace(SagaRun, original, note_failed)


def an_idempotent_step_that_is_retried_after_the_pivot_had_no_effect_before() -> None:
    async def resume(self: SagaRun, failed_step: Any, _: Any) -> Any:
        return await self._do(failed_step)

    replace(SagaRun, SagaRun._resume, resume)


def the_waits_of_a_step_are_bounded_each_for_itself() -> None:
    original = RetryState.next_delay

    def next_delay(self: RetryState, **given: Any) -> float | None:
        self.total_delay = 0.0
        return original(self, **given)

    replace(RetryState, original, next_delay)


def a_compensation_is_tried_again_whatever_it_raises() -> None:
    def _covers(_: Any, __: BaseException) -> bool:
        return True

    saga_run._covers.__code__ = _covers.__code__


def an_error_without_connection_is_like_one_without_answer() -> None:
    step._NOT_CONNECTED = frozenset()


# --- sagas: slots, scans and leases ---


def a_compensation_waits_for_the_slot_of_its_saga() -> None:
    def _awaiting(_: Any) -> None:
        return None

    slot_loans._awaiting.__code__ = _awaiting.__code__


def a_saga_goes_on_without_its_slot_after_an_undo() -> None:
    async def at_once(self: SagaDriver, _: str) -> None:
        pass

    replace(SagaDriver, SagaDriver.take_slot_back, at_once)


def who_waits_for_a_saga_keeps_the_slot_that_it_needs() -> None:
    async def wait(self: SagaDriver, _: Run, end: asyncio.Future[None]) -> None:
        await asyncio.wait((end,))

    replace(SagaDriver, SagaDriver._wait_without_slot, wait)


def an_error_ends_the_scans_for_sagas() -> None:
    async def keep(self: SagaDriver) -> None:
        while not self.leaves_waiting:
            await self._scan()
            await asyncio.sleep(self._settings.lease / 3)

    replace(SagaDriver, SagaDriver._keep_scanning, keep)


def a_saga_that_was_undone_is_a_fault_of_its_worker() -> None:
    completion._SAGA_ENDS = ()  # type: ignore[assignment]


def a_process_takes_its_own_sagas() -> None:
    skip(SagaDriver._scan, SagaDriver._renew_held)


def a_lease_of_an_hour_ago_lasts_as_long_as_the_clock_was_set_back() -> None:
    memory_log.LONGEST_AHEAD = math.inf  # type: ignore[attr-defined]


# --- sagas: what the errors of clients say ---


def an_answer_that_cannot_be_read_says_that_there_is_no_effect() -> None:
    step._UNREADABLE = frozenset()


def an_error_after_a_successful_answer_is_a_refusal() -> None:
    step._REFUSALS = range(500)


def an_sdk_is_trusted_about_the_attempts_that_it_hides() -> None:
    def _is_first_attempt(_: BaseException) -> bool:
        return True

    step._is_first_attempt.__code__ = _is_first_attempt.__code__


# --- sagas: how steps are called ---


def a_step_gets_its_key_in_place_of_an_argument_of_its_own() -> None:
    original = step._place_of_key

    def place_of_key(function: Any) -> int:
        has_key = isinstance(function, partial) and "key" in function.keywords
        return original(function.func if has_key else function)

    step._place_of_key = place_of_key


# --- agents of frameworks ---


def a_cancelled_agent_is_left_in_its_thread() -> None:
    original = AgentThread.run

    async def run(self: AgentThread, function: Callable[[], Any]) -> Any:
        running = asyncio.ensure_future(original(self, function))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            running.cancel()
            raise

    replace(AgentThread, original, run)


def an_agent_takes_its_stop_for_a_failed_tool() -> None:
    def await_in_loop(self: AgentThread, coroutine: Coroutine[Any, Any, Any]) -> Any:
        awaited = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        with self.stopping(awaited):
            return awaited.result()

    replace(AgentThread, AgentThread.await_in_loop, await_in_loop)


def a_cancelled_agent_does_not_wait_for_tools_whose_caller_was_cancelled() -> None:
    async def wait(self: ToolThreads) -> None:
        for future in tuple(self._running):
            future.cancel()

    replace(ToolThreads, ToolThreads.wait, wait)


def a_task_of_an_agent_that_exits_ends_the_loop() -> None:
    def send(self: _Contained, value: Any) -> Any:
        return self._coroutine.send(value)

    replace(_Contained, _Contained.send, send)


def a_failed_agent_leaves_its_tasks() -> None:
    async def stop(self: RunTasks) -> None:
        pass

    replace(RunTasks, RunTasks._stop, stop)


def the_clean_up_of_a_cancelled_tool_is_cancelled_again() -> None:
    async def stop(self: RunTasks) -> None:
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.wait(self._tasks)

    replace(RunTasks, RunTasks._stop, stop)


def plain_tools_take_the_threads_of_the_loop() -> None:
    replace(RunTasks, RunTasks.executor_for, lambda _, __: None)


def an_agent_that_keeps_state_serves_all_tasks() -> None:
    original = detect._handler_from_framework

    def handler_from_framework(*arguments: Any) -> Handler:
        return replace_fields(original(*arguments), single_use=False)

    detect._handler_from_framework = handler_from_framework  # type: ignore[assignment]


def a_factory_may_return_an_agent_that_keeps_state_again() -> None:
    class Forgetful(weakref.WeakValueDictionary[Any, Any]):
        def get(self, *_: Any) -> None:
            return None

    vars(factory)["weakref"] = SimpleNamespace(WeakValueDictionary=Forgetful)


def the_first_agent_of_a_factory_is_made_in_the_context_of_its_registration() -> None:
    vars(factory)["copy_context"] = lambda: SimpleNamespace(run=lambda function: function())


def a_bound_async_client_sends_in_a_loop_that_a_thread_of_an_agent_makes() -> None:
    vars(httpx_transport)["other_loop"] = lambda: None


def the_agents_of_a_factory_take_any_payload() -> None:
    def without_check(*, check: object, **fields: Any) -> Handler:
        return Handler(**fields)

    vars(factory)["Handler"] = without_check


def an_overloaded_in_an_exception_of_a_framework_is_a_failure() -> None:
    def overloaded_behind(error: BaseException) -> None: ...

    chat._overloaded_behind = overloaded_behind


def a_thread_that_an_agent_has_left_behind_goes_on() -> None:
    original = AgentThread.run

    async def run(self: AgentThread, function: Callable[[], Any]) -> Any:
        try:
            return await original(self, function)
        finally:
            self._stopped = False

    replace(AgentThread, original, run)


def one_of_the_calls_of_an_agent_is_stopped() -> None:
    numbers = itertools.count()

    @contextlib.contextmanager
    def stopping(self: AgentThread, stoppable: Stoppable) -> Iterator[None]:
        if next(numbers):  # the first alone is cancelled, whenever the stop comes
            yield
            return
        with original(self, stoppable):
            yield

    original = AgentThread.stopping
    replace(AgentThread, original, stopping)


def the_stream_of_a_stopped_agent_stays_open() -> None:
    original = AgentThread.await_in_loop

    def await_in_loop(self: AgentThread, coroutine: Coroutine[Any, Any, Any], *, stops: bool = True) -> Any:
        return original(self, coroutine)

    replace(AgentThread, original, await_in_loop)


def a_call_of_an_agent_that_blocks_is_made_in_its_thread() -> None:
    blocking_client._transport_class = lambda _: lambda *transports: transports[-1]  # type: ignore[assignment]


def an_async_client_is_used_in_every_loop() -> None:
    blocking_client._LOOPS = SimpleNamespace(setdefault=lambda _, loop: loop)  # type: ignore[assignment]


def a_package_is_taken_for_a_framework_by_its_name() -> None:
    for package, framework in detect.FRAMEWORKS.items():
        detect.FRAMEWORKS[package] = framework._replace(marker="")


# --- local models ---


def a_model_that_has_crashed_is_not_loaded_again() -> None:
    def _running(self: GgufServer) -> Address | None:
        return self._address

    replace(GgufServer, GgufServer._running, _running)


def the_process_of_a_model_outlives_its_workers() -> None:
    always(GgufServer, GgufServer._leave, returns=None)


def a_start_that_is_cut_off_leaves_a_process() -> None:
    skip(GgufServer.start, GgufServer._leave)


def a_request_that_a_local_server_refuses_is_a_fault() -> None:
    vars(local_model)["_BAD_REQUESTS"] = frozenset()


def a_worker_that_has_not_started_takes_a_user_off_its_model() -> None:
    leave = GgufServer._leave

    def _leave(self: GgufServer, user: object) -> Any:
        return leave(self, user if user in self._users else next(iter(self._users), user))

    replace(GgufServer, leave, _leave)


def a_call_to_a_process_that_has_crashed_is_not_made_again() -> None:
    async def has_crashed(_: GgufServer, __: Address) -> bool:
        return False

    replace(GgufServer, GgufServer.has_crashed, has_crashed)


def an_event_that_cannot_be_read_is_dropped() -> None:
    read = local_model._event

    def _event(body: bytes) -> Any:
        with contextlib.suppress(local_model._UnreadableEvent):
            return read(body)
        return local_model._Event()

    vars(local_model)["_event"] = _event


def a_conversation_that_json_cannot_carry_is_admitted() -> None:
    vars(local_model)["_plain_chat_input"] = chat.chat_input


# --- sagas: the order of a replay ---


def a_recorded_outcome_is_given_at_once() -> None:
    always(SagaRun, SagaRun._wait_for_replay, returns=None)


def a_step_that_was_cut_off_has_failed_in_a_replay() -> None:
    always(SagaRun, SagaRun._note_cut_off, returns=None)


def a_function_that_waits_outside_of_its_steps_has_changed() -> None:
    saga_run._REPLAY_WAIT = 10.0


def a_step_inside_a_step_is_let_through() -> None:
    class Nowhere:
        def get(self) -> None:
            return None

        def set(self, _: object) -> None:
            return None

    saga_run._inside = Nowhere()  # type: ignore[assignment]


# --- sagas: user code that raises anything ---


def what_is_no_exception_passes_through_a_step() -> None:
    async def outcome_of(awaitable: Any) -> Any:
        try:
            return await awaitable
        except Exception as error:  # noqa: BLE001 - as the original
            return Raised(error)

    step.outcome_of.__code__ = outcome_of.__code__


def a_pivot_that_a_signal_has_ended_counts_as_not_done() -> None:
    def _leaves_open(error: BaseException) -> bool:
        return is_ambiguous(error)

    saga_run._leaves_open.__code__ = _leaves_open.__code__


def a_saga_that_cannot_be_parked_is_tried_again_at_once() -> None:
    skip(SagaDriver._end, HeldSaga.lose)


def what_cannot_be_written_is_written_again_and_again() -> None:
    replace(HeldSaga, HeldSaga._write_pending, HeldSaga._write_entries)


def a_compensation_that_the_code_no_longer_has_is_called() -> None:
    skip(SagaRun._compensate, SagaRun._check_same)


# --- reserved slots ---


def an_urgent_task_whose_turn_comes_waits_behind_others_for_their_slots() -> None:
    replace(Pool, Pool.has_ahead, lambda self, _: self.has_head)


# --- routing by cost ---


def a_task_goes_to_the_worker_that_finishes_first_whatever_it_costs() -> None:
    def pick_cheapest(self: CostSelector, now: float, within: float, *facts: Any, **more: Any) -> WorkerAgent | None:
        del now, within
        return self.pick(*facts, **more)

    replace(CostSelector, CostSelector.pick_cheapest, pick_cheapest)


def a_cheap_worker_is_chosen_though_it_misses_the_deadline() -> None:
    always(CostSelector, CostSelector._makes_it, returns=True)


def half_of_the_tasks_of_a_cheap_worker_may_be_late() -> None:
    setattr(RunTimes, "cautious", property(lambda self: self.average))  # noqa: B010 - mypy knows a property


def a_fast_worker_is_not_found_behind_a_slow_one_of_its_cost() -> None:
    replace(_SpeedSelector, _SpeedSelector._key, WorkerSelector._key)
    replace(_SpeedSelector, _SpeedSelector._score, WorkerSelector._score)


def a_run_that_was_cut_off_says_nothing() -> None:
    always(CostSelector, CostSelector.record_cut_off, returns=None)


def a_cost_that_was_slow_once_is_never_tried_again() -> None:
    always(_CostClass, _CostClass.try_again, returns=False)


def a_worker_that_fails_stays_the_cheapest() -> None:
    def _best(
        _: CostSelector, workers: WorkerSelector, priority: Priority, *, nested: bool, eligible: object
    ) -> WorkerAgent | None:
        del eligible
        return workers.pick(priority, nested=nested)

    replace(CostSelector, CostSelector._best, _best)


def a_cheap_worker_is_never_tried_so_that_its_cost_is_not_learned() -> None:
    always(CostSelector, CostSelector._untried, returns=None)


def a_cheap_worker_whose_first_run_cost_nothing_is_never_tried_again() -> None:
    def cost_nothing(self: _Trial, _: float) -> None:
        self.due = math.inf

    replace(_Trial, _Trial.cost_nothing, cost_nothing)


def a_hopeless_task_is_used_to_try_a_slow_cost() -> None:
    original = _CostClass.try_again

    def try_again(self: _CostClass, now: float, within: float, average: float) -> bool:
        self._fastest = 0.0
        return original(self, now, within, average)

    replace(_CostClass, original, try_again)


def many_slots_make_a_slow_worker_fast() -> None:
    always(CostSelector, CostSelector._seconds, returns=0.0)


def what_stops_one_worker_of_a_type_stops_all() -> None:
    always(OtherWorkers, OtherWorkers.__bool__, returns=False)


def learned_costs_differ_by_the_noise_of_runs() -> None:
    cost_selection._is_close.__code__ = (lambda cost, other: cost == other).__code__


def what_a_call_is_charged_reaches_no_run() -> None:
    always(Run, Run.record_usage, returns=None)


def a_cheap_worker_without_calls_to_spare_keeps_the_queue() -> None:
    def _pick_cheapest(self: StartGate, costs: CostSelector, pool: Pool, ticket: Ticket, avoid: object) -> Any:
        del avoid
        worker = self.cheapest(costs, pool, ticket)
        if worker is None or not worker.sources or self.may_start(worker, ticket.task.priority, waiting=1):
            return worker
        return None

    replace(StartGate, StartGate._pick_cheapest, _pick_cheapest)


def the_slowness_of_cheap_workers_rejects_tasks_of_fast_ones() -> None:
    always(CostSelector, CostSelector.fastest, returns=None)


def a_task_is_held_however_many_wait_for_the_cheap_worker() -> None:
    original = CostSelector.wait_for_cheaper

    def wait_for_cheaper(self: CostSelector, *facts: Any, ahead: int, **others: Any) -> float | None:
        del ahead
        return original(self, *facts, ahead=0, **others)

    replace(CostSelector, original, wait_for_cheaper)


def a_held_task_waits_for_a_cheap_worker_that_does_not_come() -> None:
    always(HeldTasks, HeldTasks._on_due, returns=None)


def a_cheap_slot_serves_no_held_task() -> None:
    always(HeldTasks, HeldTasks.next_for, returns=None)


def a_free_slot_takes_held_tasks_for_which_it_is_too_slow() -> None:
    swap(held_tasks._first_in_time, ast.LtE, ast.NotEq)


def a_held_task_is_taken_for_a_slot_that_it_may_not_have() -> None:
    original = HeldTasks.next_for

    def next_for(self: HeldTasks, worker: WorkerAgent) -> Ticket | None:
        if (ticket := original(self, worker)) is not None and worker.sources:
            self._join_queue(ticket, self._pools[ticket.task.task_type])
            return None
        return ticket

    replace(HeldTasks, original, next_for)


def reserved_slots_of_a_cheap_worker_are_waited_for() -> None:
    replace(_CostClass, _CostClass.count_slots, lambda self: sum(worker.slots for worker in self.workers))


def a_held_task_waits_for_a_worker_that_is_gone() -> None:
    always(HeldTasks, HeldTasks.slots_changed, returns=None)


def a_held_task_that_has_left_counts_for_good() -> None:
    always(Pool, Pool.stop_hold, returns=None)


def draining_waits_for_a_cheaper_worker() -> None:
    always(HeldTasks, HeldTasks.begin_drain, returns=None)


# --- scaling ---


def noise_of_the_arithmetic_asks_for_a_replica() -> None:
    def whole_replicas(replicas: float) -> int:
        return math.ceil(replicas)

    ratio.whole_replicas.__code__ = whole_replicas.__code__


def replicas_are_bought_while_a_quota_is_short() -> None:
    always(ScaleDecider, ScaleDecider._bottleneck, returns=None)


def a_shortage_counts_only_in_the_moment_of_a_reading() -> None:
    replace(ScaleDecider, ScaleDecider._bottleneck, lambda self, _: self._readings[-1][2])


def a_fleet_shrinks_without_stabilization() -> None:
    replace(ScaleDecider, ScaleDecider._stabilized, lambda _, __, allowed, ___: allowed)


def a_fleet_turns_down_as_often_as_the_load() -> None:
    swap(ScaleDecider._stabilized, ast.Mult, ast.Sub)


def a_surge_waits_for_the_mean_of_a_minute() -> None:
    decision._PANIC_RATIO = math.inf  # type: ignore[misc]


def slots_that_the_start_gate_keeps_free_are_no_sign_of_a_shortage() -> None:
    always(Pool, Pool.held_back_workers, returns=[])


def what_this_process_runs_counts_as_run_elsewhere() -> None:
    swap(demand.measure_demand, ast.Sub, ast.Add)


def an_autoscaler_ends_with_the_first_error_of_its_target() -> None:
    def _failure(_: Autoscaler, error: Exception, in_a_row: int) -> float:
        raise error

    replace(Autoscaler, Autoscaler._failure, _failure)


def a_call_that_is_cancelled_by_itself_ends_an_autoscaler() -> None:
    async def _within(
        _: Autoscaler, __: str, call: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any, leading: bool = False
    ) -> Any:
        del leading
        async with asyncio.timeout(30.0):
            return await call(*arguments)

    replace(Autoscaler, Autoscaler._within, _within)


def a_scale_that_has_failed_is_not_asked_for_more_until_its_backoff_is_over() -> None:
    swap(Autoscaler._scale, ast.LtE, ast.NotEq)


def a_shortage_of_the_supervisor_keeps_replicas_elsewhere_from_being_added() -> None:
    replace(Autoscaler, Autoscaler._bottleneck, lambda _, demand, replicas: replicas.limited_by or demand.limited_by)


def an_empty_fleet_waits_until_more_than_noise_is_asked_for() -> None:
    swap(ScalePolicy.replicas_for, ast.Gt, ast.Lt)


def a_worker_shrinks_to_the_slots_that_it_reserves() -> None:
    swap(WorkerTarget.least.fget, ast.Add, ast.Mult)  # type: ignore[attr-defined]


def tasks_beyond_the_bound_of_their_tenant_ask_for_slots() -> None:
    always(Tenants, Tenants.room, returns=math.inf)


def tasks_of_a_paused_type_ask_for_slots_here() -> None:
    swap(slots_asked, ast.Sub, ast.Add)


def a_process_that_is_to_go_is_killed() -> None:
    def drain(self: process_target._ReplicaProcess) -> None:
        self.draining = True
        self.signal(signal.SIGKILL)

    replace(process_target._ReplicaProcess, process_target._ReplicaProcess.drain, drain)


def the_death_of_a_process_is_seen_by_its_socket() -> None:
    async def _run_process(self: ProcessTarget, each: process_target._ReplicaProcess) -> int:
        ours, theirs = each.connect()
        reader, writer = await asyncio.open_connection(sock=ours)
        process = await self._spawn(theirs.fileno())
        theirs.close()
        each.start(process)
        await self._read_reports(each, reader)
        writer.close()
        return await process.wait()

    replace(ProcessTarget, ProcessTarget._run_process, _run_process)


def a_process_that_reports_no_more_goes_on_counting() -> None:
    always(process_target._ReplicaProcess, process_target._ReplicaProcess.look, returns=None)


def a_process_that_drains_by_itself_counts_as_ready() -> None:
    always(process_target._ReplicaProcess, process_target._ReplicaProcess.drains_itself, returns=False)


def one_that_waits_to_be_replaced_holds_back_all() -> None:
    always(ProcessTarget, ProcessTarget._cancel_restart, returns=None)


def what_somebody_else_has_scaled_is_overwritten() -> None:
    swap(KubernetesTarget.scale, ast.NotIn, ast.In)


def a_retry_after_of_kubernetes_is_not_kept() -> None:
    def _retry_after(_: object) -> float | None:
        return None

    kubernetes_api._retry_after.__code__ = _retry_after.__code__


def a_lost_watch_is_not_begun_from_a_list() -> None:
    always(KubernetesTarget, KubernetesTarget._list, returns="0")


def what_pods_are_short_of_is_not_asked() -> None:
    always(KubernetesTarget, KubernetesTarget._report, returns=None)


def a_leader_acts_past_its_lease() -> None:
    leader._LEAD_SHARE = 4 / 3  # type: ignore[misc]


def a_lease_is_taken_from_a_leader_that_lives() -> None:
    always(LeaderLease, LeaderLease._may_take, returns=True)


def a_conflict_about_a_lease_is_taken_for_a_success() -> None:
    async def write(self: KubernetesLease, holder: str, duration: float, *, after: LeaseRecord | None) -> LeaseRecord:
        return await original(self, holder, duration, after=after) or LeaseRecord(holder, duration, "0")

    original = KubernetesLease.write
    replace(KubernetesLease, KubernetesLease.write, write)


def every_autoscaler_acts() -> None:
    always(Autoscaler, Autoscaler._leads, returns=True)


def an_autoscaler_without_a_program_sees_no_tasks_that_run() -> None:
    swap(OverflowDemand.demand, ast.In, ast.NotIn)


# --- scaling: EC2 ---


def a_worker_takes_tasks_while_its_machine_may_go() -> None:
    skip(WorkerProtection._take_none, WorkerProtection._pause)


def a_protection_that_has_failed_counts_as_on() -> None:
    async def _protect(self: WorkerProtection) -> None:
        with contextlib.suppress(ScalingFailed):
            self._leaving = not await self._machine.protect()
        self._protected = not self._leaving

    replace(WorkerProtection, WorkerProtection._protect, _protect)


def a_task_that_runs_keeps_no_protection() -> None:
    always(WorkerProtection, WorkerProtection._is_busy, returns=False)


def a_machine_that_is_to_go_is_not_seen() -> None:
    always(ec2_protection.Ec2Protection, ec2_protection.Ec2Protection.is_leaving, returns=False)


def an_instance_in_trouble_is_taken_for_one_that_leaves() -> None:
    def _is_leaving(_: str | None) -> bool:
        return True

    ec2_protection._is_leaving.__code__ = _is_leaving.__code__


def several_processes_protect_one_instance() -> None:
    def _lock(_: str) -> None:
        return None

    ec2_protection._lock.__code__ = _lock.__code__


def an_instance_that_runs_tasks_is_released_without_a_hook() -> None:
    async def _release(self: Ec2Target, group: ec2.Group, desired: int) -> None:
        for each in group.instances_to_release(desired):
            await self._call("SetInstanceProtection", InstanceIds=[each], ProtectedFromScaleIn=False)

    replace(Ec2Target, Ec2Target._release, _release)


def what_an_instance_too_many_keeps_is_never_taken_again() -> None:
    skip(Ec2Target.replicas, Ec2Target._release)


def the_bounds_of_a_group_do_not_bind() -> None:
    def clamp(replicas: int, _: int, __: int | None) -> int:
        return replicas

    ratio.clamp.__code__ = clamp.__code__


def calls_of_an_instance_group_overtake_each_other() -> None:
    async def open_with_many_threads(self: AwsClient) -> None:
        self._executor = DaemonThreadExecutor("forebay-ec2", max_threads=8)
        self._client = await self._run("", self._connect)

    replace(AwsClient, AwsClient.open, open_with_many_threads)


def a_quota_that_instances_are_short_of_is_never_seen() -> None:
    always(InstanceReports, InstanceReports.follow, returns=None)


def a_call_that_is_throttled_is_not_repeated() -> None:
    ec2_client._ATTEMPTS = 1  # type: ignore[misc]


def a_call_that_was_given_up_is_sent_again() -> None:
    always(AwsClient, AwsClient._check_wanted, returns=None)


def one_reading_after_an_outage_decides() -> None:
    always(Autoscaler, Autoscaler._was_away, returns=False)


def a_call_of_a_leader_outlasts_its_lease() -> None:
    always(Autoscaler, Autoscaler._ended_with_lease, returns=contextlib.nullcontext())


def an_autoscaler_that_only_publishes_scales() -> None:
    async def scale(self: PublishedTarget, replicas: int) -> None:
        await self._target.scale(replicas)

    replace(PublishedTarget, PublishedTarget.scale, scale)


def an_autoscaler_that_does_not_lead_publishes_old_readings() -> None:
    def _lines(target: str, seen: AutoscalerStatistics) -> Iterator[str]:
        return original(target, msgspec.structs.replace(seen, leads=True))

    original = autoscale_metrics._lines
    autoscale_metrics._lines = _lines


def a_query_is_in_the_access_log() -> None:
    def keep_path(self: CallRecord, method: str, path: str, headers: Mapping[str, str]) -> None:
        original(self, method, path, headers)
        self.path = path

    original = CallRecord.__init__
    replace(CallRecord, original, keep_path)


def a_reload_refills_a_budget() -> None:
    always(UpstreamCore, UpstreamCore.adopt, returns=None)


def each_process_has_the_rate_of_a_key_for_itself() -> None:
    always(CallerLedgers, CallerLedgers.account, returns=None)


def a_ledger_of_a_budget_that_is_new_has_spent_nothing() -> None:
    def open_(cls: type[AccountLedger], now: float, request: ExchangeRequest) -> AccountLedger:
        ledger = original(now, request)
        ledger.state.recovered = 0.0
        return ledger

    original = AccountLedger.open
    AccountLedger.open = classmethod(open_)  # type: ignore[method-assign,assignment]


def a_reload_is_an_error_for_callers_until_all_processes_have_made_it() -> None:
    always(LedgerLease, LedgerLease._is_settling, returns=False)


def a_reload_gives_the_new_limits_to_the_upstream_before_it_alone() -> None:
    def adopt(self: UpstreamCore, old: UpstreamCore, *, accounts: bool) -> None:
        old._replaced.clear()
        original(self, old, accounts=accounts)

    original = UpstreamCore.adopt
    replace(UpstreamCore, original, adopt)


def a_reload_does_not_ask_whether_all_workers_can_make_it() -> None:
    original = vars(worker_reload)["ask_worker"]

    def ask(*arguments: Any, **how: Any) -> bytes | None:
        answer = original(*arguments, **how)
        return None if answer is None else b"done"

    vars(worker_reload)["ask_worker"] = ask


def a_worker_forgets_what_the_one_before_it_has_counted() -> None:
    always(WorkerGroup, WorkerGroup._read_counted, returns=None)


def what_a_worker_has_counted_is_written_at_scrapes_alone() -> None:
    always(WorkerGroup, WorkerGroup._keep, returns=None)


def the_removed_directory_of_the_workers_is_not_made_again() -> None:
    always(WorkerChannel, WorkerChannel.keep, returns=None)


def a_worker_that_drains_answers_for_the_whole_gateway() -> None:
    async def readiness(group: WorkerGroup) -> Readiness:
        problems = list(group._problems())
        return Readiness(problems, int(not problems), 1 + len(group._channel.others))

    replace(WorkerGroup, WorkerGroup.readiness, readiness)


def a_worker_accepts_connections_though_another_has_fewer() -> None:
    always(WorkerListener, WorkerListener._is_its_turn, returns=True)


def a_worker_leaves_connections_to_one_that_hangs() -> None:
    replace(WorkerListener, WorkerListener._lose_patience, WorkerListener._go_on)


def a_worker_that_drains_accepts_as_if_it_did_not() -> None:
    always(WorkerListener, WorkerListener.withdraw, returns=None)


def what_a_call_holds_is_kept_if_another_limit_rejects_it() -> None:
    always(CallerPermit, CallerPermit.release, returns=None)


def a_gateway_drains_for_as_long_as_its_file_says() -> None:
    def load(*arguments: Any, **settings: Any) -> GatewaySettings:
        settings["gateway"] = settings["gateway"] | {"drain_timeout": None}
        loaded = original(*arguments, **settings)
        assert isinstance(loaded, GatewaySettings)
        return loaded

    names = vars(gateway_command)
    original = names["load_gateway_settings"]
    names["load_gateway_settings"] = load


def a_check_looks_for_no_secrets() -> None:
    vars(gateway_command)["find_start_problems"] = lambda *_: []


def a_gateway_that_has_failed_once_to_follow_its_keys_does_not_try_again() -> None:
    async def watch(self: KeyRegistry) -> None:
        while True:
            await asyncio.sleep(0.0)
            await self.refresh()

    replace(KeyRegistry, KeyRegistry.watch, watch)


def an_issued_key_pays_for_the_api_key_of_its_name() -> None:
    original = SpendRecorder.begin

    def begin(self: SpendRecorder, request: CallRequest) -> RecordedCall | None:
        request.key_name = request.key_name or self._api_key
        return original(self, request)

    replace(SpendRecorder, original, begin)


# --- aliases and pools ---


def members_of_a_pool_share_calls_by_independent_draws() -> None:
    replace(EvenDraws, EvenDraws.__call__, lambda _: clock.draw())


def a_pool_serves_a_key_by_targets_that_it_is_not_for() -> None:
    replace(DeploymentPool, DeploymentPool.allowed_to, lambda self, _: self)


def an_alias_is_sent_as_it_was_named() -> None:
    def with_model(body: bytes, _: str) -> bytes:
        return body

    names = vars(rewritten_request)
    assert names["with_model"] is rewrite.with_model
    names["with_model"] = with_model


def the_account_of_a_caller_is_sent_with_the_key_of_the_gateway() -> None:
    def without_account(raw_headers: RawHeaders) -> RawHeaders:
        return raw_headers

    provider_key.without_account.__code__ = without_account.__code__


def a_full_account_gets_the_next_call_while_another_is_free() -> None:
    def choose(self: LoadBalancer[Any], _: float, __: Callable[[], float]) -> Peer[Any] | None:
        return self._open[0] if self._open else None

    replace(LoadBalancer, LoadBalancer.choose, choose)


def a_key_that_is_refused_ends_the_call() -> None:
    always(FallbackChain, FallbackChain.judge, returns=None)


# --- shared accounts ---


def a_cut_counts_for_each_process_that_makes_one() -> None:
    def report(state: LedgerState, asked: LimitRequest) -> None:
        limit_learning.report_limit(state, msgspec.structs.replace(asked, epoch=state.limit_epoch))

    vars(ledger)["report_limit"] = report


def a_process_that_cuts_the_limit_goes_on_in_all_its_slots() -> None:
    replace(AccountLease, AccountLease._left_by_cut, lambda self, *_: self._allowed)


def each_process_weighs_its_refusals_alone() -> None:
    always(AdaptiveLimit, AdaptiveLimit.add_answers, returns=None)


def each_process_gives_the_alert_of_a_shared_budget() -> None:
    original = budget_shares.take_alert

    def take_alert(state: LedgerState, budget: BudgetTerms, asked: BudgetRequest) -> float:
        return original(msgspec.structs.replace(state), budget, asked)

    vars(budget_shares)["take_alert"] = take_alert


def a_new_store_of_a_shared_account_refills_a_budget() -> None:
    always(LoggedBudget, LoggedBudget.spent, returns=0.0)


def a_ledger_of_a_newer_version_is_overwritten() -> None:
    vars(ledger)["LAYOUT"] = 1_000


def the_first_that_reaches_its_store_again_gets_what_others_have_used() -> None:
    vars(quota_shares)["quota_of_the_absent"] = lambda *_: 0.0


def a_member_is_back_when_it_repeats_what_was_not_answered() -> None:
    original = AccountLedger._join

    def _join(self: AccountLedger, request: ExchangeRequest) -> tuple[MemberState, bool]:
        member, counts = original(self, request)
        member.absence = None
        return member, counts

    replace(AccountLedger, original, _join)


def a_store_that_comes_back_empty_expects_nobody() -> None:
    vars(ledger)["expect_unnamed"] = lambda *_: None


def what_was_sent_before_a_breaker_closed_counts_after_it() -> None:
    def report(state: LedgerState, name: str, asked: Mapping[str, StoppageRequest]) -> None:
        current = {kind: each.epoch for kind, each in state.stoppages.items()}
        told = {
            kind: msgspec.structs.replace(each, epoch=current.get(kind, each.epoch)) for kind, each in asked.items()
        }
        stoppages.report_stoppages(state, name, told)

    vars(ledger)["report_stoppages"] = report


def the_probe_of_a_process_that_has_died_is_lost() -> None:
    vars(ledger)["end_probes"] = lambda *_: None


def each_process_probes_for_itself() -> None:
    always(LeasedStoppages, LeasedStoppages.needs_probe, returns=False)


def each_process_probes_for_itself_on_redis() -> None:
    edit_redis_script("(asked.most_probes or 1) - elsewhere", "(asked.most_probes or 1)", of=redis_store)


def a_process_with_a_broken_network_stops_all() -> None:
    always(FaultRow, FaultRow.is_contradicted_by, returns=False)


def each_process_on_redis_has_all_slots() -> None:
    edit_redis_script("min(share, wanted, limit - held_by_others)", "min(wanted, limit)", of=redis_store)


def the_account_that_had_the_last_call_gets_the_next_one_too() -> None:
    always(AccountLease, AccountLease.exchange_wait, returns=-1.0)


def what_was_spent_of_a_shared_budget_is_not_known_before_a_call() -> None:
    always(LeasedBudget, LeasedBudget.ask_spent, returns=None)


def a_lease_lasts_on_though_its_machine_was_suspended() -> None:
    always(LedgerLease, LedgerLease.count_suspension, returns=None)


def a_shared_budget_is_said_to_renew_before_its_ledger_lets_it() -> None:
    original = LeasedBudget._resets_in

    def _resets_in(self: LeasedBudget, now: float) -> float | None:
        self._renewed_at = self._period_until
        return original(self, now)

    replace(LeasedBudget, original, _resets_in)


def a_call_waits_for_a_quota_that_other_processes_have_used() -> None:
    always(Account, Account._reject_futile, returns=None)


def a_quota_that_must_be_leased_first_counts_as_used_up() -> None:
    always(AccountLease, AccountLease.exchange_wait, returns=0.0)


def the_use_of_other_processes_passes_for_a_wrong_count() -> None:
    def correct(state: LedgerState, member: MemberState, request: ExchangeRequest) -> None:
        observed = tuple(
            each
            if each.seen is None
            else msgspec.structs.replace(each, seen=msgspec.structs.replace(each.seen, counted=math.inf))
            for each in request.observed
        )
        observed_learning.correct_observed(state, member, msgspec.structs.replace(request, observed=observed))

    vars(ledger)["correct_observed"] = correct


def a_rate_is_learned_again_from_the_same_refusals() -> None:
    def report(state: LedgerState, member: MemberState, asked: RateRequest, *, knows: bool) -> None:
        rate_shares.report_rate(state, member, msgspec.structs.replace(asked, epoch=state.rate_epoch), knows=knows)

    vars(ledger)["report_rate"] = report


# --- progress ---


def progress_wakes_the_loop_though_nobody_listens() -> None:
    replace(Run, Run.report, lambda self, value: self._in_loop(self._emit_progress, value))


def progress_reaches_the_listeners_of_the_ticket_alone() -> None:
    def report(self: Run, value: Any) -> None:
        if self.ticket.listeners is not None:
            self._in_loop(self._emit_progress, value)

    replace(Run, Run.report, report)


def progress_reaches_the_listeners_of_the_supervisor_alone() -> None:
    def report(self: Run, value: Any) -> None:
        if self.dispatcher.core.bus.active:
            self._in_loop(self._emit_progress, value)

    replace(Run, Run.report, report)


def a_worker_that_was_skipped_with_a_stopped_one_is_forgotten() -> None:
    skip(Dispatcher._dispatch_if_known, Dispatcher.serve)
