"""Breakers: who fails is left alone for a while, then asked carefully; for upstreams and for workers."""

from forebay.breaker.breaker import UPSTREAM_RULES, WORKER_RULES, Breaker, BreakerRules, BreakerState
from forebay.breaker.window import Arm, FaultsAmong, FewCalls, Window, consecutive

__all__ = [
    "UPSTREAM_RULES",
    "WORKER_RULES",
    "Arm",
    "Breaker",
    "BreakerRules",
    "BreakerState",
    "FaultsAmong",
    "FewCalls",
    "Window",
    "consecutive",
]
