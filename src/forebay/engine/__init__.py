"""Where a handler runs: in the event loop, in a thread, or in a process of our own."""

from __future__ import annotations

from typing import Any

from forebay.engine.in_loop import InLoop, WhereItFits
from forebay.engine.in_thread import InThread
from forebay.engine.processes import InProcess
from forebay.engine.seam import Engine
from forebay.engine.threads import Threads

__all__ = ["Engine", "InLoop", "InProcess", "InThread", "Threads", "engine_of"]

_BY_NAME: dict[str | None, type[Engine]] = {None: WhereItFits, "loop": InLoop, "thread": InThread, "process": InProcess}


def engine_of(engine: Any) -> Engine | None:
    """The engine of that name; None: what yields in the loop, what blocks in a thread. An engine as it is.

    Returns:
        None if it is neither.
    """
    if engine is None or isinstance(engine, str):
        kind = _BY_NAME.get(engine)
        return None if kind is None else kind()
    known: Engine | None = engine if callable(getattr(engine, "adopt", None)) and not isinstance(engine, type) else None
    return known
