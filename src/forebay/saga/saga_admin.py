"""The sagas of a log, for people, who find them, look into them, and decide about those that are parked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeAlias

from msgspec import UNSET

from forebay import clock
from forebay._text import error_text
from forebay._validate import check_choice, check_instance, check_name, check_whole, reject
from forebay.errors import (
    InvalidResolution,
    NotSerializable,
    PayloadTooLarge,
    SagaConflict,
    SagaNotParked,
    UnknownSaga,
)
from forebay.overflow import encode_result
from forebay.saga.log import SagaLog
from forebay.saga.records import (
    UNFINISHED,
    DoneEntry,
    Entry,
    FailedEntry,
    LogDamaged,
    LogWrite,
    ResolvedEntry,
    RetriedEntry,
    SagaHeader,
    SagaHistory,
    SagaState,
    StepRecord,
    StepState,
    StoredSaga,
    UndoneEntry,
    decode_entries,
    encode_entry,
)
from forebay.saga.saga_view import SagaView, describe, view_saga

StepOutcome: TypeAlias = Literal["done", "not-done", "undone"]

_OUTCOMES: Final = ("done", "not-done", "undone")
_OPEN: Final = (SagaState.PARKED, *UNFINISHED)
_MAX_PAGE: Final = 1000
_MAX_OUTPUT: Final = 1_000_000  # bytes, as a supervisor's max_payload_bytes by default
_RETRY: Final = "If nothing else is to be said about it, retry the saga"
_KNOWN: Final = {  # what cannot be said of a step in a state, and why
    ("done", StepState.DONE): "is done already, and the log has its output",
    ("done", StepState.UNDONE): "is undone already",
    ("not-done", StepState.DONE): "has returned, so it is done",
    ("not-done", StepState.NOT_DONE): "is not done, as the log has it already",
    ("not-done", StepState.UNDONE): "is undone already",
    ("undone", StepState.NOT_DONE): "had no effect that could be undone",
    ("undone", StepState.UNDONE): "is undone already",
}
_WHAT_NOW: Final = {
    SagaState.RUNNING: "a supervisor that has registered it drives it on by itself; if none runs, start one",
    SagaState.COMPENSATING: "a supervisor that has registered it undoes its steps by itself; if none runs, start one",
    SagaState.DONE: "all its steps have their effects, so there is nothing to do",
    SagaState.COMPENSATED: "none of its effects is left; to begin it again, submit its task again",
    SagaState.RESOLVED: "a person has closed it; to begin it again, submit its task again",
}


class SagaAdmin:
    """The sagas of a log, for people: which there are, what they have done, and what is to become of the parked ones.

    A parked saga goes on once it is retried, or once a step of it is resolved: any supervisor on the same log that has
    registered it takes it. Every method raises StoreUnavailable if the log cannot be used.
    """

    def __init__(self, log: SagaLog, *, on_released: Callable[[], None] | None = None) -> None:
        """Look into an open log.

        Args:
            log: of the sagas.
            on_released: called after a parked saga was allowed to go on.
        """
        self._log = log
        self._on_released = on_released

    async def list(self, *states: SagaState, limit: int = 100, after: SagaHeader | None = None) -> Sequence[SagaHeader]:
        """Return up to `limit` sagas in these states, the oldest first; by default those that are parked or unfinished.

        Args:
            states: which.
            limit: how many at most, up to 1000.
            after: the last saga of the page before.

        Raises:
            InvalidSetting: an argument is invalid.
        """
        check_whole("SagaAdmin.list", "limit", limit, maximum=_MAX_PAGE)
        for state in states:
            check_instance("SagaAdmin.list", "states", state, SagaState, example="SagaState.PARKED")
        last = None if after is None else (after.created_at, after.saga_id)
        return await self._log.list(states=states or _OPEN, limit=limit, after=last)

    async def show(self, saga_id: str, *, outputs: bool = False) -> SagaView:
        """Return what the log holds of a saga, and with `outputs` also what its steps and itself have returned.

        Raises:
            UnknownSaga: there is none of that id.
        """
        return view_saga(await self._read(saga_id), outputs=outputs)

    async def retry(self, saga_id: str) -> SagaState:
        """Let a parked saga go on, and return its new state: COMPENSATING if it was going back, else RUNNING.

        Raises:
            UnknownSaga: there is none of that id.
            SagaNotParked: it is not parked.
            SagaConflict: it was changed meanwhile.
            LogDamaged: its log cannot be read.
        """
        stored = await self._read_parked(saga_id)
        return await self._release(stored, _history(stored))

    async def resolve(
        self,
        saga_id: str,
        step: str | None = None,
        *,
        output: Any = UNSET,
        outcome: StepOutcome = "done",
        note: str = "",
    ) -> SagaState:
        """Say what has become of a step of a parked saga, and let the saga go on; without a step, close it as it is.

        Args:
            saga_id: of the saga.
            step: the step that was looked into, because its outcome is unknown, it has failed, or its compensation
                fails.
            output: of a step that is done: what it would have returned, as plain data. None is an output too.
            outcome: "done": the step has its effect. "not-done": it has none. "undone": what effect it had was undone.
                After either of the last two, a saga that goes forward sees the step fail; past its pivot, it calls the
                step again.
            note: why; it stays in the log.

        Returns:
            The new state of the saga; RESOLVED without a step.

        Raises:
            UnknownSaga: there is none of that id.
            SagaNotParked: it is not parked.
            InvalidResolution: this cannot be said of the step.
            SagaConflict: the saga was changed meanwhile.
            InvalidSetting: another argument is invalid.
            LogDamaged: its log cannot be read; it can be closed all the same.
        """
        check_choice("resolve", "outcome", outcome, _OUTCOMES)
        if not isinstance(note, str):
            reject("resolve", "note", note, "a string")
        note = error_text(note)
        if step is None:
            if output is not UNSET or outcome != "done":
                reject("resolve", "step", step, "the name of a step, because an outcome is that of a step")
            return await self._close(await self._read_parked(saga_id), note)
        check_name("resolve", "step", step)
        if outcome == "done" and output is UNSET:
            why, advice = "a step that is done has an output", "Give what it would have returned; None is an output too"
            raise InvalidResolution(saga_id=saga_id, why=why, advice=advice)
        if outcome != "done" and output is not UNSET:
            why, advice = f"a step that is {outcome} has no output", "Leave it out"
            raise InvalidResolution(saga_id=saga_id, why=why, advice=advice)
        encoded = b"" if output is UNSET else _encode(saga_id, output)
        stored = await self._read_parked(saga_id)
        history = _history(stored)
        _check(history, step, outcome)
        return await self._release(stored, history, _entry(step, outcome, encoded, note))

    async def _read(self, saga_id: str) -> StoredSaga:
        check_name("SagaAdmin", "saga_id", saga_id)
        stored = await self._log.get(saga_id)
        if stored is None:
            raise UnknownSaga(saga_id=saga_id)
        return stored

    async def _read_parked(self, saga_id: str) -> StoredSaga:
        stored = await self._read(saga_id)
        state = stored.header.state
        if state is not SagaState.PARKED:
            raise SagaNotParked(saga_id=saga_id, state=state.value, advice=_WHAT_NOW[state])
        return stored

    async def _close(self, stored: StoredSaga, note: str) -> SagaState:
        """Close a saga whatever its entries say: they may be damaged."""
        await self._write(stored, (ResolvedEntry(at=clock.wall_time(), note=note),), SagaState.RESOLVED, "")
        return SagaState.RESOLVED

    async def _release(self, stored: StoredSaga, history: SagaHistory, *entries: Entry) -> SagaState:
        """Write entries, and that the saga goes on after them."""
        entries = (*entries, RetriedEntry(at=clock.wall_time()))
        for entry in entries:
            history.add(entry)
        why = history.error or history.error_type  # empty if it goes forward
        await self._write(stored, entries, history.state, why)
        if self._on_released is not None:
            self._on_released()
        return history.state

    async def _write(self, stored: StoredSaga, entries: Sequence[Entry], state: SagaState, why: str) -> None:
        write = LogWrite(len(stored.entries), [encode_entry(entry) for entry in entries], state, why)
        saga_id = stored.header.saga_id
        if not await self._log.amend(saga_id, write, now=clock.wall_time()):
            change = _change(stored, await self._log.get(saga_id), now=clock.wall_time())
            raise SagaConflict(saga_id=saga_id, change=change)


def _history(stored: StoredSaga) -> SagaHistory:
    saga_id = stored.header.saga_id
    return SagaHistory(saga_id, decode_entries(saga_id, stored.entries))


def _encode(saga_id: str, output: Any) -> bytes:
    try:
        return encode_result(output, task_id=saga_id, bound=_MAX_OUTPUT)
    except NotSerializable as error:
        why = f"output{error.path.removeprefix('result')} is not plain data: {error.type}"
        advice = "Use None, booleans, numbers, strings, bytes, lists, tuples and dicts with string keys"
    except PayloadTooLarge as error:
        why = f"the output takes {error.size:,} bytes encoded, and the bound is {error.bound:,}"
        advice = "Store it elsewhere, and give a reference that the next steps understand; or close the saga"
    raise InvalidResolution(saga_id=saga_id, why=why, advice=advice) from None


def _check(history: SagaHistory, name: str, outcome: StepOutcome) -> None:
    """Check that a person can say `outcome` of a step.

    Raises:
        InvalidResolution: the log knows better, or the saga could not go on with it.
    """
    step = history.steps.get(name)
    if step is None:
        begun = ", ".join(map(repr, history.steps)) or "none"
        why, advice = f"it has not begun a step {name!r}", f"Name one that it has begun: {begun}"
    elif found := _objection(step, outcome, goes_back=history.goes_back):
        why, advice = found
    else:
        return
    raise InvalidResolution(saga_id=history.saga_id, why=why, advice=advice)


def _objection(step: StepRecord, outcome: StepOutcome, *, goes_back: bool) -> tuple[str, str] | None:
    """Return why `outcome` cannot be said of a step, and what to do instead; None if it can."""
    if known := _KNOWN.get((outcome, step.state)):
        returned = outcome == "not-done" and step.state is StepState.DONE
        advice = 'If its effect was undone, the outcome is "undone"' if returned and goes_back else _RETRY
        return f"step {step.name!r} {known}", advice
    if outcome == "undone" and step.state is StepState.DONE and not goes_back:
        why = f"the saga goes forward, and needs the effect of step {step.name!r}"
        return why, "Restore the effect and retry the saga, or close the saga: resolve it without a step"
    return None


def _entry(step: str, outcome: StepOutcome, output: bytes, note: str) -> Entry:
    at, reason = clock.wall_time(), f": {note}" if note else ""
    by = f"a person{reason}"
    if outcome == "done":
        return DoneEntry(at=at, step=step, output=output, by=by)
    if outcome == "undone":
        return UndoneEntry(at=at, step=step, by=by)
    return FailedEntry(
        at=at, step=step, error_type="NothingDone", error=f"a person says that it was not done{reason}", clean=True
    )


def _change(before: StoredSaga, after: StoredSaga | None, *, now: float) -> str:
    """Return what has happened to a saga that could not be changed."""
    if after is None:
        return "it is gone from the log"
    if len(after.entries) != len(before.entries):
        return f"it is {after.header.state.value} now; last, {_last(after)}"
    if after.until > now:
        return f"a process drives it, and it is {after.header.state.value} now"
    return "another one was changing it"


def _last(stored: StoredSaga) -> str:
    try:
        return describe(decode_entries(stored.header.saga_id, stored.entries[-1:])[0])
    except LogDamaged as error:
        return f"an entry that cannot be read ({error.why})"
