"""The contract of saga logs, on every backend."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.saga_logs import DURABLE_LOGS, LOGS, LogBackend

from forebay.errors import StoreUnavailable
from forebay.saga import SagaLog, SagaState, open_saga_log
from forebay.saga.records import MAX_LEASE, REPEATABLE, UNFINISHED, LogWrite, SagaHeader, StoredSaga
from forebay.supervisor import settings

RUNNING, COMPENSATING, PARKED = SagaState.RUNNING, SagaState.COMPENSATING, SagaState.PARKED
DONE, COMPENSATED, RESOLVED = SagaState.DONE, SagaState.COMPENSATED, SagaState.RESOLVED
FINISHED = [state for state in SagaState if state not in UNFINISHED]
FORGOTTEN = [DONE, COMPENSATED, RESOLVED]

HOSTILE = [
    *("\0", "a\0b", "a\0c", "a", "a ", " a", "A", "'; DROP TABLE saga; --", '"', "''", "\\", "%", "_", "*", "?", "a:b"),
    *("{a}", "}a{", "a}b", "[1]", "a/b", "a#1", "../a", "\r\n", "$-1\r\n", "é", "e\u0301", "𝄞", "\u202e", "\uffff"),
    *("-1", "0", "1", "1.0", "nil", "None", "x" * 10_000, "x" * 9_999, "é" * 5_000),
]


class LogUser:
    """Uses a saga log as process `fence` would, at a time that the test says."""

    def __init__(self, log: SagaLog, fence: str = "mine") -> None:
        self.log = log
        self.fence = fence

    async def begin(self, saga_id: str = "a", *, now: float = 100.0, lease: float = 10.0, **fields: Any) -> StoredSaga:
        """Begin a saga under a lease of so many seconds."""
        return await self.log.begin(
            header(saga_id, **fields), b"restarted", fence=self.fence, until=now + lease, now=now
        )

    async def claim(
        self, *names: str, limit: int = 100, now: float = 100.0, lease: float = 10.0
    ) -> Sequence[StoredSaga]:
        """Claim sagas; of the name "publish" if none is given."""
        given = names or ("publish",)
        return await self.log.claim(given, limit=limit, fence=self.fence, until=now + lease, now=now)

    async def append(
        self,
        saga_id: str = "a",
        *entries: bytes,
        number: int = 0,
        state: SagaState = RUNNING,
        why: str = "",
        now: float = 101.0,
    ) -> bool:
        """Append entries; one entry if none is given."""
        write = LogWrite(number, entries or (b"entry",), state, why)
        return await self.log.append(saga_id, write, fence=self.fence, now=now)

    async def end(self, state: SagaState, saga_id: str = "a", *, now: float = 101.0, **fields: Any) -> None:
        """Begin a saga, and write one entry with which it is in this state."""
        stored = await self.begin(saga_id, now=now - 1.0, **fields)
        assert stored.holder == self.fence
        assert await self.append(saga_id, b"last", number=len(stored.entries), state=state, now=now)


def header(saga_id: str, **fields: Any) -> SagaHeader:
    given = {"name": "publish", "version": "1", "envelope": b"envelope", "submission": 1.5, **fields}
    return SagaHeader(saga_id=saga_id, **given)


def ids(sagas: Sequence[StoredSaga] | Sequence[SagaHeader]) -> list[str]:
    return [each.saga_id if isinstance(each, SagaHeader) else each.header.saga_id for each in sagas]


def as_list(stored: StoredSaga | None) -> StoredSaga | None:
    """Return a saga whose entries are a list, whatever sequence they were."""
    return None if stored is None else msgspec.structs.replace(stored, entries=list(stored.entries))


async def entries(log: SagaLog, saga_id: str = "a") -> list[bytes]:
    stored = await log.get(saga_id)
    assert stored is not None
    return list(stored.entries)


async def holder(log: SagaLog, saga_id: str = "a") -> tuple[str, float]:
    stored = await log.get(saga_id)
    assert stored is not None
    return stored.holder, stored.until


OpenLog = Callable[[], Awaitable[SagaLog]]


@pytest.fixture(params=LOGS, ids=str)
def backend(request: pytest.FixtureRequest) -> LogBackend:
    chosen: LogBackend = request.param
    return chosen


@pytest.fixture
def url(backend: LogBackend, tmp_path: Path) -> str:
    return backend.fast_url(tmp_path)


@pytest.fixture
async def open_log(backend: LogBackend, url: str) -> AsyncIterator[OpenLog]:
    """Return a function that opens the one log of this test, as another process would if it is durable."""
    opened: list[SagaLog] = []

    async def open_one() -> SagaLog:
        if not opened or backend.durable:
            opened.append(open_saga_log(url))
            await opened[-1].open()
        return opened[-1]

    yield open_one
    for log in opened:
        await log.close()


@pytest.fixture
async def log(open_log: OpenLog) -> SagaLog:
    return await open_log()


@pytest.fixture
def mine(log: SagaLog) -> LogUser:
    return LogUser(log)


@pytest.fixture
async def other(open_log: OpenLog) -> LogUser:
    return LogUser(await open_log(), "other")


# --- begin -----------------------------------------------------------------------------------------------------------


async def test_a_new_saga_begins_with_its_header_and_no_entry(mine: LogUser) -> None:
    stored = await mine.begin(version="7", envelope=b"\0\xff" * 1_000, submission=12.25)
    expected = header(
        "a", version="7", envelope=b"\0\xff" * 1_000, submission=12.25, created_at=100.0, updated_at=100.0
    )
    assert as_list(stored) == StoredSaga(header=expected, entries=[], holder="mine", until=110.0)
    assert as_list(await mine.log.get("a")) == as_list(stored)


async def test_a_saga_under_a_lease_is_only_returned(mine: LogUser, other: LogUser) -> None:
    await mine.begin()
    await mine.append()
    before = await mine.log.get("a")
    seen = await other.begin(now=109.9, envelope=b"another", version="2")
    assert as_list(seen) == as_list(before) == as_list(await mine.log.get("a"))
    assert seen.holder == "mine"


async def test_a_repeated_begin_is_still_the_holders(mine: LogUser) -> None:
    first = await mine.begin()
    assert as_list(await mine.begin()) == as_list(first)


@pytest.mark.parametrize("state", UNFINISHED)
async def test_a_saga_whose_lease_has_expired_is_taken(state: SagaState, mine: LogUser, other: LogUser) -> None:
    await mine.begin()
    await mine.append(state=state, why="undo")
    taken = await other.begin(now=110.0, envelope=b"another", name="other", submission=2.0)
    found = header("a", state=state, why="undo", created_at=100.0, updated_at=101.0, claims=1)
    assert as_list(taken) == StoredSaga(header=found, entries=[b"entry"], holder="other", until=120.0)
    assert as_list(await other.log.get("a")) == as_list(taken)
    assert (await mine.begin(now=120.0)).header.claims == 2


@pytest.mark.parametrize("state", REPEATABLE)
async def test_a_saga_without_effects_begins_again(state: SagaState, mine: LogUser, other: LogUser) -> None:
    await mine.end(state, why="why", envelope=b"long" * 1_000)
    again: dict[str, Any] = {"name": "other", "version": "2", "envelope": b"new", "submission": 2.5}
    stored = await other.begin(now=200.0, **again)
    expected = header("a", **again, created_at=200.0, updated_at=200.0)
    assert as_list(stored) == StoredSaga(header=expected, entries=[b"last", b"restarted"], holder="other", until=210.0)
    assert as_list(await mine.log.get("a")) == as_list(stored)
    assert await other.append(number=2)
    assert ids(await mine.claim("publish", "other", now=210.0)) == ["a"]


@pytest.mark.parametrize("state", [DONE, PARKED])
async def test_a_saga_that_is_done_or_parked_is_only_returned(state: SagaState, mine: LogUser, other: LogUser) -> None:
    await mine.end(state, now=101.0)
    before = await mine.log.get("a")
    seen = await other.begin(now=1_000.0)
    assert as_list(seen) == as_list(before) == as_list(await mine.log.get("a"))
    assert (seen.header.state, seen.holder, seen.until) == (state, "", 0.0)


async def test_of_a_hundred_that_begin_a_saga_one_holds_it(mine: LogUser, other: LogUser) -> None:
    users = [LogUser((mine, other)[number % 2].log, f"fence {number}") for number in range(100)]
    begun = await asyncio.gather(*(user.begin() for user in users))
    (winner,) = {stored.holder for stored in begun}
    assert [user.fence for user, stored in zip(users, begun, strict=True) if stored.holder == user.fence] == [winner]
    assert {stored.header.claims for stored in begun} == {0}


async def test_of_a_hundred_that_take_a_saga_one_holds_it(mine: LogUser, other: LogUser) -> None:
    await mine.begin()
    users = [LogUser((mine, other)[number % 2].log, f"fence {number}") for number in range(100)]
    begun = await asyncio.gather(*(user.begin(now=110.0) for user in users))
    assert {(stored.holder, stored.header.claims) for stored in begun} == {(begun[0].holder, 1)}


async def test_of_a_hundred_that_begin_a_saga_again_one_does(mine: LogUser, other: LogUser) -> None:
    await mine.end(COMPENSATED)
    users = [LogUser((mine, other)[number % 2].log, f"fence {number}") for number in range(100)]
    begun = await asyncio.gather(*(user.begin(now=110.0) for user in users))
    assert {stored.holder for stored in begun} == {begun[0].holder}
    assert await entries(mine.log) == [b"last", b"restarted"]


async def test_sagas_that_begin_together_are_told_apart(mine: LogUser, other: LogUser) -> None:
    await other.begin("leased")
    await other.begin("expired", lease=0.0)
    await mine.end(COMPENSATED, "compensated", now=100.0)
    await mine.end(DONE, "done", now=100.0)
    names = ["new", "leased", "expired", "compensated", "done", "newer"]
    begun = await asyncio.gather(*(mine.begin(name) for name in names))
    assert ids(begun) == names
    assert [stored.holder for stored in begun] == ["mine", "other", "mine", "mine", "", "mine"]


# --- claim -----------------------------------------------------------------------------------------------------------


async def test_unfinished_sagas_are_claimed_once_their_lease_has_expired(mine: LogUser, other: LogUser) -> None:
    for number, state in enumerate(SagaState):
        await mine.begin(state.value, now=100.0 - number)
        await mine.append(state.value, state=state, why="why")
    await mine.begin("leased", now=105.0)
    assert ids(await other.claim(now=108.9)) == []
    claimed = await other.claim(now=110.0, lease=5.0)
    assert ids(claimed) == ["compensating", "running"]  # the oldest first
    assert [(each.holder, each.until, each.header.claims) for each in claimed] == [("other", 115.0, 1)] * 2
    assert [list(each.entries) for each in claimed] == [[b"entry"]] * 2
    assert [as_list(each) for each in claimed] == [as_list(await mine.log.get(name)) for name in ids(claimed)]
    assert ids(await mine.claim(now=114.9)) == []
    assert ids(await mine.claim(now=115.0)) == ["compensating", "running", "leased"]


async def test_a_claim_takes_the_oldest_up_to_its_limit(mine: LogUser, other: LogUser) -> None:
    for saga_id, now in (("c", 50.0), ("b", 51.0), ("d", 52.0), ("a", 51.0)):
        await mine.begin(saga_id, now=now, lease=100.0 - now)
    assert ids(await other.claim(limit=0)) == []
    assert ids(await other.claim(limit=2)) == ["c", "a"]
    assert ids(await other.claim(limit=1)) == ["b"]
    assert ids(await other.claim(limit=9)) == ["d"]


async def test_a_claim_takes_only_the_names_it_is_given(mine: LogUser, other: LogUser) -> None:
    for number, name in enumerate(["publish", "book", "o'clock", "", "é"]):
        await mine.begin(name, now=number, lease=0.0, name=name)
    assert ids(await other.log.claim([], limit=9, fence="other", until=1.0, now=0.0)) == []
    assert ids(await other.claim("unknown", "boo", "book_", "%")) == []
    assert ids(await other.claim("o'clock", "book", "unknown")) == ["book", "o'clock"]
    assert ids(await other.claim("é", "", "publish", "publish")) == ["publish", "", "é"]


async def test_claims_are_counted_until_an_entry_is_written(mine: LogUser) -> None:
    await mine.begin(lease=0.0)
    for count in (1, 2, 3):
        (claimed,) = await mine.claim(lease=0.0)
        assert claimed.header.claims == count
    assert await mine.append()
    assert ids(await mine.log.list(states=[RUNNING], limit=1)) == ["a"]
    (claimed,) = await mine.claim()
    assert claimed.header.claims == 1


async def test_processes_that_claim_at_once_get_different_sagas(mine: LogUser, other: LogUser) -> None:
    await asyncio.gather(*(mine.begin(f"{number:03}", lease=0.0) for number in range(100)))
    users = [LogUser((mine, other)[number % 2].log, f"fence {number}") for number in range(20)]
    claimed = await asyncio.gather(*(user.claim(limit=5) for user in users))
    assert sorted(saga_id for sagas in claimed for saga_id in ids(sagas)) == [f"{number:03}" for number in range(100)]
    assert [len(sagas) for sagas in claimed] == [5] * 20
    for user, sagas in zip(users, claimed, strict=True):
        assert {each.holder for each in sagas} == {user.fence}


# --- append ----------------------------------------------------------------------------------------------------------


async def test_entries_stand_in_the_order_in_which_they_were_written(mine: LogUser, other: LogUser) -> None:
    await mine.begin()
    assert await mine.append("a", b"0")
    assert await mine.append("a", b"1", b"2", b"", number=1, state=COMPENSATING, why="undo", now=102.0)
    assert await mine.append("a", b"4", number=4, state=COMPENSATING, why="undo it", now=103.0)
    stored = await other.log.get("a")
    expected = header("a", state=COMPENSATING, why="undo it", created_at=100.0, updated_at=103.0)
    found = [b"0", b"1", b"2", b"", b"4"]
    assert as_list(stored) == StoredSaga(header=expected, entries=found, holder="mine", until=110.0)


async def test_an_entry_of_another_process_is_rejected(mine: LogUser, other: LogUser) -> None:
    await mine.begin()
    before = await mine.log.get("a")
    assert not await other.append("a", b"other", state=DONE)
    assert not await mine.append("unknown")
    assert as_list(await mine.log.get("a")) == as_list(before)
    assert await mine.log.get("unknown") is None


async def test_a_process_may_write_after_its_lease_until_another_has_taken_the_saga(
    mine: LogUser, other: LogUser
) -> None:
    await mine.begin()
    assert await mine.append("a", b"0", now=500.0)
    await other.begin(now=501.0)
    assert not await mine.append("a", b"1", number=1, now=502.0)
    assert await other.append("a", b"one", number=1, now=503.0)
    assert await entries(mine.log) == [b"0", b"one"]


@pytest.mark.parametrize("number", [0, 1, 3, 100])
async def test_an_entry_that_does_not_follow_the_last_one_is_rejected(number: int, mine: LogUser) -> None:
    await mine.begin()
    await mine.append("a", b"0", b"1")
    before = await mine.log.get("a")
    assert not await mine.append("a", b"another", number=number, state=DONE, why="why", now=105.0)
    assert as_list(await mine.log.get("a")) == as_list(before)


async def test_a_repeated_append_writes_nothing_and_succeeds(mine: LogUser) -> None:
    await mine.begin()
    for _ in range(3):
        assert await mine.append("a", b"0", b"1")
    assert await mine.append("a", b"2", number=2, state=COMPENSATING, now=102.0)
    before = await mine.log.get("a")
    assert await mine.append("a", b"0", b"1", now=105.0)
    assert await mine.append("a", b"1", number=1, now=105.0)
    assert await mine.append("a", b"2", number=2, state=COMPENSATING, now=105.0)
    assert not await mine.append("a", b"1", b"two", number=1, now=105.0)
    assert not await mine.append("a", b"2", b"3", number=2, now=105.0)  # half of it stands
    assert as_list(await mine.log.get("a")) == as_list(before)


async def test_a_repeated_append_succeeds_although_another_process_has_the_saga_now(
    mine: LogUser, other: LogUser
) -> None:
    await mine.begin()
    await mine.append("a", b"0")
    await other.begin(now=110.0)
    assert await mine.append("a", b"0", now=111.0)
    assert await other.append("a", b"1", number=1, state=DONE, now=112.0)
    before = await mine.log.get("a")
    assert await mine.append("a", b"0", now=113.0)
    assert not await mine.append("a", b"0", b"one", now=113.0)
    assert as_list(await mine.log.get("a")) == as_list(before)


@pytest.mark.parametrize("state", FINISHED)
async def test_the_last_entry_ends_the_lease(state: SagaState, mine: LogUser, other: LogUser) -> None:
    await mine.begin()
    assert await mine.append("a", b"0", state=state, why="why", now=102.0)
    stored = await other.log.get("a")
    expected = header("a", state=state, why="why", created_at=100.0, updated_at=102.0)
    assert as_list(stored) == StoredSaga(header=expected, entries=[b"0"], holder="", until=0.0)
    assert await mine.append("a", b"0", state=state, why="why", now=103.0)  # repeated
    assert not await mine.append("a", b"1", number=1)
    assert await mine.log.renew({"a": "mine"}, until=200.0) == ["a"]
    assert ids(await other.claim(now=1_000.0)) == []
    assert as_list(await other.log.get("a")) == as_list(stored)


async def test_appends_that_are_not_waited_for_are_written_in_order(mine: LogUser) -> None:
    await asyncio.gather(mine.begin("a"), mine.begin("b"))
    appends = [
        mine.append(saga_id, f"{saga_id}{number}".encode(), number=number)
        for number in range(50)
        for saga_id in ("a", "b")
    ]
    assert all(await asyncio.gather(*appends))
    assert await entries(mine.log, "a") == [f"a{number}".encode() for number in range(50)]
    assert await entries(mine.log, "b") == [f"b{number}".encode() for number in range(50)]


async def test_appends_together_are_each_accepted_or_rejected(mine: LogUser, other: LogUser) -> None:
    await asyncio.gather(*(mine.begin(name) for name in "abcdef"))
    await mine.append("e", b"0")
    written = await asyncio.gather(
        mine.append("a", b"0"),
        other.append("b", b"0"),
        mine.append("c", b"0"),
        mine.append("c", b"0"),  # the same
        mine.append("c", b"another"),
        mine.append("c", b"1", number=1, state=DONE),
        mine.append("c", b"2", number=2),
        mine.append("d", b"1", number=1),
        mine.append("d", b"0"),
        mine.append("unknown"),
        mine.append("e", b"0"),
        mine.append("f", b"0", state=PARKED, why="why"),
    )
    assert written == [True, False, True, True, False, True, False, False, True, False, True, True]
    found = {name: await entries(mine.log, name) for name in "abcdef"}
    assert found == {"a": [b"0"], "b": [], "c": [b"0", b"1"], "d": [b"0"], "e": [b"0"], "f": [b"0"]}


async def test_a_thousand_sagas_append_at_once(mine: LogUser) -> None:
    names = [f"saga {number}" for number in range(1_000)]
    begun = await asyncio.gather(*(mine.begin(name) for name in names))
    assert {each.holder for each in begun} == {"mine"}
    for number in range(3):
        done = DONE if number == 2 else RUNNING
        written = await asyncio.gather(
            *(mine.append(name, f"{name} {number}".encode(), number=number, state=done) for name in names)
        )
        assert all(written)
    assert ids(await mine.log.list(states=[DONE], limit=2_000)) == sorted(names)
    for name in names[::100]:
        assert await entries(mine.log, name) == [f"{name} {number}".encode() for number in range(3)]


# --- leases ----------------------------------------------------------------------------------------------------------


async def test_a_renewed_lease_lasts_longer(mine: LogUser, other: LogUser) -> None:
    await asyncio.gather(mine.begin("a"), mine.begin("b"), mine.begin("c"))
    assert await mine.log.renew({"a": "mine", "b": "mine"}, until=120.0) == []
    assert await mine.log.renew({}, until=900.0) == []
    assert ids(await other.claim(now=119.9)) == ["c"]
    assert (await other.begin("a", now=119.9)).holder == "mine"
    assert ids(await other.claim(now=120.0)) == ["a", "b"]


async def test_a_lease_that_was_given_before_the_clock_was_set_back_is_shortened(
    mine: LogUser, other: LogUser, backend: LogBackend
) -> None:
    if "redis" in backend.name:
        pytest.skip("its leases end by the clock of its server")
    await mine.begin("dead", now=3_700.0, lease=30.0)
    await mine.begin("lives", now=3_700.0, lease=30.0)
    await mine.begin("longest", now=100.0, lease=MAX_LEASE)
    assert await other.claim(now=100.0) == []
    assert await mine.log.renew({"lives": "mine"}, until=1_000.0) == []
    assert ids(await other.claim(now=100.0 + MAX_LEASE)) == ["longest", "dead"]


async def test_leases_of_sagas_of_other_names_are_not_shortened(mine: LogUser, other: LogUser) -> None:
    await mine.begin("a", now=3_700.0, name="another")
    await other.claim(now=100.0)
    assert await holder(mine.log) == ("mine", 3_710.0)


def test_a_lease_of_a_saga_is_at_most_as_long_as_that_of_a_supervisor() -> None:
    assert MAX_LEASE == settings.MAX_LEASE


async def test_lost_leases_are_returned_and_the_others_renewed(mine: LogUser, other: LogUser) -> None:
    await asyncio.gather(*(mine.begin(name) for name in ("a", "b", "c", "d")))
    await other.begin("b", now=110.0)
    await mine.append("c", state=PARKED)
    await mine.log.release("d", fence="mine")
    holders = {"unknown": "mine", "a": "mine", "b": "mine", "c": "mine", "d": "mine"}
    assert sorted(await mine.log.renew(holders, until=130.0)) == ["b", "c", "d", "unknown"]
    assert await holder(mine.log, "a") == ("mine", 130.0)
    assert await holder(mine.log, "b") == ("other", 120.0)
    assert await holder(mine.log, "c") == await holder(mine.log, "d") == ("", 0.0)


async def test_a_renewal_counts_no_claim_and_touches_no_entry(mine: LogUser) -> None:
    await mine.begin(lease=0.0)
    await mine.claim()
    before = await mine.log.get("a")
    assert before is not None
    await mine.log.renew({"a": "mine"}, until=500.0)
    assert as_list(await mine.log.get("a")) == as_list(msgspec.structs.replace(before, until=500.0))


async def test_a_released_saga_may_be_taken_at_once(mine: LogUser, other: LogUser) -> None:
    await mine.begin(lease=0.0)
    await mine.claim()
    await mine.log.release("a", fence="mine")
    released = await mine.log.get("a")
    expected = header("a", created_at=100.0, updated_at=100.0)
    assert as_list(released) == StoredSaga(header=expected, entries=[], holder="", until=0.0)
    assert not await mine.append()
    (claimed,) = await other.claim()
    assert claimed.header.claims == 1
    assert await other.append()


async def test_a_lease_is_not_released_by_another_process(mine: LogUser, other: LogUser) -> None:
    await mine.begin()
    before = await mine.log.get("a")
    await other.log.release("a", fence="other")
    await other.log.release("unknown", fence="other")
    assert as_list(await mine.log.get("a")) == as_list(before)


# --- amend -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", SagaState)
async def test_a_person_writes_to_a_parked_saga(state: SagaState, mine: LogUser, other: LogUser) -> None:
    await mine.end(PARKED, why="why")
    assert await other.log.amend("a", LogWrite(1, [b"note", b"go on"], state, "said so"), now=200.0)
    expected = header("a", state=state, why="said so", created_at=100.0, updated_at=200.0)
    stored = await mine.log.get("a")
    assert as_list(stored) == StoredSaga(header=expected, entries=[b"last", b"note", b"go on"], holder="", until=0.0)
    assert ids(await mine.claim(now=200.0)) == (["a"] if state in UNFINISHED else [])


async def test_a_person_cannot_write_to_a_saga_under_a_lease(mine: LogUser, other: LogUser) -> None:
    await mine.begin()
    before = await mine.log.get("a")
    assert not await other.log.amend("a", LogWrite(0, [b"note"], RESOLVED), now=109.9)
    assert as_list(await mine.log.get("a")) == as_list(before)
    assert await other.log.amend("a", LogWrite(0, [b"note"], RESOLVED), now=110.0)
    assert not await mine.append("a", b"late", number=1)
    assert await entries(mine.log) == [b"note"]


@pytest.mark.parametrize("number", [0, 2])
async def test_a_person_who_has_not_seen_the_last_entry_writes_nothing(number: int, mine: LogUser) -> None:
    await mine.end(PARKED, why="why")
    before = await mine.log.get("a")
    assert not await mine.log.amend("a", LogWrite(number, [b"note"], RESOLVED), now=200.0)
    assert not await mine.log.amend("unknown", LogWrite(0, [b"note"], RESOLVED), now=200.0)
    assert as_list(await mine.log.get("a")) == as_list(before)
    assert await mine.log.get("unknown") is None


async def test_of_two_people_who_write_at_once_one_does(mine: LogUser, other: LogUser) -> None:
    await mine.end(PARKED)
    writes = [LogWrite(1, [b"retry"], RUNNING), LogWrite(1, [b"resolve"], RESOLVED)] * 10
    written = await asyncio.gather(
        *((mine, other)[number % 2].log.amend("a", write, now=200.0) for number, write in enumerate(writes))
    )
    assert sum(written) == 1
    assert await entries(mine.log) == [b"last", *writes[written.index(True)].entries]


# --- list and forget -------------------------------------------------------------------------------------------------


async def test_sagas_are_listed_by_state_the_oldest_first(mine: LogUser) -> None:
    for number, state in enumerate(SagaState):
        for copy in range(2):
            saga_id = f"{state.value} {copy}"
            await mine.begin(saga_id, now=200.0 - number - copy * 100.0, envelope=saga_id.encode())
            await mine.append(saga_id, state=state, why="why", now=300.0)
    for state in SagaState:
        found = await mine.log.list(states=[state], limit=10)
        assert ids(found) == [f"{state.value} 1", f"{state.value} 0"]
        assert [each.state for each in found] == [state] * 2
    every = await mine.log.list(states=list(SagaState), limit=100)
    ages = [each.created_at for each in every]
    assert ages == sorted(ages)
    assert len(every) == 12
    for each in every:
        stored = await mine.log.get(each.saga_id)
        assert stored is not None
        assert each == stored.header
    assert await mine.log.list(states=[], limit=100) == []
    assert await mine.log.list(states=[DONE, DONE], limit=0) == []


async def test_pages_of_a_list_have_each_saga_once(mine: LogUser) -> None:
    await asyncio.gather(
        *(mine.begin(f"{number}", now=float(number % 3)) for number in range(25)),
        *(mine.end(PARKED, f"parked {number}", now=2.0) for number in range(5)),
    )
    pages: list[SagaHeader] = []
    states = [PARKED, RUNNING]
    after: tuple[float, str] | None = None
    while page := await mine.log.list(states=states, limit=4, after=after):
        assert len(page) <= 4
        pages += page
        after = page[-1].created_at, page[-1].saga_id
    ages = [(each.created_at, each.saga_id) for each in pages]
    assert ages == sorted(set(ages))
    assert len(ages) == 30
    assert list(await mine.log.list(states=states, limit=100)) == pages
    assert ids(await mine.log.list(states=[PARKED], limit=100, after=(1.0, "parked 2"))) == ["parked 3", "parked 4"]


@pytest.mark.parametrize("state", SagaState)
async def test_only_what_ended_long_ago_is_forgotten(state: SagaState, mine: LogUser) -> None:
    await mine.begin()
    await mine.append(state=state, why="why", now=101.0)
    assert await mine.log.forget(before=101.0, limit=10) == 0
    expected = 1 if state in FORGOTTEN else 0
    assert await mine.log.forget(before=101.5, limit=0) == 0
    assert await mine.log.forget(before=101.5, limit=10) == expected
    assert (await mine.log.get("a") is None) == bool(expected)
    assert ids(await mine.log.list(states=[state], limit=10)) == ([] if expected else ["a"])
    assert await mine.log.forget(before=1_000.0, limit=10) == 0


async def test_no_more_are_forgotten_than_the_limit(mine: LogUser) -> None:
    await asyncio.gather(*(mine.end(FORGOTTEN[number % 3], f"{number}", now=float(number)) for number in range(10)))
    counts = [await mine.log.forget(before=9.0, limit=4) for _ in range(4)]
    assert counts == [4, 4, 1, 0]
    assert ids(await mine.log.list(states=FORGOTTEN, limit=10)) == ["9"]


async def test_a_forgotten_saga_begins_as_a_new_one(mine: LogUser, other: LogUser) -> None:
    await mine.end(DONE, envelope=b"old")
    await mine.end(DONE, "kept")
    assert await mine.log.forget(before=1_000.0, limit=10) == 2
    assert not await mine.append("a", b"last", state=DONE)
    stored = await other.begin(now=2_000.0, envelope=b"new")
    expected = header("a", envelope=b"new", created_at=2_000.0, updated_at=2_000.0)
    assert as_list(stored) == StoredSaga(header=expected, entries=[], holder="other", until=2_010.0)
    assert await other.append("a", b"first")
    assert as_list(await mine.log.get("a")) == as_list(await other.log.get("a"))
    assert await entries(mine.log) == [b"first"]


async def test_a_saga_that_began_again_is_not_forgotten_for_its_first_round(mine: LogUser) -> None:
    await mine.end(COMPENSATED)
    await mine.begin(now=200.0)
    assert await mine.log.forget(before=1_000.0, limit=10) == 0
    assert await entries(mine.log) == [b"last", b"restarted"]
    assert ids(await mine.log.list(states=[COMPENSATED], limit=10)) == []


# --- what may stand in a log -----------------------------------------------------------------------------------------


async def test_hostile_names_are_told_apart(mine: LogUser, other: LogUser) -> None:
    assert len(set(HOSTILE)) == len(HOSTILE)
    begun = await asyncio.gather(*(mine.begin(text, name=text, version=text, now=50.0) for text in HOSTILE))
    assert ids(begun) == HOSTILE
    assert all(await asyncio.gather(*(mine.append(text, text.encode(), why=text) for text in HOSTILE)))
    for text in HOSTILE:
        stored = await other.log.get(text)
        expected = header(text, name=text, version=text, why=text, created_at=50.0, updated_at=101.0)
        assert as_list(stored) == StoredSaga(header=expected, entries=[text.encode()], holder="mine", until=60.0)
    assert await mine.log.renew(dict.fromkeys(HOSTILE, "mine"), until=70.0) == []
    assert ids(await mine.log.list(states=[RUNNING], limit=100)) == sorted(HOSTILE)
    assert ids(await mine.log.list(states=[RUNNING], limit=1, after=(50.0, sorted(HOSTILE)[5]))) == [sorted(HOSTILE)[6]]
    for text in HOSTILE[::2]:
        assert ids(await other.claim(text, now=70.0)) == [text]
    for text in HOSTILE[1::2]:
        await mine.log.release(text, fence="mine")
        assert await other.log.amend(text, LogWrite(1, [b"note"], DONE), now=71.0)
    assert await mine.log.forget(before=1_000.0, limit=100) == len(HOSTILE[1::2])
    assert ids(await mine.log.list(states=list(SagaState), limit=100)) == sorted(HOSTILE[::2])


async def test_a_hostile_fence_is_one_holder_among_others(mine: LogUser) -> None:
    for number, fence in enumerate(HOSTILE):
        user = LogUser(mine.log, fence)
        stored = await user.begin(now=100.0 + 10.0 * number)
        assert stored.holder == fence
        assert await user.append("a", b"entry", number=number)
        assert not await LogUser(mine.log, fence + " ").append("a", b"another", number=number + 1)


async def test_an_id_that_is_no_text_is_not_found(mine: LogUser) -> None:
    assert await mine.log.get("\ud800") is None
    assert not await mine.log.amend("\ud800", LogWrite(0, [b"note"], RESOLVED), now=200.0)


async def test_large_entries_come_back_as_they_were(mine: LogUser, other: LogUser) -> None:
    large = [bytes([number]) * (1 << 20) for number in range(4)]
    await mine.begin(envelope=large[0])
    assert await mine.append("a", *large)
    assert await mine.append("a", b"", b"\0", b"small", number=4, state=COMPENSATING)
    assert await mine.append("a", *large)  # repeated
    (claimed,) = await other.claim(now=110.0)
    assert list(claimed.entries) == [*large, b"", b"\0", b"small"]
    assert claimed.header.envelope == large[0]


async def test_a_saga_may_have_many_entries(mine: LogUser) -> None:
    await mine.begin()
    many = [f"{number}".encode() for number in range(3_000)]
    assert await mine.append("a", *many)
    assert await mine.append("a", b"last", number=3_000)
    assert await entries(mine.log) == [*many, b"last"]


async def test_times_are_kept_to_the_last_digit(mine: LogUser) -> None:
    now = 1_795_000_000.123456789
    await mine.begin(now=now, lease=1 / 3, submission=now)
    stored = await mine.log.get("a")
    assert stored is not None
    assert (stored.header.created_at, stored.header.submission, stored.until) == (now, now, now + 1 / 3)
    assert (await LogUser(mine.log, "early").begin(now=stored.until - 1e-6)).holder == "mine"
    assert (await LogUser(mine.log, "late").begin(now=stored.until)).holder == "late"


# --- cancelled callers, instances and processes ----------------------------------------------------------------------


async def cancel_under_way(call: Awaitable[object]) -> None:
    """Begin a call, and cancel its caller while the log is at it."""
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0)  # it has asked the log
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_a_cancelled_caller_took_is_released(backend: LogBackend, mine: LogUser, other: LogUser) -> None:
    backend.needs_durability()  # the one in memory never waits, so that nobody can be cancelled there
    await LogUser(mine.log, "earlier").begin("old", lease=0.0)
    await cancel_under_way(mine.begin("new"))
    await cancel_under_way(mine.claim())
    await mine.log.get("new")  # answered after what was asked before, or together with it
    async with asyncio.timeout(5):
        for saga_id in ("new", "old"):
            while (stored := await other.log.get(saga_id)) is not None and stored.holder == "mine":  # nobody tells
                pass
    assert {(each.holder, each.header.claims) for each in await other.claim()} <= {("other", 1)}


async def test_what_a_cancelled_caller_appended_is_there_at_most_once(backend: LogBackend, mine: LogUser) -> None:
    backend.needs_durability()
    await mine.begin()
    for number in range(5):
        await cancel_under_way(mine.append("a", f"{number}".encode(), number=number))
        assert await mine.append("a", f"{number}".encode(), number=number)
    assert await entries(mine.log) == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_cancelled_caller_disturbs_no_other(backend: LogBackend, mine: LogUser) -> None:
    backend.needs_durability()
    names = [f"{number}" for number in range(20)]
    await asyncio.gather(*(mine.begin(name) for name in names))
    appends = [asyncio.ensure_future(mine.append(name)) for name in names]
    await asyncio.sleep(0)
    for append in appends[::2]:
        append.cancel()
    ended = await asyncio.gather(*appends, return_exceptions=True)
    assert [each is True for each in ended] == [False, True] * 10
    assert all(await asyncio.gather(*(mine.append(name) for name in names)))
    assert [await entries(mine.log, name) for name in names] == [[b"entry"]] * 20


async def test_a_log_is_opened_again_with_what_it_had(backend: LogBackend, url: str) -> None:
    backend.needs_durability()
    log = open_saga_log(url)
    assert log.durable
    await log.open()
    await log.open()
    await LogUser(log).begin()
    await LogUser(log).append()
    before = await log.get("a")
    await log.close()
    await log.close()
    again = open_saga_log(url)
    for each in (log, again):
        await each.open()
        assert as_list(await each.get("a")) == as_list(before)
        await each.close()


@dataclass(frozen=True)
class Call:
    """A method of a log, called."""

    name: str
    call: Callable[[LogUser], Awaitable[object]]

    def __str__(self) -> str:
        return self.name


CALLS = [
    Call("begin", lambda user: user.begin()),
    Call("claim", lambda user: user.claim()),
    Call("append", lambda user: user.append()),
    Call("renew", lambda user: user.log.renew({"a": "mine"}, until=200.0)),
    Call("release", lambda user: user.log.release("a", fence="mine")),
    Call("amend", lambda user: user.log.amend("a", LogWrite(0, [b"note"], RESOLVED), now=200.0)),
    Call("get", lambda user: user.log.get("a")),
    Call("list", lambda user: user.log.list(states=[RUNNING], limit=1)),
    Call("forget", lambda user: user.log.forget(before=1.0, limit=1)),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
async def test_a_log_that_is_not_open_says_so(call: Call, backend: LogBackend, url: str) -> None:
    backend.needs_durability()
    user = LogUser(open_saga_log(url))
    with pytest.raises(StoreUnavailable, match="not open"):
        await call.call(user)
    await user.log.open()
    await user.begin()
    await user.log.close()
    with pytest.raises(StoreUnavailable, match="not open"):
        await call.call(user)


async def test_what_is_pending_is_written_before_a_log_closes(backend: LogBackend, url: str) -> None:
    backend.needs_durability()
    log = open_saga_log(url)
    await log.open()
    await LogUser(log).begin()
    append = asyncio.ensure_future(LogUser(log).append())
    await asyncio.sleep(0)
    await log.close()
    assert await append
    await log.open()
    assert await entries(log) == [b"entry"]
    await log.close()


ANOTHER_PROCESS = """
import asyncio, json, sys
from forebay.saga import SagaState, open_saga_log
from forebay.saga.records import LogWrite

async def main():
    log = open_saga_log(sys.argv[1])
    await log.open()
    (saga,) = await log.claim(["publish"], limit=10, fence="child", until=900.0, now=500.0)
    write = LogWrite(len(saga.entries), [b"by the child"], SagaState.COMPENSATING, "a child")
    written = await log.append(saga.header.saga_id, write, fence="child", now=501.0)
    print(json.dumps([saga.header.saga_id, [entry.decode() for entry in saga.entries], written]))
    await log.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("backend", DURABLE_LOGS, ids=str, indirect=True)
async def test_another_process_takes_a_saga_over(mine: LogUser, url: str) -> None:
    await mine.begin("é\0")
    await mine.append("é\0", b"by the parent")
    await mine.begin("leased", now=450.0, lease=100.0)
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", ANOTHER_PROCESS, url, stdout=subprocess.PIPE)
    output, _ = await child.communicate()
    assert json.loads(output) == ["é\0", ["by the parent"], True]
    assert not await mine.append("é\0", b"late", number=2, now=502.0)
    stored = await mine.log.get("é\0")
    assert stored is not None
    assert list(stored.entries) == [b"by the parent", b"by the child"]
    assert (stored.header.state, stored.header.why, stored.holder) == (COMPENSATING, "a child", "child")
