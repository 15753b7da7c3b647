"""Admission: priority thresholds, the priority queue, deadline feasibility and the Retry-After schedule."""

from forebay.admission.feasibility import EstimateBypass, EstimatedTimes, ServiceTimes
from forebay.admission.priority_queue import RANK_LAST, PriorityQueue, QueueEntry
from forebay.admission.retry_after_schedule import RetryAfterSchedule, TenantRetrySchedules
from forebay.admission.standing_queue import StandingQueue
from forebay.admission.tenant_queue import TenantQueue
from forebay.admission.tenant_turns import TenantTurns
from forebay.admission.thresholds import PriorityThresholds

__all__ = [
    "RANK_LAST",
    "EstimateBypass",
    "EstimatedTimes",
    "PriorityQueue",
    "PriorityThresholds",
    "QueueEntry",
    "RetryAfterSchedule",
    "ServiceTimes",
    "StandingQueue",
    "TenantQueue",
    "TenantRetrySchedules",
    "TenantTurns",
]
