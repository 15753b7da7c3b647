"""Forebay: backpressure for fleets of AI agents."""

from forebay.adapters import as_handler
from forebay.call_usage import CallUsage
from forebay.carried_context import carry
from forebay.context import progress
from forebay.errors import (
    ForebayError,
    Overloaded,
    TaskCancelled,
    TaskExpired,
    TaskFailed,
    TaskTimedOut,
)
from forebay.interfaces import Reading, WorkerHandler, WorkerState
from forebay.quota import Budget, Price, Quota
from forebay.retry import Retry
from forebay.supervisor import (
    BackpressureSupervisor,
    DrainReport,
    FanOut,
    FanOutProgress,
    Tenant,
    Ticket,
    WorkerAgent,
    progress_bar,
)
from forebay.task import Deadline, Estimate, Priority, Resume, Task, TaskResult, TaskStatus, Verdict
from forebay.upstream import Fallback, ProviderKeyLimits, Upstream

__version__ = "0.1.0"

__all__ = [
    "BackpressureSupervisor",
    "Budget",
    "CallUsage",
    "Deadline",
    "DrainReport",
    "Estimate",
    "Fallback",
    "FanOut",
    "FanOutProgress",
    "ForebayError",
    "Overloaded",
    "Price",
    "Priority",
    "ProviderKeyLimits",
    "Quota",
    "Reading",
    "Resume",
    "Retry",
    "Task",
    "TaskCancelled",
    "TaskExpired",
    "TaskFailed",
    "TaskResult",
    "TaskStatus",
    "TaskTimedOut",
    "Tenant",
    "Ticket",
    "Upstream",
    "Verdict",
    "WorkerAgent",
    "WorkerHandler",
    "WorkerState",
    "as_handler",
    "carry",
    "progress",
    "progress_bar",
]
