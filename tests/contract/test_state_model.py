"""Shared state against a dict: the same operations give the same answers, also while its entries move."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine, Sequence
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tests.support.kept_shard import KeptShard

from forebay.errors import Conflict
from forebay.simulation.loop import Simulation
from forebay.state import Namespace, Rebalanced, Shard, ShardedState

SPACES = st.sampled_from(["", "agent", "a/b"])
KEYS = st.sampled_from([f"{letter}{number}" for letter in "ab" for number in range(5)])
VALUES = st.one_of(st.none(), st.integers(0, 9), st.text(max_size=3))
DEPENDS = st.sampled_from(["any", "absent", "current", "stale"])

_T = TypeVar("_T")


class BrokenOff(Exception):
    """A rebalance was ended by its progress callback."""


class StateMachine(RuleBasedStateMachine):
    """Operations on two connections, as two processes would have, with shards that come and go."""

    ttls: Sequence[float | None]

    def __init__(self) -> None:
        super().__init__()
        self.shards = self.make_shards()
        self.placed: Sequence[str | Shard] = self.shards[:2]
        self.former: Sequence[str | Shard] | None = None
        self.model: dict[tuple[str, str], tuple[Any, int, float]] = {}  # value, version, when it expires
        self.versions: dict[tuple[str, str], int] = {}  # the largest of each key
        self.states = [self.connect(), self.connect()]

    def make_shards(self) -> list[str | Shard]:
        raise NotImplementedError

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        raise NotImplementedError

    @property
    def now(self) -> float:
        raise NotImplementedError

    def connect(self) -> ShardedState:
        return self.run(ShardedState.connect(*self.placed, moving_from=self.former))

    def reconnect(self, number: int) -> None:
        self.run(self.states[number].close())
        self.states[number] = self.connect()

    def teardown(self) -> None:
        for state in self.states:
            self.run(state.close())

    def space(self, name: str, number: int) -> Namespace:
        state = self.states[number]
        return state.namespace(name) if name else state

    def found(self, place: tuple[str, str]) -> tuple[Any, int] | None:
        value, version, expires = self.model.get(place, (None, 0, 0.0))
        return (value, version) if expires > self.now else None

    def wrote(self, place: tuple[str, str], value: Any, version: int, ttl: float | None) -> None:
        assert version > self.versions.get(place, 0)
        self.versions[place] = version
        self.model[place] = (value, version, inf if ttl is None else self.now + ttl)

    def expected(self, place: tuple[str, str], depends: str) -> int | None:
        found = self.found(place)
        stale = max(1, self.versions.get(place, 0) - 1)
        return {"any": None, "absent": 0, "current": 0 if found is None else found[1], "stale": stale}[depends]

    @rule(name=SPACES, key=KEYS, value=VALUES, depends=DEPENDS, number=st.integers(0, 1), ttl=st.sampled_from(range(3)))
    def put(  # noqa: PLR0913, PLR0917 - what a write is made of
        self, name: str, key: str, value: Any, depends: str, number: int, ttl: int
    ) -> None:
        place, seconds = (name, key), self.ttls[ttl]
        expected, found = self.expected(place, depends), self.found(place)
        put = self.space(name, number).put(key, value, ttl=seconds, if_version=expected)
        if expected is not None and expected != (0 if found is None else found[1]):
            self.refused(put, found)
        else:
            self.wrote(place, value, self.run(put), seconds)

    @rule(name=SPACES, key=KEYS, depends=DEPENDS, number=st.integers(0, 1))
    def delete(self, name: str, key: str, depends: str, number: int) -> None:
        place = (name, key)
        expected, found = self.expected(place, depends), self.found(place)
        delete = self.space(name, number).delete(key, if_version=expected)
        if expected is not None and expected != (0 if found is None else found[1]):
            self.refused(delete, found)
        else:
            assert self.run(delete) == (found is not None)
            self.model.pop(place, None)

    def refused(self, write: Coroutine[Any, Any, Any], found: tuple[Any, int] | None) -> None:
        try:
            self.run(write)
        except Conflict as refused:
            conflict = refused
        else:
            raise AssertionError("it was written")
        assert conflict.found == (0 if found is None else found[1])

    @rule(name=SPACES, key=KEYS, number=st.integers(0, 1))
    def update(self, name: str, key: str, number: int) -> None:
        place, found = (name, key), self.found((name, key))
        updated = self.run(self.space(name, number).update(key, lambda value: [value]))
        assert updated.value == [None if found is None else found[0]]
        self.wrote(place, updated.value, updated.version, None)

    @rule(name=SPACES, key=KEYS, number=st.integers(0, 1))
    def get(self, name: str, key: str, number: int) -> None:
        assert self.run(self.space(name, number).get(key)) == self.found((name, key))

    @rule(name=SPACES, prefix=st.sampled_from(["", "a", "b1"]), number=st.integers(0, 1), reverse=st.booleans())
    def scan(self, name: str, prefix: str, number: int, reverse: bool) -> None:  # noqa: FBT001
        async def scan() -> list[tuple[str, Any, int]]:
            return [entry async for entry in self.space(name, number).scan(prefix, reverse=reverse)]

        places = [place for place in self.model if place[0] == name and place[1].startswith(prefix)]
        found = {place[1]: entry for place in places if (entry := self.found(place)) is not None}
        assert self.run(scan()) == [(key, *found[key]) for key in sorted(found, reverse=reverse)]

    @rule(number=st.integers(0, 1))
    def restart(self, number: int) -> None:
        self.reconnect(number)

    @precondition(lambda self: self.former is None)
    @rule(chosen=st.sets(st.integers(0, 3), min_size=1))
    def begin_move(self, chosen: set[int]) -> None:
        self.former, self.placed = self.placed, [self.shards[index] for index in sorted(chosen)]
        for number in range(2):
            self.reconnect(number)

    @precondition(lambda self: self.former is not None)
    @rule(number=st.integers(0, 1))
    def rebalance_a_page(self, number: int) -> None:
        def break_off(_: Rebalanced) -> None:
            raise BrokenOff

        try:
            self.run(self.states[number].rebalance(break_off))
        except BrokenOff:
            return

    @precondition(lambda self: self.former is not None)
    @rule(number=st.integers(0, 1))
    def finish_move(self, number: int) -> None:
        self.run(self.states[number].rebalance())
        self.former = None
        for each in range(2):
            self.reconnect(each)

    @invariant()
    def all_keys_agree(self) -> None:
        for name in ("", "agent"):
            self.scan(name=name, prefix="", number=0, reverse=False)


class MemoryMachine(StateMachine):
    """Shards in memory, in virtual time."""

    ttls = (None, 5.0, 700.0)

    def __init__(self) -> None:
        self.simulation = Simulation().__enter__()
        super().__init__()

    def make_shards(self) -> list[str | Shard]:
        return [KeptShard(f"memory://{letter}") for letter in "abcd"]

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self.simulation.run(call)

    @property
    def now(self) -> float:
        return self.simulation.now

    @rule(seconds=st.sampled_from([1.0, 4.0, 10.0, 650.0]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    def teardown(self) -> None:
        super().teardown()
        self.simulation.__exit__(None, None, None)


class SqliteMachine(StateMachine):
    """Shards in SQLite files. Nothing expires during a test."""

    ttls = (None, 3_600.0, 7_200.0)
    now = 0.0

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        super().__init__()

    def make_shards(self) -> list[str | Shard]:
        return [f"sqlite:///{Path(self.directory.name) / letter}.db?fsync=no" for letter in "abcd"]

    def run(self, call: Coroutine[Any, Any, _T]) -> _T:
        return self.runner.run(call)

    def teardown(self) -> None:
        super().teardown()
        self.runner.close()
        self.directory.cleanup()


def check(machine: type[RuleBasedStateMachine], share: float) -> None:
    examples = max(1, round(settings().max_examples * share))
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=40))


def test_random_operations_give_the_answers_of_a_dict_in_memory() -> None:
    check(MemoryMachine, 1.0)


def test_random_operations_give_the_answers_of_a_dict_in_sqlite_files() -> None:
    check(SqliteMachine, 0.1)
