"""Limits: how many calls may be in flight at one upstream; each pure, and usable alone.

A limit is told what happens (`grant`, `accepted`, `observe`) and answers with a number (`limit`); see
`forebay.interfaces.Limit`. It holds no slots, no line and no clock: whoever uses one counts what is in flight.
"""

from forebay.limit.adaptive.adaptive_limit import AdaptiveLimit, AdaptiveLimitState
from forebay.limit.aimd import AimdLimit, TimeoutAimdLimit
from forebay.limit.fixed import FixedLimit
from forebay.limit.gradient import GradientLimit
from forebay.limit.vegas import VegasLimit

__all__ = [
    "AdaptiveLimit",
    "AdaptiveLimitState",
    "AimdLimit",
    "FixedLimit",
    "GradientLimit",
    "TimeoutAimdLimit",
    "VegasLimit",
]
