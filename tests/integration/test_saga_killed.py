"""A process that drives a saga is killed at each moment: its effects are all there, or none, and none twice.

The moments are those before and after each write to the log and each request that a step makes, so a process is killed
before each record is acknowledged, after it, and while the effect that lies between two of them is there or not.

`make kills` runs every case on every log. Without it, each kind of moment is tried on SQLite and on one Redis.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import pytest
from tests.support.effect_server import EffectServer
from tests.support.killed_sagas import Life, SagaProcesses, lives_file
from tests.support.saga_logs import DURABLE_LOGS, LogBackend

from forebay import clock
from forebay.overflow import decode_result
from forebay.saga import SagaState, open_saga_log
from forebay.saga.records import UNFINISHED, SagaHistory, StepState, decode_entries

MOST = 200  # moments of a life
ALL = "FOREBAY_ALL_KILLS" in os.environ  # set by `make kills`
CHAIN = ["research", "summarize", "try"]
BRANCHES = ["left 1", "right 1", "right 2", "right 3"]


class Case(NamedTuple):
    """A saga, what goes wrong in it, and how it has to end, whenever its process is killed.

    Attributes:
        saga: its name.
        how: what goes wrong.
        state: in which it ends.
        effects: the steps that have one then.
        sequential: whether its steps come one after the other.
    """

    saga: str
    how: str
    state: SagaState
    effects: list[str]
    sequential: bool = True

    def __str__(self) -> str:
        return f"{self.saga}: {self.how}"


CASES = [
    Case("chain", "nothing fails", SagaState.DONE, [*CHAIN, "act", "tell", "file"]),
    Case("chain", "undo stumbles", SagaState.COMPENSATED, []),
    Case("branches", "nothing fails", SagaState.DONE, [*BRANCHES, "act"], sequential=False),
    Case("branches", "left fails", SagaState.COMPENSATED, [], sequential=False),
    Case("chain", "step fails", SagaState.COMPENSATED, []),
    Case("chain", "function fails", SagaState.COMPENSATED, []),
    Case("chain", "pivot fails", SagaState.COMPENSATED, []),
    Case("chain", "pivot has no answer", SagaState.DONE, [*CHAIN, "act", "tell", "file"]),
]
QUICK_CASES = [CASES[0], CASES[1], CASES[3]]
QUICK_ON_REDIS = Case("unrepeatable", "step fails", SagaState.COMPENSATED, [])
UNREPEATABLE = [
    Case("unrepeatable", "nothing fails", SagaState.DONE, ["first", "second", "act", "tell"]),
    QUICK_ON_REDIS,
]


class LogReader:
    """A log that is open in the test, for what its processes have written.

    Attributes:
        url: of the log.
    """

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self.url = url
        self._runner = runner
        self._log = open_saga_log(url)
        runner.run(self._log.open())

    def history(self, saga_id: str) -> SagaHistory | None:
        """Return what the log has of a saga."""
        stored = self._runner.run(self._log.get(saga_id))
        if stored is None:
            return None
        history = SagaHistory(saga_id, decode_entries(saga_id, stored.entries))
        assert history.state is stored.header.state
        return history

    def close(self) -> None:
        self._runner.run(self._log.close())


Readers: TypeAlias = Callable[[str], LogReader]


class World:
    """A saga, the log and the effect server that outlive its processes, and what must be true after each of them.

    Args:
        processes: drive it.
        log: of the saga.
        path: the directory of the file of the effect server.
        case: what happens in it.
        saga_id: its id.
        linger: turns of the event loop in which the end of a step waits to be written with what comes next.
    """

    def __init__(  # noqa: PLR0913 - what a saga needs
        self, processes: SagaProcesses, log: LogReader, path: Path, case: Case, saga_id: str, *, linger: int = 0
    ) -> None:
        self._log = log
        self.server = EffectServer(path / f"{saga_id}.effects")
        self._processes = processes
        self._case = case
        self._life = Life(
            url=log.url,
            effects=str(path / f"{saga_id}.effects"),
            saga_id=saga_id,
            name=case.saga,
            how=case.how,
            linger=linger,
        )
        self._lives = 0
        self._recorded: dict[str, tuple[str, int]] = {}  # the key of a step that is DONE, and the requests for it

    def live(self, *, crash_at: int | None = None, submits: bool = True) -> bool:
        """Let a process drive the saga; return whether it was killed.

        Its caller does not submit it again once it was undone: that would begin a new round, as it does if it is undone
        meanwhile.
        """
        history = self.history()
        submits &= history is None or history.state is not SagaState.COMPENSATED
        life = msgspec.structs.replace(
            self._life,
            number=self._lives,
            crash_at=crash_at,
            submits=submits,
        )
        self._lives += 1
        killed = self._processes.run(life)
        self._check_recorded()
        return killed

    def pause(self, pause_at: int, *, between: bool = False) -> int | None:
        """Let a process drive the saga until it stops, and return its id; None: it has ended."""
        life = msgspec.structs.replace(self._life, number=self._lives, pause_at=pause_at, pauses_between=between)
        self._lives += 1
        return self._processes.pause(life)

    def resume(self, pid: int) -> tuple[str, str]:
        """Continue a process that has stopped; return where that was, and what its task has raised."""
        lives_file(self._life).write_text(str(self._lives))
        self._processes.resume(pid)
        where, outcome = Path(f"{self._life.effects}.paused").read_text().split("\n")
        return where, outcome

    def _check_recorded(self) -> None:
        """Check that no step was called again once the log had its output."""
        for name, (key, requests) in self._recorded.items():
            assert self._requests(key) == requests, f"{name} was called again, and the log had its output"
        if (history := self.history()) is not None:
            done = [step for step in history.steps.values() if step.state is StepState.DONE]
            self._recorded = {step.name: (step.key, self._requests(step.key)) for step in done}

    def _requests(self, key: str) -> int:
        return sum(each.kind == "do" and each.key == key for each in self.server.requests())

    @property
    def has_ended(self) -> bool:
        """True once nobody drives it any more."""
        history = self.history()
        return history is not None and history.state not in UNFINISHED

    def history(self) -> SagaHistory | None:
        """Return what the log has of the saga."""

        return self._log.history(self._life.saga_id)

    def check(self, *states: SagaState) -> None:
        """Check that the saga has ended in one of `states`, with the effects that belong to it."""
        history = self.history()
        assert history is not None
        assert history.state in states, history.why
        effects = sorted(self.server.effects().values())
        if history.state is SagaState.DONE:
            assert effects == sorted(self._case.effects)
            assert history.result is not None
            assert decode_result(history.result) == self._outputs(history)
        elif history.state is SagaState.COMPENSATED:
            assert effects == []
            if self._case.sequential:
                self._check_order()
        assert len(effects) == len(set(effects)), "an effect was applied twice"
        self._check_calls(history)

    @staticmethod
    def _outputs(history: SagaHistory) -> list[str]:
        outputs = {step.name: decode_result(step.output) for step in history.steps.values() if step.output is not None}
        return [output for name, output in outputs.items() if name not in ("right 2", "right 3")]

    def _check_calls(self, history: SagaHistory) -> None:
        """Check that each request had the key of its step, and that none came before the log had its start."""
        undone: set[str] = set()
        for each in self.server.requests():
            step = each.step.removeprefix("undo ")
            assert each.key in [f"{self._life.saga_id}/{number}/{step}" for number in range(1, history.round + 1)]
            if each.key == history.key_of(step):
                assert step in history.steps, f"{each.step} was called, and the log has not its start"
            if each.kind == "undo":
                undone.add(each.key)
            else:
                assert each.step != step or each.key not in undone, f"{each.step} was called after it was undone"

    def _check_order(self) -> None:
        """Check that the effects were undone in reverse order."""
        done = list(dict.fromkeys(each.key for each in self.server.requests() if each.kind == "do"))
        undone = list(dict.fromkeys(each.key for each in self.server.requests() if each.kind == "undo"))
        for number in range(1, 3):
            of_round = [key for key in done if f"/{number}/" in key and key in undone]
            assert [key for key in undone if key in of_round] == of_round[::-1]


@pytest.fixture(scope="module")
def processes() -> Iterator[SagaProcesses]:
    with SagaProcesses() as processes:
        yield processes


@pytest.fixture
def readers() -> Iterator[Readers]:
    with asyncio.Runner() as runner, ExitStack() as stack:

        def open_reader(url: str) -> LogReader:
            return stack.enter_context(closing(LogReader(url, runner)))

        yield open_reader


def cases(cases: list[Case], *, quick: list[Case], usual: list[Case] | None = None) -> pytest.MarkDecorator:
    """Parametrize a test by logs and cases.

    Args:
        cases: all of them; `make kills` runs them on SQLite and on Redis, and the first one on the other logs.
        quick: those that are not slow on SQLite.
        usual: those that `make test` runs on SQLite; None: the quick ones. On Redis it runs the first two of them.
    """
    usual = quick if usual is None else usual
    parameters = []
    for backend in DURABLE_LOGS:
        chosen = {"sqlite": usual, "redis": usual[:2]}.get(backend.name, [])
        if ALL:
            chosen = cases if backend.name in ("sqlite", "redis") else usual[:1]
        for case in chosen:
            is_quick = case in quick if backend.name == "sqlite" else case == QUICK_ON_REDIS
            marks = () if is_quick else pytest.mark.slow
            parameters.append(pytest.param(backend, case, id=f"{backend}, {case}", marks=marks))
    return pytest.mark.parametrize(("backend", "case"), parameters)


@cases(CASES, quick=QUICK_CASES, usual=[CASES[1], CASES[3], CASES[0], *CASES[5:]])
def test_a_saga_whose_process_is_killed_at_any_moment_goes_on_to_its_end(
    backend: LogBackend, case: Case, processes: SagaProcesses, readers: Readers, tmp_path: Path
) -> None:
    log = readers(backend.fast_url(tmp_path))
    for crash_at in count(1):
        world = World(processes, log, tmp_path, case, f"saga {crash_at}")
        killed = world.live(crash_at=crash_at)
        if killed:
            assert not world.live(submits=crash_at % 2 == 0)
        world.check(case.state)
        if not killed:
            break
        assert crash_at < MOST
    assert crash_at > 15  # else there were no moments


@cases(CASES, quick=[], usual=[CASES[1], CASES[3]])
def test_the_ends_of_steps_may_all_be_written_with_what_comes_next(
    backend: LogBackend, case: Case, processes: SagaProcesses, readers: Readers, tmp_path: Path
) -> None:
    log = readers(backend.fast_url(tmp_path))
    for crash_at in range(1, MOST, 2):
        world = World(processes, log, tmp_path, case, f"saga {crash_at}", linger=1_000)
        killed = world.live(crash_at=crash_at)
        if killed:
            assert not world.live(submits=crash_at % 4 == 1)
        world.check(case.state)
        if not killed:
            break


@cases(UNREPEATABLE, quick=[], usual=UNREPEATABLE)
def test_a_step_that_cannot_be_repeated_is_called_once_and_parks_its_saga_if_its_outcome_is_unknown(
    backend: LogBackend, case: Case, processes: SagaProcesses, readers: Readers, tmp_path: Path
) -> None:
    log = readers(backend.fast_url(tmp_path))
    parked = 0
    for crash_at in count(1):
        world = World(processes, log, tmp_path, case, f"saga {crash_at}")
        killed = world.live(crash_at=crash_at)
        if killed:
            history = world.history()
            is_unknown = history is not None and history.state is SagaState.RUNNING and bool(history.unknown)
            assert not world.live(submits=crash_at % 2 == 0)
            world.check(SagaState.PARKED if is_unknown else case.state)
            parked += is_unknown
        calls = Counter(each.step for each in world.server.requests() if each.kind == "do")
        assert max(calls.values(), default=0) <= 1
        if not killed:
            break
        assert crash_at < MOST
    assert parked > 5


@cases(CASES[:4], quick=[CASES[1]])
def test_a_process_that_goes_on_with_a_saga_may_be_killed_at_any_moment_too(
    backend: LogBackend, case: Case, processes: SagaProcesses, readers: Readers, tmp_path: Path
) -> None:
    log = readers(backend.fast_url(tmp_path))
    for first in range(1, MOST, 2):
        world = World(processes, log, tmp_path, case, f"saga {first}")
        killed = world.live(crash_at=first)
        if killed:
            world.live(crash_at=1 + 7 * first % 17, submits=first % 4 == 1)
            assert not world.live(submits=first % 4 == 3)
        world.check(case.state)
        if not killed:
            break


@cases(CASES[:4], quick=[], usual=[CASES[0]])
def test_a_saga_that_loses_process_after_process_goes_on_or_is_parked(
    backend: LogBackend, case: Case, processes: SagaProcesses, readers: Readers, tmp_path: Path
) -> None:
    log = readers(backend.fast_url(tmp_path))
    states = set()
    for crash_at in (2, 3, 4, 5, 7, 10, 14):
        world = World(processes, log, tmp_path, case, f"saga {crash_at}")
        killed = sum(world.live(crash_at=crash_at, submits=False) for _ in range(10))
        assert killed > 0
        assert not world.live(submits=False)
        history = world.history()
        assert history is not None
        if history.state is SagaState.PARKED:
            assert re.search(r"its process was lost \d+ times in a row", history.why)
        world.check(case.state, SagaState.PARKED)
        states.add(history.state)
    assert states == {case.state, SagaState.PARKED}


@cases([CASES[0], CASES[1], *CASES[4:6]], quick=[CASES[1]])
def test_a_paused_process_does_nothing_for_a_saga_that_another_has_taken(
    backend: LogBackend, case: Case, processes: SagaProcesses, readers: Readers, tmp_path: Path
) -> None:
    log = readers(backend.fast_url(tmp_path))
    taken = 0
    for pause_at in range(3, MOST):  # from the start of the saga on
        world = World(processes, log, tmp_path, case, f"saga {pause_at}")
        if (pid := world.pause(pause_at)) is None:
            break
        history = world.history()
        assert history is not None
        was_taken = history.state in UNFINISHED
        assert not world.live(submits=False)
        there, requests = world.history(), world.server.requests()
        where, outcome = world.resume(pid)
        later = world.server.requests()[len(requests) :]
        # Its last look at its lease may have let one request through: what is appended meanwhile is not waited for.
        assert len(later) <= (where in ("before request", "before append", "after append")), (where, later)
        after = world.history()
        assert there is not None
        assert after is not None
        assert after.count == there.count
        if was_taken:
            assert outcome == "SagaTaken", where
            taken += 1
    assert taken > 15


@pytest.mark.parametrize(
    "seed", [seed if seed < 10 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(80 if ALL else 20)]
)
def test_a_saga_whose_processes_are_killed_and_paused_at_random_comes_to_its_end(
    seed: int, processes: SagaProcesses, readers: Readers, tmp_path: Path
) -> None:
    rng = clock.new_random(seed)
    backend = rng.choice(DURABLE_LOGS[:2]) if seed >= 10 else DURABLE_LOGS[0]
    case, linger = rng.choice(CASES), rng.choice((0, 8, 1_000))
    world = World(processes, readers(backend.fast_url(tmp_path)), tmp_path, case, "the saga", linger=linger)
    paused: list[int] = []
    for _ in range(rng.randint(3, 8)):
        if rng.random() < 0.6:
            world.live(crash_at=rng.randint(1, 30), submits=rng.random() < 0.5)
        elif (
            case.sequential
            and not world.has_ended
            and (pid := world.pause(rng.randint(3, 30), between=True)) is not None
        ):
            paused.append(pid)
        if paused and rng.random() < 0.4:
            world.resume(paused.pop(rng.randrange(len(paused))))
    world.live(submits=False)
    for pid in paused:
        world.resume(pid)
    history = world.history()
    assert history is not None
    if history.state is SagaState.PARKED:
        assert re.search(r"its process was lost \d+ times in a row", history.why)
    world.check(case.state, SagaState.PARKED)
