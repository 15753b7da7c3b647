"""pydantic-ai: agents as handlers, and an upstream as a concurrency limiter of agents and models."""

from forebay.adapters.pydantic_ai.handler import ToolResultNeeded, handler
from forebay.adapters.pydantic_ai.limiter import UpstreamLimiter

__all__ = ["ToolResultNeeded", "UpstreamLimiter", "handler"]
