"""Where a handler runs: in the event loop, or in a thread of our own."""

from forebay.engine.threads import Threads

__all__ = ["Threads"]
