"""Forebay: backpressure for fleets of AI agents."""

from forebay.adapters import as_handler
from forebay.context import progress
from forebay.errors import (
    ForebayError,
    Overloaded,
    TaskCancelled,
    TaskExpired,
    TaskFailed,
    TaskTimedOut,
)
from forebay.supervisor import BackpressureSupervisor, DrainReport, Ticket, WorkerAgent
from forebay.task import Deadline, Estimate, Priority, Task, TaskResult, TaskStatus, Verdict
from forebay.typing import Reading, WorkerHandler, WorkerState

__version__ = "0.1.0"

__all__ = [
    "BackpressureSupervisor",
    "Deadline",
    "DrainReport",
    "Estimate",
    "ForebayError",
    "Overloaded",
    "Priority",
    "Reading",
    "Task",
    "TaskCancelled",
    "TaskExpired",
    "TaskFailed",
    "TaskResult",
    "TaskStatus",
    "TaskTimedOut",
    "Ticket",
    "Verdict",
    "WorkerAgent",
    "WorkerHandler",
    "WorkerState",
    "as_handler",
    "progress",
]
