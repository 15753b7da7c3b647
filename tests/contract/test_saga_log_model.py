"""Every saga log against the one in memory: the same operations give the same answers."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.support.saga_logs import LOGS, LogBackend

from forebay.saga import MemorySagaLog, SagaLog, SagaState, open_saga_log
from forebay.saga.records import LogWrite, SagaHeader, StoredSaga

IDS = st.sampled_from(["a", "b", "c", "d"])
NAMES = st.sampled_from(["publish", "book"])
FENCES = st.sampled_from(["mine", "other"])
WRITERS = st.sampled_from(["the holder"] * 4 + ["mine", "other"])
STATES = st.sampled_from([SagaState.RUNNING] * 6 + list(SagaState))
AHEAD = st.sampled_from([0, 0, 0, 0, -1, 1])  # how far a number is from the one that is due
ENTRIES = st.lists(st.sampled_from([b"x", b"y"]), min_size=1, max_size=2)

_T = TypeVar("_T")


def plain(value: Any) -> Any:
    """Return an answer of a log with lists for all sequences."""
    if isinstance(value, StoredSaga):
        return msgspec.structs.replace(value, entries=list(value.entries))
    return [plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


class SagaLogMachine(RuleBasedStateMachine):
    """Does random operations on a saga log and on the model, which is the one in memory."""

    log_backend: ClassVar[LogBackend]

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.url = self.log_backend.fast_url(Path(self.directory.name))
        self.log = open_saga_log(self.url)
        self.run(self.log.open())
        self.model = MemorySagaLog()
        self.now = 100.0
        self.appends: list[Callable[[SagaLog], Awaitable[Any]]] = []

    def teardown(self) -> None:
        self.run(self.log.close())
        self.runner.close()
        self.directory.cleanup()

    def run(self, call: Awaitable[_T]) -> _T:
        async def waited() -> _T:
            return await call

        return self.runner.run(waited())

    def agree(self, *calls: Callable[[SagaLog], Awaitable[Any]]) -> list[Any]:
        """Make calls, at once to the log and one after the other to the model, and return their answers."""

        async def together() -> list[Any]:
            return await asyncio.gather(*(call(self.log) for call in calls))

        found = plain(self.run(together()))
        expected = [plain(self.run(call(self.model))) for call in calls]
        assert found == expected
        return expected

    def tick(self) -> float:
        self.now += 1.0  # no two rounds begin at the same time, so that their order is given
        return self.now

    def number(self, saga_id: str, ahead: int) -> int:
        stored = self.run(self.model.get(saga_id))
        return max(0, ahead + (0 if stored is None else len(stored.entries)))

    def beginning(self, saga_id: str, name: str, fence: str, lease: float) -> Callable[[SagaLog], Awaitable[Any]]:
        now = self.tick()
        header = SagaHeader(saga_id=saga_id, name=name, version=name, envelope=fence.encode(), submission=now)
        return lambda log: log.begin(header, b"restart", fence=fence, until=now + lease, now=now)

    def appending(
        self, saga_id: str, writer: str, entries: list[bytes], ahead: int, state: SagaState
    ) -> Callable[[SagaLog], Awaitable[Any]]:
        write, now = LogWrite(self.number(saga_id, ahead), entries, state, state.value), self.now
        stored = self.run(self.model.get(saga_id))
        fence = (stored and stored.holder) or "mine" if writer == "the holder" else writer
        self.appends.append(lambda log: log.append(saga_id, write, fence=fence, now=now))
        return self.appends[-1]

    @rule(saga_id=IDS, name=NAMES, fence=FENCES, lease=st.sampled_from([0.0, 3.0, 30.0]))
    def begin(self, saga_id: str, name: str, fence: str, lease: float) -> None:
        self.agree(self.beginning(saga_id, name, fence, lease))

    @rule(given=st.lists(st.tuples(IDS, NAMES, FENCES), min_size=2, max_size=6), lease=st.sampled_from([0.0, 3.0]))
    def begin_together(self, given: list[tuple[str, str, str]], lease: float) -> None:
        chosen = {saga_id: (saga_id, name, fence) for saga_id, name, fence in given}
        self.agree(*(self.beginning(*each, lease) for each in chosen.values()))

    @initialize(names=st.lists(NAMES, min_size=2, max_size=4))
    def begin_some(self, names: list[str]) -> None:
        self.agree(*(self.beginning(saga_id, name, "mine", 10.0) for saga_id, name in zip("abcd", names, strict=False)))

    @rule(saga_id=IDS, writer=WRITERS, entries=ENTRIES, ahead=AHEAD, state=STATES)
    def append(self, saga_id: str, writer: str, entries: list[bytes], ahead: int, state: SagaState) -> None:
        self.tick()
        self.agree(self.appending(saga_id, writer, entries, ahead, state))

    @precondition(lambda self: self.appends)
    @rule(data=st.data())
    def append_once_more(self, data: st.DataObject) -> None:
        self.agree(data.draw(st.sampled_from(self.appends[-3:])))

    @rule(given=st.lists(st.tuples(IDS, WRITERS, ENTRIES, AHEAD, STATES), min_size=2, max_size=8))
    def append_together(self, given: list[tuple[str, str, list[bytes], int, SagaState]]) -> None:
        self.tick()
        self.agree(*(self.appending(*each) for each in given))

    @rule(
        names=st.lists(NAMES, max_size=2),
        limit=st.integers(0, 3),
        fence=FENCES,
        lease=st.sampled_from([0.0, 3.0, 30.0]),
    )
    def claim(self, names: list[str], limit: int, fence: str, lease: float) -> None:
        now = self.tick()
        self.agree(lambda log: log.claim(names, limit=limit, fence=fence, until=now + lease, now=now))

    @rule(holders=st.dictionaries(IDS, FENCES), lease=st.sampled_from([0.0, 3.0, 30.0]))
    def renew(self, holders: dict[str, str], lease: float) -> None:
        until = self.tick() + lease
        self.agree(lambda log: log.renew(holders, until=until))

    @rule(saga_id=IDS, fence=FENCES)
    def release(self, saga_id: str, fence: str) -> None:
        self.agree(lambda log: log.release(saga_id, fence=fence))

    @rule(saga_id=IDS, entries=ENTRIES, ahead=AHEAD, state=STATES)
    def amend(self, saga_id: str, entries: list[bytes], ahead: int, state: SagaState) -> None:
        write, now = LogWrite(self.number(saga_id, ahead), entries, state, "said so"), self.tick()
        self.agree(lambda log: log.amend(saga_id, write, now=now))

    @rule(ago=st.sampled_from([0.0, 2.0, 5.0]))
    def forget(self, ago: float) -> None:
        before = self.tick() - ago
        self.agree(lambda log: log.forget(before=before, limit=10))

    @rule(wait=st.sampled_from([5.0, 50.0]))
    def wait(self, wait: float) -> None:
        self.now += wait

    @rule(states=st.sets(st.sampled_from(SagaState)), limit=st.integers(0, 4))
    def list_in_pages(self, states: set[SagaState], limit: int) -> None:
        (page,) = self.agree(lambda log: log.list(states=list(states), limit=limit))
        if page:
            after = page[-1].created_at, page[-1].saga_id
            self.agree(lambda log: log.list(states=list(states), limit=limit, after=after))

    @rule()
    def open_again(self) -> None:
        if self.log_backend.durable:
            self.run(self.log.close())
            self.log = open_saga_log(self.url)
            self.run(self.log.open())

    @invariant()
    def all_sagas_agree(self) -> None:
        (every,) = self.agree(lambda log: log.list(states=list(SagaState), limit=10))
        gets = [lambda log, saga_id=each.saga_id: log.get(saga_id) for each in every]
        for stored, listed in zip(self.agree(*gets), every, strict=True):
            assert stored.header == listed


@pytest.mark.parametrize("backend", [backend for backend in LOGS if backend.durable], ids=str)
def test_random_operations_give_the_answers_of_the_log_in_memory(backend: LogBackend) -> None:
    class Machine(SagaLogMachine):
        log_backend = backend

    examples = max(5, settings().max_examples // 3)
    run_state_machine_as_test(Machine, settings=settings(max_examples=examples, stateful_step_count=40))
