"""The seam: an engine takes what was registered, and gives back a Handler that the dispatcher runs like any other."""

from __future__ import annotations

from typing import Protocol

from forebay.adapters import Handler
from forebay.adapters.handler_spec import HandlerSpec


class Engine(Protocol):
    """Where a worker's handler runs. One engine may serve many workers.

    What it gives back keeps the dispatcher's promises: `call` ends when the handler has really ended, cancelled or not;
    what the handler raises is raised; ``forebay.context`` knows the task where the handler runs, and nothing that one
    run sets there is seen by another. Whatever has to be started and ended hangs on the Handler's `start` and `stop`.
    """

    def build_handler(self, spec: HandlerSpec, *, slots: int) -> Handler:
        """Take a worker that runs up to `slots` tasks at a time.

        Raises:
            InvalidHandler, InvalidSetting, NotImportable: it cannot be run there; the message says what can.
        """
