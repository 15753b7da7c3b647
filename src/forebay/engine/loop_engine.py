"""In the event loop of the supervisor."""

from __future__ import annotations

from dataclasses import replace

from forebay.adapters import Handler
from forebay.adapters.handler_spec import HandlerSpec


class AutoEngine:
    """The default: what yields to the loop runs in it, what blocks runs in a thread."""

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:  # noqa: ARG002 - the seam's
        """Take it as it is."""
        return spec.build()


class LoopEngine:
    """Everything in the loop, plain callables too: without a thread's price, for those that never block."""

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:  # noqa: ARG002 - the seam's
        """Take it, and call it in the loop whatever it is."""
        handler = spec.build()
        return replace(handler, blocking=False) if handler.blocking else handler
