"""Engines: they run handlers in the event loop, in threads, or in processes of the worker's own."""

from __future__ import annotations

from typing import Any

from forebay.engine.base import Engine
from forebay.engine.loop_engine import AutoEngine, LoopEngine
from forebay.engine.process_engine import ProcessEngine
from forebay.engine.thread_engine import ThreadEngine

__all__ = ["Engine", "LoopEngine", "ProcessEngine", "ThreadEngine", "resolve_engine"]

_BY_NAME: dict[str | None, type[Engine]] = {
    None: AutoEngine,
    "loop": LoopEngine,
    "thread": ThreadEngine,
    "process": ProcessEngine,
}


def resolve_engine(engine: Any) -> Engine | None:
    """Return the engine that a name stands for, or an engine as it is; None if it is neither.

    Args:
        engine: ``"loop"``, ``"thread"``, ``"process"``, an Engine, or None: a handler that yields runs in the loop, one
            that blocks in a thread.
    """
    if engine is None or isinstance(engine, str):
        kind = _BY_NAME.get(engine)
        return None if kind is None else kind()
    is_engine = callable(getattr(engine, "build_handler", None)) and not isinstance(engine, type)
    known: Engine | None = engine if is_engine else None
    return known
