"""Circuit breakers of upstreams and workers: after faults they stop calls for a while, then probe for recovery."""

from forebay.breaker.breaker import UPSTREAM_RULES, WORKER_RULES, Breaker, BreakerRules, BreakerState
from forebay.breaker.fault_window import FaultWindow
from forebay.breaker.triggers import FaultCountTrigger, MinimumSampleTrigger, Trigger, consecutive_faults

__all__ = [
    "UPSTREAM_RULES",
    "WORKER_RULES",
    "Breaker",
    "BreakerRules",
    "BreakerState",
    "FaultCountTrigger",
    "FaultWindow",
    "MinimumSampleTrigger",
    "Trigger",
    "consecutive_faults",
]
