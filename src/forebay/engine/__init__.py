"""Where a handler runs: in the event loop, in a thread, or in a process of our own."""

from __future__ import annotations

from typing import Any

from forebay.engine.base import Engine
from forebay.engine.loop_engine import AutoEngine, LoopEngine
from forebay.engine.process_engine import ProcessEngine
from forebay.engine.thread_engine import ThreadEngine
from forebay.engine.thread_executor import DaemonThreadExecutor

__all__ = ["DaemonThreadExecutor", "Engine", "LoopEngine", "ProcessEngine", "ThreadEngine", "resolve_engine"]

_BY_NAME: dict[str | None, type[Engine]] = {
    None: AutoEngine,
    "loop": LoopEngine,
    "thread": ThreadEngine,
    "process": ProcessEngine,
}


def resolve_engine(engine: Any) -> Engine | None:
    """The engine of that name; None: what yields in the loop, what blocks in a thread. An engine as it is.

    Returns:
        None if it is neither.
    """
    if engine is None or isinstance(engine, str):
        kind = _BY_NAME.get(engine)
        return None if kind is None else kind()
    known: Engine | None = (
        engine if callable(getattr(engine, "build_handler", None)) and not isinstance(engine, type) else None
    )
    return known
