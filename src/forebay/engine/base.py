"""The interface of an engine: from what was registered, it builds a Handler that the dispatcher runs like any other."""

from __future__ import annotations

from typing import Protocol

from forebay.adapters import Handler
from forebay.adapters.handler_spec import HandlerSpec


class Engine(Protocol):
    """The place where a worker's handler runs. One engine may serve many workers.

    The Handler that it builds keeps the dispatcher's promises: `call` ends when the handler has really ended, cancelled
    or not; an exception of the handler is raised; ``forebay.context`` knows the task where the handler runs, and no run
    sees the context variables of another. Whatever has to be started and stopped is in the Handler's `start` and
    `stop`.
    """

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:
        """Return the handler of a worker that runs up to `slots` tasks at a time.

        Raises:
            InvalidHandler, InvalidSetting, NotImportable: it cannot run in this engine; the message says what can.
        """
