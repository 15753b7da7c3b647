"""What people do with sagas, on a log in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from tests.support.stored_sagas import (
    AT,
    GOES_BACK,
    OUTPUT,
    RESEARCH,
    UNDO_FAILS,
    UNKNOWN,
    begun,
    done,
    failed,
    output,
    state_of,
    store_saga,
)

from forebay import clock
from forebay.errors import InvalidResolution, InvalidSetting, SagaConflict, SagaNotParked, UnknownSaga
from forebay.overflow import decode_result
from forebay.saga import MemorySagaLog, SagaAdmin, SagaState
from forebay.saga.records import (
    CompensatedEntry,
    DoneEntry,
    Entry,
    FailedEntry,
    FinishedEntry,
    LogDamaged,
    LogWrite,
    ParkedEntry,
    ResolvedEntry,
    RestartedEntry,
    RetriedEntry,
    SagaHistory,
    StepState,
    UndoneEntry,
    decode_entries,
    encode_entry,
)

PARKED = ParkedEntry(at=AT, why="a person has to look", step="act")
ENDED = {
    SagaState.DONE: (*RESEARCH, FinishedEntry(at=AT, result=output("published"))),
    SagaState.COMPENSATED: (GOES_BACK, CompensatedEntry(at=AT)),
    SagaState.RESOLVED: (*UNKNOWN, ResolvedEntry(at=AT, note="by hand")),
}
IN_STATE: dict[SagaState, Sequence[Entry]] = {
    SagaState.RUNNING: RESEARCH,
    SagaState.COMPENSATING: (*RESEARCH, GOES_BACK),
    SagaState.PARKED: UNKNOWN,
    **ENDED,
}


@pytest.fixture
def log() -> MemorySagaLog:
    return MemorySagaLog()


@pytest.fixture
def admin(log: MemorySagaLog) -> SagaAdmin:
    return SagaAdmin(log)


async def entries_of(log: MemorySagaLog, saga_id: str = "s") -> Sequence[Entry]:
    stored = await log.get(saga_id)
    assert stored is not None
    return decode_entries(saga_id, stored.entries)


# --- list, show ------------------------------------------------------------------------------------------------------


async def test_parked_and_unfinished_sagas_are_listed_by_default_oldest_first(
    log: MemorySagaLog, admin: SagaAdmin
) -> None:
    for number, (state, entries) in enumerate(IN_STATE.items()):
        await store_saga(log, state.value, entries, age=100.0 - number)
    assert [each.saga_id for each in await admin.list()] == ["running", "compensating", "parked"]
    listed = await admin.list(SagaState.DONE, SagaState.RESOLVED)
    assert [each.state for each in listed] == [SagaState.DONE, SagaState.RESOLVED]


async def test_sagas_are_listed_page_by_page(log: MemorySagaLog, admin: SagaAdmin) -> None:
    for number in range(5):
        await store_saga(log, f"{number}", UNKNOWN)
    first = await admin.list(limit=3)
    assert [each.saga_id for each in (*first, *await admin.list(limit=3, after=first[-1]))] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("limit", [0, 1001, "3", None])
async def test_a_limit_out_of_bounds_is_rejected(admin: SagaAdmin, limit: Any) -> None:
    with pytest.raises(InvalidSetting, match="from 1 to 1"):
        await admin.list(limit=limit)


async def test_a_state_that_is_no_state_is_rejected(admin: SagaAdmin) -> None:
    with pytest.raises(InvalidSetting, match=r"a SagaState, such as SagaState\.PARKED"):
        await admin.list("parked")  # type: ignore[arg-type]


async def test_a_saga_is_shown_with_its_steps_and_its_history(log: MemorySagaLog, admin: SagaAdmin) -> None:
    await store_saga(log, "s", UNDO_FAILS)
    view = await admin.show("s")
    assert (view.name, view.version, view.state, view.round) == ("publish", "2", SagaState.PARKED, 1)
    assert (view.parked_step, view.error, view.lease_until) == ("research", "ConnectionError: no answer", None)
    research, act = view.steps
    assert (research.state, research.key, research.function) == (StepState.DONE, "s/1/research", "call_research")
    assert (research.undo_failures, research.undo_error, research.compensable) == (2, "PermissionError: denied", True)
    assert (act.state, act.error) == (StepState.NOT_DONE, "ConnectionError: no answer")
    assert [line.text for line in view.history] == [
        "step 'research' began: call_research (compensable)",
        "step 'research' is done",
        "step 'act' began: call_act",
        "step 'act' failed without an effect: ConnectionError: no answer",
        "compensates: ConnectionError: no answer",
        "the compensation of step 'research' failed: TimeoutError: too slow",
        "the compensation of step 'research' failed: PermissionError: denied",
        "parked for step 'research': the compensation of step 'research' fails: PermissionError: denied",
    ]


async def test_outputs_are_shown_on_demand_alone(log: MemorySagaLog, admin: SagaAdmin) -> None:
    await store_saga(log, "s", ENDED[SagaState.DONE])
    assert (view := await admin.show("s")).outputs is None
    assert OUTPUT not in json.dumps(view.as_dict())
    shown = (await admin.show("s", outputs=True)).as_dict()["outputs"]
    assert [(each["step"], each["value"]) for each in shown] == [("research", OUTPUT), (None, "published")]


async def test_an_output_that_json_does_not_have_is_shown_as_plain_data(log: MemorySagaLog, admin: SagaAdmin) -> None:
    await store_saga(log, "s", [begun("a"), done("a", {"pair": (1, b"\x00")})])
    (shown,) = (await admin.show("s", outputs=True)).outputs or ()
    assert shown.value == {"pair": [1, "AA=="]}


async def test_an_output_that_cannot_be_read_says_why(log: MemorySagaLog, admin: SagaAdmin) -> None:
    await store_saga(log, "s", [begun("a"), DoneEntry(at=AT, step="a", output=b"\xc1")])
    (shown,) = (await admin.show("s", outputs=True)).outputs or ()
    assert (shown.value, shown.problem != "") == (None, True)


async def test_a_later_round_shows_its_own_steps_and_the_whole_history(log: MemorySagaLog, admin: SagaAdmin) -> None:
    await store_saga(log, "s", [*RESEARCH, GOES_BACK, CompensatedEntry(at=AT), RestartedEntry(at=AT), begun("act")])
    view = await admin.show("s")
    assert (view.round, [step.key for step in view.steps], len(view.history)) == (2, ["s/2/act"], 6)


async def test_a_damaged_log_is_shown_as_far_as_it_can_be_read(log: MemorySagaLog, admin: SagaAdmin) -> None:
    stored = await store_saga(log, "s", UNKNOWN)
    log._sagas["s"] = type(stored)(header=stored.header, entries=[*stored.entries[:2], b"\xc1", *stored.entries[2:]])
    view = await admin.show("s")
    assert (view.damage, len(view.history), view.state) == ("DecodeError", 2, SagaState.PARKED)


@pytest.mark.parametrize("call", ["show", "retry", "resolve"])
async def test_an_unknown_id_is_an_error_that_says_what_to_do(admin: SagaAdmin, call: str) -> None:
    with pytest.raises(UnknownSaga, match=r"No saga 's' is in this log.*forebay saga ls URL --all"):
        await getattr(admin, call)("s")


@pytest.mark.parametrize("saga_id", [None, 7, "", "\ud800"])
async def test_an_id_that_cannot_be_one_is_rejected(admin: SagaAdmin, saga_id: Any) -> None:
    with pytest.raises(InvalidSetting, match="saga_id"):
        await admin.show(saga_id)


# --- retry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "state", "why"),
    [
        (UNKNOWN, SagaState.RUNNING, ""),
        (UNDO_FAILS, SagaState.COMPENSATING, "ConnectionError: no answer"),
        ([PARKED], SagaState.RUNNING, ""),
    ],
)
async def test_a_parked_saga_goes_on_in_the_direction_of_its_history(
    log: MemorySagaLog, entries: Sequence[Entry], state: SagaState, why: str
) -> None:
    await store_saga(log, "s", entries)
    released: list[str] = []
    admin = SagaAdmin(log, on_released=lambda: released.append("s"))
    assert await admin.retry("s") is state
    assert isinstance((await entries_of(log))[-1], RetriedEntry)
    now = clock.wall_time()
    (taken,) = await log.claim(["publish"], limit=1, fence="other", until=now + 10.0, now=now)
    assert (taken.header.state, taken.header.why) == (state, why)
    assert SagaHistory("s", decode_entries("s", taken.entries)).state is state
    assert released == ["s"]


@pytest.mark.parametrize("call", ["retry", "resolve"])
@pytest.mark.parametrize(
    ("state", "advice"),
    [
        (SagaState.RUNNING, "a supervisor that has registered it drives it on"),
        (SagaState.COMPENSATING, "undoes its steps by itself"),
        (SagaState.DONE, "there is nothing to do"),
        (SagaState.COMPENSATED, "submit its task again"),
        (SagaState.RESOLVED, "a person has closed it"),
    ],
)
async def test_only_a_parked_saga_is_changed(log: MemorySagaLog, call: str, state: SagaState, advice: str) -> None:
    before = await store_saga(log, "s", IN_STATE[state])
    released: list[str] = []
    admin = SagaAdmin(log, on_released=lambda: released.append("s"))
    with pytest.raises(SagaNotParked, match=f"Saga 's' is {state.value}, and only a parked saga.*{advice}"):
        await getattr(admin, call)("s")
    assert (await log.get("s"), released) == (before, [])


# --- resolve ---------------------------------------------------------------------------------------------------------

STATES: dict[StepState, Sequence[Entry]] = {
    StepState.STARTED: [begun("act", compensable=True)],
    StepState.FAILED: [begun("act", compensable=True), failed("act")],
    StepState.NOT_DONE: [begun("act", compensable=True), failed("act", clean=True)],
    StepState.DONE: [begun("act", compensable=True), done("act")],
    StepState.UNDONE: [begun("act", compensable=True), done("act"), GOES_BACK, UndoneEntry(at=AT, step="act")],
}
FORWARD = {
    "done": {StepState.STARTED, StepState.FAILED, StepState.NOT_DONE},
    "not-done": {StepState.STARTED, StepState.FAILED},
    "undone": {StepState.STARTED, StepState.FAILED},
}
BACK = FORWARD | {"undone": {StepState.STARTED, StepState.FAILED, StepState.DONE}}
AFTER = {"done": StepState.DONE, "not-done": StepState.NOT_DONE, "undone": StepState.UNDONE}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("outcome", AFTER)
@pytest.mark.parametrize("goes_back", [False, True])
async def test_what_can_be_said_of_a_step_depends_on_its_state(
    log: MemorySagaLog, admin: SagaAdmin, outcome: Any, state: StepState, *, goes_back: bool
) -> None:
    entries = [*STATES[state], *([GOES_BACK] if goes_back else []), PARKED]
    before = await store_saga(log, "s", entries)
    given = {"output": OUTPUT} if outcome == "done" else {}
    if state in (BACK if goes_back else FORWARD)[outcome]:
        now = await admin.resolve("s", "act", outcome=outcome, note="seen", **given)
        assert now is (SagaState.COMPENSATING if goes_back else SagaState.RUNNING)
        history = SagaHistory("s", written := await entries_of(log))
        assert (history.state, history.steps["act"].state) == (now, AFTER[outcome])
        assert [type(entry) for entry in written[len(entries) :]] == [
            {"done": DoneEntry, "not-done": FailedEntry, "undone": UndoneEntry}[outcome],
            RetriedEntry,
        ]
        assert (await admin.show("s")).history[-2].text == {
            "done": "step 'act' is done, says a person: seen",
            "not-done": "step 'act' failed without an effect: a person says that it was not done: seen",
            "undone": "step 'act' is undone, says a person: seen",
        }[outcome]
    else:
        with pytest.raises(InvalidResolution, match="Saga 's' cannot be resolved so: "):
            await admin.resolve("s", "act", outcome=outcome, **given)
        assert await log.get("s") == before


async def test_a_step_that_a_person_says_is_done_is_undone_with_its_output(
    log: MemorySagaLog, admin: SagaAdmin
) -> None:
    await store_saga(log, "s", [begun("act", compensable=True), GOES_BACK, PARKED])
    await admin.resolve("s", "act", output=None)
    (step,) = SagaHistory("s", await entries_of(log)).to_undo()
    assert step.output is not None
    assert decode_result(step.output) is None


@pytest.mark.parametrize("value", [None, {"a": [1, 2.5, "b", b"c", (True,)]}, ""])
async def test_an_output_is_plain_data(log: MemorySagaLog, admin: SagaAdmin, value: Any) -> None:
    await store_saga(log, "s", UNKNOWN)
    await admin.resolve("s", "act", output=value)
    step = SagaHistory("s", await entries_of(log)).steps["act"]
    assert step.output is not None
    assert decode_result(step.output) == value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"x": object()}, r"output\.x is not plain data: object"),
        (2**64, "int beyond 64 bits"),
        ("\ud800", "not valid Unicode"),
        ("secret" * 200_000, "1,200,000 bytes|the bound is 1,000,000"),
    ],
)
async def test_another_output_is_rejected_and_not_quoted(
    log: MemorySagaLog, admin: SagaAdmin, value: Any, why: str
) -> None:
    before = await store_saga(log, "s", UNKNOWN)
    with pytest.raises(InvalidResolution, match=why) as caught:
        await admin.resolve("s", "act", output=value)
    assert ("secret" in str(caught.value), await log.get("s")) == (False, before)


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    [
        ({"step": "act"}, InvalidResolution, "a step that is done has an output"),
        ({"step": "act", "outcome": "not-done", "output": None}, InvalidResolution, "a step that is not-done has no"),
        (
            {"step": "other", "output": 1},
            InvalidResolution,
            "Name one that it has begun: 'research', 'act'",
        ),
        ({"step": "act", "outcome": "maybe"}, InvalidSetting, '"done", "not-done" or "undone"'),
        ({"step": 3, "output": 1}, InvalidSetting, "a non-empty string"),
        ({"output": 1}, InvalidSetting, "an outcome is that of a step"),
        ({"outcome": "undone"}, InvalidSetting, "an outcome is that of a step"),
        ({"note": 3}, InvalidSetting, "note=3; it must be a string"),
    ],
)
async def test_what_cannot_be_said_is_explained(
    log: MemorySagaLog, admin: SagaAdmin, arguments: dict[str, Any], error: type[Exception], why: str
) -> None:
    before = await store_saga(log, "s", UNKNOWN)
    with pytest.raises(error, match=why):
        await admin.resolve("s", **arguments)
    assert await log.get("s") == before


async def test_without_a_step_the_saga_is_closed_as_it_is(log: MemorySagaLog) -> None:
    await store_saga(log, "s", UNKNOWN)
    released: list[str] = []
    admin = SagaAdmin(log, on_released=lambda: released.append("s"))
    assert await admin.resolve("s", note="paid by hand \ud800") is SagaState.RESOLVED
    assert await state_of(log, "s") is SagaState.RESOLVED
    view = await admin.show("s")
    assert view.history[-1].text == "closed by a person: paid by hand \\ud800"
    assert (view.why, view.parked_step, view.steps[1].state) == ("", None, StepState.STARTED)
    assert released == []


async def test_a_saga_whose_log_is_damaged_can_be_closed_and_nothing_else(log: MemorySagaLog, admin: SagaAdmin) -> None:
    stored = await store_saga(log, "s", UNKNOWN)
    log._sagas["s"] = type(stored)(header=stored.header, entries=[*stored.entries, b"\xc1"])
    with pytest.raises(LogDamaged):
        await admin.retry("s")
    with pytest.raises(LogDamaged):
        await admin.resolve("s", "act", outcome="not-done")
    assert await admin.resolve("s") is SagaState.RESOLVED


# --- races -----------------------------------------------------------------------------------------------------------


class ChangedBefore(MemorySagaLog):
    """A log in which something happens between reading a saga and amending it."""

    def __init__(self) -> None:
        super().__init__()
        self.change: Any = None

    async def amend(self, saga_id: str, write: LogWrite, *, now: float) -> bool:
        if self.change is not None:
            change, self.change = self.change, None
            await change()
        return await super().amend(saga_id, write, now=now)


async def test_of_two_people_one_decides_and_the_other_learns_what_was_decided() -> None:
    log = ChangedBefore()
    admin, other = SagaAdmin(log), SagaAdmin(log)
    await store_saga(log, "s", UNKNOWN)
    log.change = lambda: other.resolve("s", note="mine")
    with pytest.raises(SagaConflict, match=r"it is resolved now; last, closed by a person: mine\. Look at it again"):
        await admin.resolve("s", "act", output=1)
    assert await state_of(log, "s") is SagaState.RESOLVED


async def test_a_saga_that_a_process_has_taken_meanwhile_is_left_to_it() -> None:
    log = ChangedBefore()
    released: list[str] = []
    admin = SagaAdmin(log, on_released=lambda: released.append("s"))
    await store_saga(log, "s", UNKNOWN)

    async def take() -> None:
        await SagaAdmin(log).retry("s")
        now = clock.wall_time()
        await log.claim(["publish"], limit=1, fence="other", until=now + 10.0, now=now)

    log.change = take
    with pytest.raises(SagaConflict, match="it is running now; last, a person lets it go on"):
        await admin.retry("s")
    assert released == []
    stored = await log.get("s")
    assert stored is not None
    assert (stored.holder, (await admin.show("s")).lease_until) == ("other", stored.until)


async def test_a_saga_that_is_gone_meanwhile_is_said_to_be() -> None:
    log = ChangedBefore()
    await store_saga(log, "s", UNKNOWN)

    async def forget() -> None:
        await SagaAdmin(log).resolve("s")
        assert await log.forget(before=clock.wall_time() + 1.0, limit=1) == 1

    log.change = forget
    with pytest.raises(SagaConflict, match="it is gone from the log"):
        await SagaAdmin(log).retry("s")


async def test_of_many_who_retry_at_once_one_does(log: MemorySagaLog, admin: SagaAdmin) -> None:
    await store_saga(log, "s", UNKNOWN)
    results = await asyncio.gather(*(admin.retry("s") for _ in range(20)), return_exceptions=True)
    assert results.count(SagaState.RUNNING) == 1
    assert len(await entries_of(log)) == len(UNKNOWN) + 1


async def test_a_write_that_was_rejected_writes_nothing(log: MemorySagaLog) -> None:
    stored = await store_saga(log, "s", UNKNOWN)
    write = LogWrite(0, [encode_entry(RetriedEntry(at=AT))], SagaState.RUNNING)
    assert not await log.amend("s", write, now=clock.wall_time())
    assert await log.get("s") == stored
