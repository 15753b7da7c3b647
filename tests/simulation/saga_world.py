"""The world in which simulated sagas have their effects, and the processes that drive them and may be lost.

The world has its own record of every effect, and sees every call of a step, a check and a compensation. What it sees
it compares with what the log has at that moment: that is the model against which sagas are tested.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from forebay import BackpressureSupervisor, Ticket
from forebay.errors import Overloaded, StepFailed, StoreUnavailable
from forebay.retry import Retry
from forebay.saga import Done, MemorySagaLog, NothingDone, Saga, SagaLog, SagaRun, SagaState, saga
from forebay.saga.records import SagaHistory, StepRecord, StepState, StoredSaga, decode_entries

LEASE, GRACE, TIMEOUT = 10.0, 2.0, 25.0  # seconds
UNDO_RETRY = Retry(max_attempts=3, base_delay=0.5, max_delay=2.0)

Kind = Literal["compensable", "plain", "pivot", "after"]
Behaviour = Literal[
    "returns",
    "raises",
    "raises after its effect",
    "has done nothing",
    "is refused",
    "gets no answer",
    "gets no answer to its effect",
    "hangs",
    "hangs after its effect",
    "returns what cannot be stored",
]
WITH_EFFECT = (
    "returns",
    "raises after its effect",
    "gets no answer to its effect",
    "hangs after its effect",
    "returns what cannot be stored",
)
UndoBehaviour = Literal["returns", "raises", "raises after its effect", "is overloaded"]


@dataclass(frozen=True)
class StepPlan:
    """What one step of a saga is, and does.

    Attributes:
        kind: what it is.
        idempotent: the server honours its key.
        checks: None: it has no check; otherwise how often that raises before it answers.
        retries: it is tried again once.
        optional: the function goes on if it fails.
        together: it is asked for at the same time as the step before.
        impatient: seconds after which the function itself cuts it off, or None.
        behaviours: of its calls under one key; the last one is that of all later ones.
        before, after: seconds of a call before its effect, and after it.
        undo: of the calls of its compensation.
    """

    kind: Kind
    idempotent: bool = False
    checks: int | None = None
    retries: bool = False
    optional: bool = False
    together: bool = False
    impatient: float | None = None
    behaviours: Sequence[Behaviour] = ("returns",)
    before: float = 0.0
    after: float = 0.0
    undo: Sequence[UndoBehaviour] = ("returns",)

    @property
    def compensable(self) -> bool:
        return self.kind == "compensable"


@dataclass(frozen=True)
class SagaPlan:
    """A saga: its steps, named by their numbers, and whether its function raises after them."""

    steps: Sequence[StepPlan]
    raises: bool = False

    def as_payload(self) -> dict[str, Any]:
        return {"steps": [asdict(step) for step in self.steps], "raises": self.raises}

    @classmethod
    def of(cls, payload: dict[str, Any]) -> SagaPlan:
        return cls([StepPlan(**step) for step in payload["steps"]], payload["raises"])

    def groups(self) -> Iterator[Sequence[tuple[str, StepPlan]]]:
        """Yield the steps, with their names, in groups that are asked for at the same time."""
        group: list[tuple[str, StepPlan]] = []
        for number, step in enumerate(self.steps):
            if group and not step.together:
                yield group
                group = []
            group.append((str(number), step))
        yield group


class World:
    """Where the effects of sagas are, and the log that their processes share.

    Attributes:
        log: which no process reaches but by a `ProcessLog`.
        plans: of the sagas, by their ids.
        effects: the keys of the effects that there are.
        wrong: the promises that were broken.
        closed: the rounds of sagas that a person has closed as they were.
        losses: how many processes were lost.
        over: set at the end of the test: then what hangs ends.
    """

    def __init__(self) -> None:
        self.log = MemorySagaLog()
        self.plans: dict[str, SagaPlan] = {}
        self.effects: set[str] = set()
        self.wrong: list[str] = []
        self.closed: set[tuple[str, int]] = set()
        self.losses = 0
        self.over = asyncio.Event()
        self._owners: dict[str, SagaProcess] = {}  # by fence
        self._takers: dict[str, list[str]] = defaultdict(list)  # the fences under which each saga was taken
        self._calls: Counter[str] = Counter()
        self._undo_calls: Counter[str] = Counter()
        self._checks: Counter[str] = Counter()

    # --- what the log has ---

    def stored(self, saga_id: str) -> StoredSaga | None:
        return self.log._sagas.get(saga_id)

    def history(self, saga_id: str) -> SagaHistory:
        stored = self.stored(saga_id)
        entries = () if stored is None else decode_entries(saga_id, stored.entries)
        return SagaHistory(saga_id, entries)

    def note_taken(self, stored: StoredSaga, fence: str, process: SagaProcess) -> None:
        """Note that a process has got a saga."""
        if stored.holder == fence:
            self._owners[fence] = process
            self._takers[stored.header.saga_id].append(fence)

    def _has(self, process: SagaProcess, saga_id: str, what: str) -> bool:
        """Return whether a process has a saga; it is wrong if it has not, and no other has taken it either."""
        stored = self.stored(saga_id)
        assert stored is not None
        if self._owners.get(stored.holder) is process:
            return True
        if self._owners[self._takers[saga_id][-1]] is process:
            self.wrong.append(f"{what} though its process has given saga {saga_id} back ({stored.header.state.value})")
        return False

    # --- what a process does ---

    def _begin(self, process: SagaProcess, key: str, what: str) -> StepRecord | None:
        """Check what is so at the beginning of each call, and return the record of its step."""
        saga_id, round_number, name = key.split("/")
        what = f"{what} of step {key}"
        history = self.history(saga_id)
        record = history.steps.get(name)
        if not self._has(process, saga_id, f"{what} was called"):
            self.wrong.append(f"{what} was called by a process that has not got its saga")
        if history.state not in (SagaState.RUNNING, SagaState.COMPENSATING):
            self.wrong.append(f"{what} was called though its saga is {history.state.value}")
        if record is None:
            self.wrong.append(f"{what} was called, and the log has no start of it")
        elif record.key != key or str(history.round) != round_number:
            self.wrong.append(f"{what} was called under another key than {record.key}")
        return record

    def begin_call(self, process: SagaProcess, step: StepPlan, key: str) -> Behaviour:
        """Check a call of a step when it begins, and return how it behaves."""
        record = self._begin(process, key, "the function")
        if record is not None and record.state is not StepState.STARTED:
            self.wrong.append(f"the function of step {key} was called again: it is {record.state.value}")
        if self.history(key.split("/", maxsplit=1)[0]).goes_back:
            self.wrong.append(f"the function of step {key} was called though its saga goes back")
        if key in self.effects and not step.idempotent:
            self.wrong.append(f"the function of step {key} was called again, which has had its effect")
        number = self._calls[key]
        self._calls[key] += 1
        return step.behaviours[min(number, len(step.behaviours) - 1)]

    def begin_check(self, process: SagaProcess, step: StepPlan, key: str) -> bool:
        """Check a call of a check when it begins, and return whether it raises."""
        record = self._begin(process, key, "the check")
        if record is not None and record.state is not StepState.STARTED:
            self.wrong.append(f"the check of step {key} was called: it is {record.state.value}")
        self._checks[key] += 1
        return self._checks[key] <= (step.checks or 0)

    def begin_undo(self, process: SagaProcess, step: StepPlan, key: str, output: object) -> UndoBehaviour:
        """Check a call of a compensation when it begins, and return how it behaves."""
        record = self._begin(process, key, "the compensation")
        history = self.history(key.split("/", maxsplit=1)[0])
        if record is not None:
            if not record.needs_undo:
                self.wrong.append(f"step {key} was undone: it is {record.state.value}")
            if output is not None and output != output_of(key):
                self.wrong.append(f"step {key} was undone by the output {output!r}")
            if output is None and record.state is StepState.DONE:
                self.wrong.append(f"step {key} was undone without its output")
            self._check_order(history, record, key)
        number = self._undo_calls[key]
        self._undo_calls[key] += 1
        return step.undo[min(number, len(step.undo) - 1)]

    def _check_order(self, history: SagaHistory, record: StepRecord, key: str) -> None:
        if history.past_pivot:
            self.wrong.append(f"step {key} was undone after the pivot")
        if not history.goes_back and record.state is StepState.DONE:
            self.wrong.append(f"step {key} was undone: it is done, and its saga goes forwards")
        if record.state is StepState.DONE:
            later = [each for each in history.to_undo() if each.state is StepState.DONE and each.ended > record.ended]
            if later:
                self.wrong.append(f"step {key} was undone before step {later[0].name}, which ended later")

    def apply(self, process: SagaProcess, key: str) -> None:
        """Have an effect.

        Raises:
            ConnectionError: another process has the saga: this one is cut off from the rest of the world, too.
        """
        self._reach(process, key)
        self.effects.add(key)

    def undo(self, process: SagaProcess, key: str) -> None:
        """Undo an effect; it raises what `apply` raises."""
        self._reach(process, key)
        self.effects.discard(key)

    def _reach(self, process: SagaProcess, key: str) -> None:
        if not self._has(process, key.split("/", maxsplit=1)[0], f"step {key} had an effect"):
            raise ConnectionError("cut off from the world")

    def report(self) -> str:
        """Return what is wrong, and the logs of the sagas, for the message of a test that fails."""
        lines = list(self.wrong)
        for saga_id, stored in self.log._sagas.items():
            lines.append(f"saga {saga_id} is {stored.header.state.value}: {self.plans[saga_id]}")
            lines += [f"  {entry}" for entry in decode_entries(saga_id, stored.entries)]
        return "\n".join(lines)

    # --- in the end ---

    def check_end(self) -> None:
        """Check all sagas that there are, once everything has had its time."""
        for saga_id in self.log._sagas:
            history = self.history(saga_id)
            if history.state is SagaState.DONE:
                self._check_effects(history)
            elif history.state is SagaState.COMPENSATED:
                self._check_no_effects(history)
            elif history.state is SagaState.PARKED:
                self._check_parked(history)
            elif history.state is not SagaState.RESOLVED:
                self.wrong.append(f"saga {saga_id} has not ended: it is {history.state.value}")

    def _check_effects(self, history: SagaHistory) -> None:
        plan = self.plans[history.saga_id]
        for name, record in history.steps.items():
            step = plan.steps[int(name)]
            if record.state is StepState.DONE and record.key not in self.effects:
                self.wrong.append(f"saga {history.saga_id} is done without the effect of step {name}")
            if record.state is not StepState.DONE and record.key in self.effects and step.kind != "plain":
                self.wrong.append(
                    f"saga {history.saga_id} is done with the effect of step {name}, which is {record.state.value}"
                )
        self._check_rounds(history, before=history.round)

    def _check_no_effects(self, history: SagaHistory) -> None:
        self._check_rounds(history, before=history.round + 1)

    def _check_rounds(self, history: SagaHistory, *, before: int) -> None:
        """Check that nothing is left of earlier rounds."""
        plan = self.plans[history.saga_id]
        for number in range(1, before):
            if (history.saga_id, number) in self.closed:
                continue
            for name, step in enumerate(plan.steps):
                if step.kind != "plain" and f"{history.saga_id}/{number}/{name}" in self.effects:
                    self.wrong.append(
                        f"round {number} of saga {history.saga_id} is compensated with the effect of step {name},"
                        f" which is {step.kind}"
                    )

    def _check_parked(self, history: SagaHistory) -> None:
        """Check that a saga that waits for a person has a reason to."""
        why, plan = history.why, self.plans[history.saga_id]
        steps = [plan.steps[int(name)] for name in history.steps]
        reasons = {
            "its outcome is unknown": any(not (step.idempotent or step.checks is not None) for step in steps),
            "times in a row": len(self._takers[history.saga_id]) > 3,  # also if nothing but the answer was lost
            "the compensation of step": any(len(step.undo) > 2 for step in steps),
            "failed after the pivot": history.past_pivot,
            "after its pivot it ran out of time": history.past_pivot,
            "leaves open whether it has succeeded": any(
                (step.kind == "pivot" or (step.kind == "after" and not step.idempotent)) and step.checks is None
                for step in steps
            ),
            "an earlier call may have succeeded": any(
                step.kind == "pivot" and step.checks is None and step.idempotent for step in steps
            ),
            "it is unknown how that ended": any(
                step.kind == "pivot" and not step.idempotent and step.checks is None for step in steps
            ),
            "its repetition has not ended within": any(
                step.kind == "pivot" and any(each.startswith("hangs") for each in step.behaviours[1:]) for step in steps
            ),
            "the check of step": any((step.checks or 0) > 4 for step in steps),
        }
        if not any(text in why and allowed for text, allowed in reasons.items()):
            self.wrong.append(f"saga {history.saga_id} is parked without reason: {why}")


def output_of(key: str) -> str:
    """Return what the step with this key returns."""
    return f"output of {key}"


class ProcessLost(Exception):
    """The process is lost: raised in it at the end of the test alone, so that it ends."""


class SagaProcess:
    """A process that drives sagas, and may be lost between any two things that it does to the world.

    Attributes:
        world: that it shares with others.
        supervisor: of the process.
        tickets: of the tasks that were submitted to it.
        lost: it does nothing any more.
        fuse: after so many things that it does to the world, it is lost; None: it is not.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.lost = False
        self.fuse: int | None = None
        self.log = ProcessLog(self)
        self.tickets: list[Ticket] = []
        self.running: set[str] = set()  # the keys of steps whose function, check or compensation is running
        self.supervisor = BackpressureSupervisor(saga_log=cast("SagaLog", self.log), lease=LEASE, zombie_grace=GRACE)
        self.supervisor.register_worker(
            "sagas",
            handler=self._saga(),
            task_types=["saga"],
            max_concurrent=4,
            timeout=TIMEOUT,
            reset_timeout=1.0,
        )

    def lose(self) -> None:
        """Lose the process: nothing of it goes on."""
        if not self.lost:
            self.lost = True
            self.world.losses += 1

    async def point(self) -> None:
        """Wait without end if the process is lost here, or was before.

        Raises:
            ProcessLost: the test has ended.
        """
        if self.fuse is not None and not self.lost:
            self.fuse -= 1
            if self.fuse < 0:
                self.lose()
        if self.lost:
            await self.world.over.wait()
            raise ProcessLost

    @contextmanager
    def _alone(self, key: str, what: str) -> Iterator[None]:
        """Check that nothing else is done for the same step at the same time in this process."""
        if key in self.running:
            self.world.wrong.append(f"the {what} of step {key} was called while another call of it was running")
        self.running.add(key)
        try:
            yield
        finally:
            self.running.discard(key)

    def _saga(self) -> Saga:
        @saga("saga", undo_retry=UNDO_RETRY)
        async def function(run: SagaRun, payload: dict[str, Any]) -> list[Any]:
            plan = SagaPlan.of(payload)
            outputs: list[Any] = []
            for group in plan.groups():
                outputs += await asyncio.gather(*(self._ask(run, name, step) for name, step in group))
            if plan.raises:
                raise ValueError("the function of the saga raises")
            return outputs

        return function

    async def _ask(self, run: SagaRun, name: str, step: StepPlan) -> Any:
        try:
            async with asyncio.timeout(step.impatient):
                return await run.step(
                    name,
                    self._function(step),
                    compensate=self._undo(step) if step.compensable else None,
                    pivot=step.kind == "pivot",
                    retry=Retry(max_attempts=2, base_delay=0.1) if step.retries else None,
                    check=None if step.checks is None else self._check(step),
                    idempotent=step.idempotent,
                )
        except (StepFailed, TimeoutError):
            if step.optional:
                return None
            raise

    def _function(self, step: StepPlan) -> Callable[..., Awaitable[Any]]:
        async def call(*, key: str) -> Any:
            if self.lost:
                await self.point()
            behaviour = self.world.begin_call(self, step, key)
            with self._alone(key, "function"):
                await asyncio.sleep(step.before)
                await self.point()
                if behaviour in WITH_EFFECT:
                    self.world.apply(self, key)
                await self.point()
                if behaviour == "returns":
                    await asyncio.sleep(step.after)
                return await self._end_call(behaviour, key)

        return call

    async def _end_call(self, behaviour: Behaviour, key: str) -> Any:
        match behaviour:
            case "returns":
                return output_of(key)
            case "returns what cannot be stored":
                return object()
            case "hangs" | "hangs after its effect":
                await asyncio.get_running_loop().create_future()
            case "has done nothing" if key not in self.world.effects:  # by an earlier call
                raise NothingDone
            case "is refused":
                raise ConnectionRefusedError
            case "gets no answer" | "gets no answer to its effect":
                raise TimeoutError
        raise RuntimeError(behaviour)

    def _check(self, step: StepPlan) -> Callable[..., Awaitable[Done | None]]:
        async def check(*, key: str) -> Done | None:
            if self.lost:
                await self.point()
            raises = self.world.begin_check(self, step, key)
            with self._alone(key, "check"):
                await self.point()
                await asyncio.sleep(step.after)
                if raises:
                    raise OSError("the check cannot be asked")
                return Done(output_of(key)) if key in self.world.effects else None

        return check

    def _undo(self, step: StepPlan) -> Callable[..., Awaitable[None]]:
        async def undo(output: object, *, key: str) -> None:
            if self.lost:
                await self.point()
            behaviour = self.world.begin_undo(self, step, key, output)
            with self._alone(key, "compensation"):
                await asyncio.sleep(step.before)
                await self.point()
                if behaviour in ("returns", "raises after its effect"):
                    self.world.undo(self, key)
                await self.point()
                if behaviour == "is overloaded":
                    raise Overloaded("no room", retry_after=0.3)
                if behaviour != "returns":
                    raise RuntimeError("the compensation fails")

        return undo


class ProcessLog:
    """The log of the world, as one process reaches it: late, at times not at all, and never once it is lost.

    An operation is done even if its caller has gone meanwhile, as by the thread of a SQLite file.

    Attributes:
        away_until: time of the loop until which it cannot be reached.
        loses_answers: while it is away, it does what it is asked, and only its answers are lost.
        delay: seconds that each operation takes.
    """

    durable = True

    def __init__(self, process: SagaProcess) -> None:
        self._process = process
        self._log = process.world.log
        self._closed = False
        self.away_until = 0.0
        self.loses_answers = False
        self.delay = 0.0

    async def open(self) -> None:
        await self._process.point()

    async def close(self) -> None:
        self._closed = True

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self._log, name)

        async def operate(*args: Any, **kwargs: Any) -> Any:
            operation = asyncio.ensure_future(self._operate(method, name, *args, **kwargs))
            operation.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            return await asyncio.shield(operation)

        return operate

    async def _operate(self, method: Callable[..., Awaitable[Any]], name: str, *args: Any, **kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        try:
            await self._process.point()
            await asyncio.sleep(self.delay / 2)
            if self._process.lost:
                await self._process.point()
            away = self._closed or loop.time() < self.away_until
            if away and (self._closed or not self.loses_answers):
                raise _unavailable("it is away")
            answer = await method(*args, **kwargs)
            self._note(name, answer, kwargs)
            await self._process.point()
            await asyncio.sleep(self.delay / 2)
            if self._process.lost:
                await self._process.point()
        except ProcessLost:
            raise _unavailable("the process is lost") from None
        if away:
            raise _unavailable("its answer was lost")
        return answer

    def _note(self, name: str, answer: Any, arguments: dict[str, Any]) -> None:
        taken = {"begin": [answer], "claim": answer}.get(name, ())
        for stored in taken:
            self._process.world.note_taken(stored, arguments["fence"], self._process)


def _unavailable(why: str) -> StoreUnavailable:
    return StoreUnavailable(where="the log of the world", why=why, advice="It is part of the test.")
