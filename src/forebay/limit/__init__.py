"""Concurrency limits: how many calls may be in flight at one account of a provider.

A limit learns from outcomes (`Limit.observe`) and answers with a number (`Limit.limit`). It is pure and can be used
alone: it has no queue and no clock, and its owner counts the calls in flight.
"""

from forebay.limit.adaptive import AdaptiveLimit, AdaptiveLimitState
from forebay.limit.aimd import AimdLimit, TimeoutAimdLimit
from forebay.limit.base import AnswerCounts, Grant, Limit
from forebay.limit.fixed import FixedLimit
from forebay.limit.gradient import GradientLimit
from forebay.limit.vegas import VegasLimit

__all__ = [
    "AdaptiveLimit",
    "AdaptiveLimitState",
    "AimdLimit",
    "AnswerCounts",
    "FixedLimit",
    "GradientLimit",
    "Grant",
    "Limit",
    "TimeoutAimdLimit",
    "VegasLimit",
]
