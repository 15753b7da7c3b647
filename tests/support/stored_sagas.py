"""Sagas as a log has them after some entries, for tests of what people do with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forebay import clock
from forebay.overflow import encode_result
from forebay.saga import SagaLog
from forebay.saga.records import (
    UNFINISHED,
    CompensatingEntry,
    DoneEntry,
    Entry,
    FailedEntry,
    LogWrite,
    ParkedEntry,
    RestartedEntry,
    SagaHeader,
    SagaHistory,
    SagaState,
    StartedEntry,
    StoredSaga,
    UndoFailedEntry,
    encode_entry,
)

AT = 1_800_000_000.0  # epoch seconds of every entry
OUTPUT = "the rivers of Saxony"


def output(value: Any) -> bytes:
    """Return an output as a log has it."""
    return encode_result(value, task_id="t", bound=1_000_000)


def begun(step: str, *, compensable: bool = False, pivot: bool = False) -> StartedEntry:
    """Return the start of a step."""
    return StartedEntry(at=AT, step=step, function=f"call_{step}", compensable=compensable, pivot=pivot)


def done(step: str, value: Any = OUTPUT) -> DoneEntry:
    """Return the end of a step."""
    return DoneEntry(at=AT, step=step, output=output(value))


def failed(step: str, *, clean: bool = False) -> FailedEntry:
    """Return the failure of a step."""
    return FailedEntry(at=AT, step=step, error_type="ConnectionError", error="ConnectionError: no answer", clean=clean)


GOES_BACK = CompensatingEntry(at=AT, error_type="ConnectionError", error="ConnectionError: no answer")
RESEARCH = (begun("research", compensable=True), done("research"))
UNKNOWN = (*RESEARCH, begun("act"), ParkedEntry(at=AT, why="the outcome of step 'act' is unknown", step="act"))
UNDO_FAILS = (
    *RESEARCH,
    begun("act"),
    failed("act", clean=True),
    GOES_BACK,
    UndoFailedEntry(at=AT, step="research", error="TimeoutError: too slow"),
    UndoFailedEntry(at=AT, step="research", error="PermissionError: denied"),
    ParkedEntry(at=AT, why="the compensation of step 'research' fails: PermissionError: denied", step="research"),
)


async def store_saga(
    log: SagaLog, saga_id: str, entries: Sequence[Entry] = (), *, name: str = "publish", age: float = 100.0
) -> StoredSaga:
    """Write a saga that began `age` seconds ago and has these entries, and that nobody drives; return it."""
    header = SagaHeader(saga_id=saga_id, name=name, version="2", envelope=b"payload", submission=1.0)
    restart, now = encode_entry(RestartedEntry(at=AT)), clock.wall_time() - age
    await log.begin(header, restart, fence="test", until=now + 10.0, now=now)
    history = SagaHistory(saga_id, entries)
    if entries:
        why = history.why or history.error
        write = LogWrite(0, [encode_entry(entry) for entry in entries], history.state, why)
        assert await log.append(saga_id, write, fence="test", now=now)
    if history.state in UNFINISHED:
        await log.release(saga_id, fence="test")
    stored = await log.get(saga_id)
    assert stored is not None
    return stored


async def state_of(log: SagaLog, saga_id: str) -> SagaState:
    """Return the state of a saga in a log."""
    stored = await log.get(saga_id)
    assert stored is not None
    return stored.header.state
