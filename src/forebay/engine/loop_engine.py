"""The engines that run handlers in the supervisor's own event loop."""

from __future__ import annotations

from dataclasses import replace

from forebay.adapters import Handler
from forebay.adapters.handler_spec import HandlerSpec


class AutoEngine:
    """The default engine: a handler that yields to the loop runs in it, one that blocks runs in a thread."""

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:  # noqa: ARG002 - the interface's
        """Return the handler as it is."""
        return spec.build()


class LoopEngine:
    """An engine that runs everything in the loop, without threads: for plain callables that never block."""

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:  # noqa: ARG002 - the interface's
        """Return the handler, to be called in the loop in any case."""
        handler = spec.build()
        return replace(handler, blocking=False) if handler.blocking else handler
