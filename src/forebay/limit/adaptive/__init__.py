"""The adaptive limit, which finds the capacity of an LLM provider, and the parts that it decides with."""

from forebay.limit.adaptive.adaptive_limit import AdaptiveLimit, AdaptiveLimitState

__all__ = ["AdaptiveLimit", "AdaptiveLimitState"]
