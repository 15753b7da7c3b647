"""Who may come in: the gate's ladder, the line, the deadline check, the seats promised to those sent away."""

from forebay.admission.feasibility import EstimateBypass, ServiceTimes
from forebay.admission.priority_queue import RANK_LAST, PriorityQueue, QueueEntry
from forebay.admission.retry_after_schedule import RetryAfterSchedule
from forebay.admission.thresholds import PriorityThresholds

__all__ = [
    "RANK_LAST",
    "EstimateBypass",
    "PriorityQueue",
    "PriorityThresholds",
    "QueueEntry",
    "RetryAfterSchedule",
    "ServiceTimes",
]
