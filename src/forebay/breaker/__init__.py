"""Breakers: who fails is left alone for a while, then asked carefully; for upstreams and for workers."""

from forebay.breaker.breaker import UPSTREAM_RULES, WORKER_RULES, Breaker, BreakerRules, BreakerState
from forebay.breaker.triggers import FaultCountTrigger, FaultWindow, MinimumSampleTrigger, Trigger, consecutive_faults

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
