"""Invalid input: the call that gets it raises an error of `forebay.errors` that says what to do."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, error_of, flood, run_ready, virtual

from forebay import BackpressureSupervisor, Deadline, Estimate, ForebayError, Priority, Task, TaskStatus
from forebay.breaker import consecutive_faults
from forebay.errors import (
    DeadlinePassed,
    DuplicateTask,
    DuplicateWorker,
    InvalidDeadline,
    InvalidEstimate,
    InvalidHandler,
    InvalidOverflowUrl,
    InvalidSetting,
    InvalidTask,
    InvalidThreshold,
    InvalidTimeout,
    MessageTooLarge,
    NotSerializable,
    NotStarted,
    OverflowRequired,
    PayloadTooLarge,
    SlotMisused,
    StoreUnavailable,
    SupervisorClosed,
    UnknownTask,
    UnknownTaskType,
    UnknownWorker,
    WrongLoop,
)
from forebay.overflow import MemoryTaskStore

BOTH = pytest.mark.parametrize("nowait", [False, True], ids=["submit", "submit_nowait"])


async def offer(supervisor: BackpressureSupervisor, task: Any, *, nowait: bool) -> Any:
    return supervisor.submit_nowait(task) if nowait else await supervisor.submit(task)


def make_supervisor(**options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**options)
    supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
    return supervisor


# --- tasks -----------------------------------------------------------------------------------------------------------


@BOTH
@virtual
async def test_an_unknown_task_type_names_those_that_are_known(*, nowait: bool) -> None:
    async with make_supervisor() as supervisor:
        with pytest.raises(UnknownTaskType, match=r"'wrok' \(there are workers for: work\).*register_worker") as caught:
            await offer(supervisor, Task("wrok"), nowait=nowait)
        assert isinstance(caught.value, LookupError)


@BOTH
@virtual
async def test_no_worker_at_all_says_so(*, nowait: bool) -> None:
    async with BackpressureSupervisor() as supervisor:
        with pytest.raises(UnknownTaskType, match="none yet"):
            await offer(supervisor, Task("work"), nowait=nowait)


@virtual
async def test_a_slot_of_an_unknown_type_is_an_error_at_once() -> None:
    async with make_supervisor() as supervisor:
        with pytest.raises(UnknownTaskType):
            supervisor.slot("wrok")


@pytest.mark.parametrize("timeout", [0, -1, -0.5, math.inf, math.nan, "3", True, [1]])
def test_a_timeout_that_is_not_a_positive_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(InvalidTimeout, match="positive number of seconds"):
        Task("work", timeout=timeout)
    with pytest.raises(InvalidTimeout, match="positive number of seconds"):
        BackpressureSupervisor().register_worker("w", handler=Agent(), task_types=["work"], timeout=timeout)


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, "60", None])
def test_a_deadline_that_is_not_in_the_future(seconds: Any) -> None:
    with pytest.raises(InvalidDeadline, match=r"Deadline\.within\(seconds\)"):
        Deadline.within(seconds)


@pytest.mark.parametrize("at", [math.inf, math.nan, "tomorrow", None])
def test_a_deadline_that_is_not_a_point_in_time(at: Any) -> None:
    with pytest.raises(InvalidDeadline, match="epoch seconds"):
        Deadline(at)


def test_a_task_cannot_be_made_with_a_deadline_in_the_past() -> None:
    with pytest.raises(DeadlinePassed, match=r"passed .* days ago.*Deadline\.within"):
        Task("work", deadline=Deadline(1.0))


@BOTH
@virtual
async def test_a_deadline_that_has_passed_by_the_time_of_submitting(*, nowait: bool) -> None:
    async with make_supervisor() as supervisor:
        task = Task("work", deadline=Deadline.within(1.0))
        await asyncio.sleep(2.0)
        with pytest.raises(DeadlinePassed, match=r"passed 1 s ago"):
            await offer(supervisor, task, nowait=nowait)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("priority", 7, "CRITICAL, HIGH, NORMAL or LOW"),
        ("priority", "HIGH", "CRITICAL, HIGH, NORMAL or LOW"),
        ("priority", None, "CRITICAL, HIGH, NORMAL or LOW"),
        ("deadline", 60.0, r"Deadline\.within"),
        ("task_id", "", "non-empty string"),
        ("task_id", 7, "non-empty string"),
        ("tenant", "", "non-empty string"),
        ("tenant", None, "non-empty string"),
        ("key", "", "non-empty string"),
        ("thread_id", 7, "non-empty string"),
        ("estimate", 3, "an Estimate"),
    ],
)
def test_an_invalid_field_says_what_it_must_be(field: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidTask, match=f"{field} .*{expected}"):
        Task("work", **{field: value})


@pytest.mark.parametrize("task_type", ["", None, 7, b"work"])
def test_a_task_type_is_a_word(task_type: Any) -> None:
    with pytest.raises(InvalidTask, match="task_type"):
        Task(task_type)


def test_a_payload_passed_as_the_type_is_not_echoed() -> None:
    with pytest.raises(InvalidTask) as caught:
        Task({"key": "sk-very-secret"})  # type: ignore[arg-type]
    assert "sk-very-secret" not in str(caught.value)


def test_a_priority_may_be_given_as_its_number() -> None:
    assert Task("work", priority=1).priority is Priority.HIGH  # type: ignore[arg-type]


@pytest.mark.parametrize("figures", [{"calls": -1}, {"input_tokens": 1.5}, {"output_tokens": True}])
def test_an_estimate_consists_of_whole_numbers(figures: Any) -> None:
    with pytest.raises(InvalidEstimate, match="whole number"):
        Estimate(**figures)


@BOTH
@pytest.mark.parametrize("thing", ["work", {"topic": "rivers"}, None, Task])
@virtual
async def test_something_that_is_not_a_task(thing: Any, *, nowait: bool) -> None:
    async with make_supervisor() as supervisor:
        with pytest.raises(InvalidTask, match=r'a Task, such as Task\("research"'):
            await offer(supervisor, thing, nowait=nowait)


@virtual
async def test_two_tasks_of_one_id_at_the_same_moment() -> None:
    async with make_supervisor() as supervisor:
        offers = [supervisor.submit(Task("work", task_id="mine")) for _ in range(3)]
        answers = await asyncio.gather(*offers, return_exceptions=True)
        assert [isinstance(answer, DuplicateTask) for answer in answers] == [False, True, True]


@BOTH
@virtual
async def test_two_tasks_of_one_id_that_have_not_ended(*, nowait: bool) -> None:
    async with make_supervisor() as supervisor:
        await offer(supervisor, Task("work", task_id="mine"), nowait=nowait)
        with pytest.raises(DuplicateTask, match=r"'mine' has not ended.*key="):
            await offer(supervisor, Task("work", task_id="mine"), nowait=nowait)


@virtual
async def test_an_id_may_be_used_again_once_its_task_has_ended() -> None:
    async with make_supervisor() as supervisor:
        await supervisor.run(Task("work", 1, task_id="mine"))
        assert await supervisor.run(Task("work", 2, task_id="mine")) == 2
        assert (await supervisor.ticket("mine")).result == 2


@virtual
async def test_a_rejected_task_may_be_submitted_again_as_it_is() -> None:
    async with make_supervisor(max_queue_size=0) as supervisor:
        (busy,) = flood(supervisor, "work", 1)
        task = Task("work", 7, task_id="mine", key="k")
        assert not await supervisor.submit(task)
        await busy
        assert await supervisor.run(task) == 7


@virtual
async def test_a_ticket_that_is_not_known() -> None:
    async with make_supervisor() as supervisor:
        with pytest.raises(UnknownTask, match="'unknown' is known here: it was never submitted, or"):
            supervisor.ticket("unknown")


@virtual
async def test_a_ticket_that_the_overflow_does_not_know_either() -> None:
    async with make_supervisor(overflow="memory://") as supervisor:
        assert await supervisor.find("unknown") is None
        assert await supervisor.find(key="unknown") is None
        with pytest.raises(UnknownTask, match=r"await supervisor\.find\('unknown'\)"):
            supervisor.ticket("unknown")
    assert isinstance(await error_of(supervisor.find("unknown")), SupervisorClosed)


@pytest.mark.parametrize("arguments", [{}, {"task_id": "a", "key": "k"}, {"task_id": 5}, {"key": 5}])
@virtual
async def test_what_is_not_one_id_or_key_is_not_looked_for(arguments: dict[str, Any]) -> None:
    async with make_supervisor() as supervisor:
        with pytest.raises(InvalidSetting, match=r"find\(key="):
            await supervisor.find(**arguments)


# --- payloads --------------------------------------------------------------------------------------------------------

LOOP: list[Any] = []
LOOP.append(LOOP)

UNPORTABLE = pytest.mark.parametrize(
    ("payload", "path"),
    [
        (object(), "payload"),
        ({"topic": {1, 2}}, r"payload\.topic"),
        ([1, [2, lambda: 3]], r"payload\[1\]\[1\]"),
        ({"a": {2: "b"}}, r"payload\.a"),
        (LOOP, "payload"),
        ("\ud800", "payload"),
        (2**70, "payload"),
    ],
    ids=["object", "set", "function", "key", "loop", "surrogate", "int"],
)


@BOTH
@UNPORTABLE
@virtual
async def test_with_an_overflow_a_payload_that_cannot_be_stored_is_an_error_at_submit(
    payload: Any, path: str, *, nowait: bool
) -> None:
    async with make_supervisor(overflow="memory://") as supervisor:
        with pytest.raises(NotSerializable, match=f"at {path}.*spill=False"):
            await offer(supervisor, Task("work", payload), nowait=nowait)
        assert supervisor.statistics().submitted == 0


@UNPORTABLE
@virtual
async def test_a_payload_that_is_never_stored_may_be_anything(payload: Any, path: str) -> None:
    async with make_supervisor() as supervisor:
        assert await supervisor.submit(Task("work", payload)), path
    async with make_supervisor(overflow="memory://") as supervisor:
        assert await supervisor.submit(Task("work", payload, spill=False))


@BOTH
@virtual
async def test_a_payload_over_the_bound(*, nowait: bool) -> None:
    async with make_supervisor(overflow="memory://", max_payload_bytes=1000) as supervisor:
        await offer(supervisor, Task("work", b"x" * 900), nowait=nowait)
        with pytest.raises(PayloadTooLarge, match=r"the bound is 1000.*a reference, or raise max_payload_bytes"):
            await offer(supervisor, Task("work", b"x" * 1100), nowait=nowait)


@BOTH
@virtual
async def test_a_payload_that_fits_into_no_message_of_the_overflow(*, nowait: bool) -> None:
    class SmallMessages(MemoryTaskStore):
        max_envelope_bytes = 1000

    async with make_supervisor(overflow=SmallMessages()) as supervisor:
        await offer(supervisor, Task("work", b"x" * 500), nowait=nowait)
        with pytest.raises(MessageTooLarge, match=r"holds 1000: store its\s+payload elsewhere"):
            await offer(supervisor, Task("work", b"x" * 1100), nowait=nowait)
        await offer(supervisor, Task("work", b"x" * 1100, spill=False), nowait=nowait)


@virtual
async def test_durable_without_an_overflow() -> None:
    async with make_supervisor() as supervisor:
        with pytest.raises(OverflowRequired, match=r'there is no overflow.*overflow="sqlite:///spill\.db"'):
            await supervisor.submit(Task("work", durable=True))


@virtual
async def test_durable_with_an_overflow_that_is_not_durable() -> None:
    async with make_supervisor(overflow="memory://") as supervisor:
        with pytest.raises(OverflowRequired, match=r"does not survive its process.*sqlite"):
            await supervisor.submit(Task("work", durable=True))


@virtual
async def test_durable_without_waiting() -> None:
    async with make_supervisor(overflow="memory://") as supervisor:
        with pytest.raises(OverflowRequired, match=r"await submit"):
            supervisor.submit_nowait(Task("work", durable=True))


# --- the supervisor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, 80, math.nan, "0.8", None, True])
def test_a_threshold_outside_of_zero_to_one(threshold: Any) -> None:
    with pytest.raises(InvalidThreshold, match=r"outside \(0, 1\]: 0\.8 rejects NORMAL"):
        BackpressureSupervisor(backpressure_threshold=threshold)


@pytest.mark.parametrize("threshold", [1e-9, 0.5, 1, 1.0])
def test_a_threshold_inside(threshold: float) -> None:
    BackpressureSupervisor(backpressure_threshold=threshold)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_queue_size", -1),
        ("max_queue_size", 1.5),
        ("max_queue_size", True),
        ("lease", 0),
        ("lease", math.inf),
        ("max_payload_bytes", 0),
        ("max_attempts", 0),
        ("keep_results", -1),
        ("zombie_grace", -1),
        ("zombie_grace", None),
        ("lag_bound", 0),
        ("lag_bound", "1"),
        ("on_event", 5),
        ("on_event", [5]),
    ],
)
def test_an_invalid_setting_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting, match=f"{name}=.* must be "):
        BackpressureSupervisor(**{name: value})


@pytest.mark.parametrize(
    "url",
    [
        "",
        "spill.db",
        "mongodb://x",
        "sqlite://spill.db",
        "memory://?bound=0",
        "memory://?bound=x",
        "memory://?size=3",
        7,
    ],
)
def test_an_overflow_that_cannot_be_opened_says_which_forms_are_known(url: Any) -> None:
    with pytest.raises(InvalidOverflowUrl, match=r"Known forms: sqlite:///relative\.db"):
        BackpressureSupervisor(overflow=url)


@pytest.mark.blocks
@virtual
async def test_an_overflow_whose_directory_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    supervisor = make_supervisor(overflow=f"sqlite:///{tmp_path}/no/spill.db")
    with pytest.raises(StoreUnavailable, match=f"mkdir -p {tmp_path}/no"):
        await supervisor.start()


CALLS: list[Callable[[BackpressureSupervisor], Any]] = [
    lambda s: s.submit(Task("work")),
    lambda s: s.run(Task("work")),
    lambda s: s.submit_nowait(Task("work")),
    lambda s: s.slot("work"),
]
CALLED = pytest.mark.parametrize("call", CALLS, ids=["submit", "run", "submit_nowait", "slot"])


async def made(call: Callable[[], Any]) -> BaseException:
    """Return what a call raises, at once or when it is awaited."""

    async def do() -> None:
        answer = call()
        if asyncio.iscoroutine(answer):
            await answer

    return await error_of(do())


@CALLED
@virtual
async def test_before_the_start(call: Callable[[BackpressureSupervisor], Any]) -> None:
    supervisor = make_supervisor()
    error = await made(lambda: call(supervisor))
    assert isinstance(error, NotStarted)
    assert "async with BackpressureSupervisor" in str(error)


@CALLED
@virtual
async def test_after_the_end(call: Callable[[BackpressureSupervisor], Any]) -> None:
    async with make_supervisor() as supervisor:
        pass
    error = await made(lambda: call(supervisor))
    assert isinstance(error, SupervisorClosed)
    assert "closed and takes no more work" in str(error)
    assert "start it again once it has closed" in str(error)


@virtual
async def test_a_slot_that_is_entered_after_the_end() -> None:
    async with make_supervisor() as supervisor:
        slot = supervisor.slot("work")
    assert isinstance(await error_of(slot.__aenter__()), SupervisorClosed)


@virtual
async def test_draining_and_tickets_before_the_start() -> None:
    supervisor = make_supervisor()
    assert isinstance(await error_of(supervisor.drain()), NotStarted)
    with pytest.raises(NotStarted):
        supervisor.ticket("x")


@pytest.mark.parametrize("limit", [-1, math.nan, math.inf, "3"])
@virtual
async def test_a_drain_with_an_invalid_timeout(limit: Any) -> None:
    async with make_supervisor() as supervisor:
        with pytest.raises(InvalidSetting, match="drain was given timeout="):
            await supervisor.drain(timeout=limit)
        assert await supervisor.submit(Task("work"))  # nothing has happened


async def test_from_another_loop() -> None:
    async with make_supervisor() as supervisor:
        ticket = await supervisor.submit(Task("work", spill=False))

        async def on_another_loop() -> list[BaseException]:
            return [
                await error_of(supervisor.submit(Task("work"))),
                await error_of(supervisor.run(Task("work"))),
                await made(lambda: supervisor.submit_nowait(Task("work"))),
                await made(lambda: supervisor.slot("work")),
                await error_of(ticket),
            ]

        errors = await asyncio.get_running_loop().run_in_executor(None, asyncio.run, on_another_loop())
        ticket.cancel()
    assert [type(error) for error in errors] == [WrongLoop] * 5
    assert "portal()" in str(errors[0])


# --- workers ---------------------------------------------------------------------------------------------------------


@virtual
async def test_two_workers_of_one_name() -> None:
    supervisor = make_supervisor()
    with pytest.raises(DuplicateWorker, match=r"'worker' is already registered.*another name"):
        supervisor.register_worker("worker", handler=Agent(), task_types=["other"])
    async with supervisor:
        with pytest.raises(DuplicateWorker):
            supervisor.register_worker("worker", handler=Agent(), task_types=["other"])
        with pytest.raises(UnknownTaskType):  # the second changed nothing
            supervisor.submit_nowait(Task("other"))


async def a_coroutine() -> None: ...


async def yields(_: Task) -> Any:
    yield 1


@pytest.mark.parametrize(
    ("handler", "advice"),
    [
        (None, "pass handler=, or factory="),
        (7, "an async or plain callable that takes the Task"),
        ("research", "it is a name: import what it names"),
        (Agent, "it is a class: pass an instance"),
        (yields, "it is a generator"),
    ],
    ids=["none", "number", "name", "class", "generator"],
)
def test_a_handler_that_cannot_be_called(handler: Any, advice: str) -> None:
    with pytest.raises(InvalidHandler, match=f"'w' has a handler of type .*{advice}") as caught:
        BackpressureSupervisor().register_worker("w", handler=handler, task_types=["work"])
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("setting", ["start", "stop", "on_cancel"])
def test_a_hook_that_was_called_by_mistake(setting: str) -> None:
    supervisor = BackpressureSupervisor()
    mistake: dict[str, Any] = {setting: a_coroutine()}
    with pytest.raises(InvalidSetting, match=f"without parentheses, {setting}=a_coroutine: the supervisor calls it"):
        supervisor.register_worker("w", handler=Agent(), task_types=["work"], **mistake)


def test_a_factory_that_is_a_name() -> None:
    with pytest.raises(InvalidHandler, match="such as 'json:JSONDecoder'"):
        BackpressureSupervisor().register_worker("w", factory="json.JSONDecoder", task_types=["work"])


def test_a_worker_without_task_types() -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidSetting, match="it must be not empty: a list of the task types that it takes"):
        supervisor.register_worker("w", handler=Agent(), task_types=[])
    with pytest.raises(InvalidSetting, match="it must be not empty"):
        supervisor.worker()(Agent())


@pytest.mark.parametrize("call", ["submit", "run", "submit_nowait"])
@virtual
async def test_a_field_of_the_task_that_is_given_to_the_call(call: str) -> None:
    async def made(**arguments: Any) -> Any:
        answer = getattr(supervisor, call)(Task("work"), **arguments)
        return answer if call == "submit_nowait" else await answer

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=Agent(), task_types=["work"])
        expected = (
            rf"takes no argument 'priority'; it is a field of the task: {call}\(Task\(\.\.\., priority=\.\.\.\)\)"
        )
        with pytest.raises(TypeError, match=expected):
            await made(priority=Priority.LOW)
        with pytest.raises(TypeError, match=rf"supervisor.{call}\(\) takes no argument 'colour'$"):
            await made(colour="red")
        assert supervisor.statistics().submitted == 0


@virtual
async def test_a_worker_that_does_not_exist_is_named_with_those_that_do() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("writer", handler=Agent(), task_types=["work"])
        assert supervisor.workers["writer"] is worker
        for kind in (UnknownWorker, KeyError):
            with pytest.raises(kind) as caught:
                supervisor.workers["wroter"]
            assert str(caught.value).startswith("No worker is named 'wroter' (there are: writer): ")
        assert "wroter" not in supervisor.workers
        assert supervisor.workers.get("wroter") is None
        for number in range(100):
            supervisor.register_worker(f"w{number:02}", handler=Agent(), task_types=["work"])
        with pytest.raises(UnknownWorker, match="w19 and 81 more"):
            supervisor.workers["wroter"]


def test_a_handler_that_was_called_by_mistake() -> None:
    with pytest.raises(InvalidHandler, match="without parentheses"):
        BackpressureSupervisor().register_worker("w", handler=a_coroutine(), task_types=["work"])


def test_a_handler_and_a_factory() -> None:
    with pytest.raises(InvalidSetting, match="factory"):
        BackpressureSupervisor().register_worker("w", handler=Agent(), factory=Agent, task_types=["work"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", ""),
        ("name", 7),
        ("name", ["w"]),
        ("task_types", "work"),
        ("task_types", []),
        ("task_types", [""]),
        ("task_types", [7]),
        ("task_types", [["work"]]),
        ("task_types", None),
        ("max_concurrent", 0),
        ("max_concurrent", 1.5),
        ("max_concurrent", True),
        ("max_open", 0),
        ("max_open", 1.5),
        ("reset_timeout", 0),
        ("reset_timeout", -1),
        ("reset_timeout", "ten"),
        ("breaker", 5),
        ("breaker", consecutive_faults(5)),
        ("breaker", False),
        ("on_cancel", 5),
        ("config", {"a": 1}),
    ],
)
def test_an_invalid_setting_of_a_worker_is_named(name: str, value: Any) -> None:
    settings: dict[str, Any] = {"name": "w", "handler": Agent(), "task_types": ["work"], name: value}
    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidSetting, match=f"{name}=.* must be "):
        supervisor.register_worker(**settings)
    assert not supervisor.workers


def test_a_supervisor_cannot_be_its_own_handler() -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidHandler, match="itself"):
        supervisor.register_worker("w", handler=supervisor, task_types=["work"])


# --- handlers that misbehave -----------------------------------------------------------------------------------------


def test_a_handler_that_takes_no_task_is_an_error_at_registration() -> None:
    async def without_argument() -> None: ...

    supervisor = BackpressureSupervisor()
    with pytest.raises(InvalidHandler, match="called with one argument, the Task"):
        supervisor.register_worker("w", handler=without_argument, task_types=["work"])


def test_supervisors_that_would_contain_each_other() -> None:
    one, other = BackpressureSupervisor(), BackpressureSupervisor()
    other.register_worker("one", handler=one, task_types=["work"])
    with pytest.raises(InvalidHandler, match="contain itself"):
        one.register_worker("other", handler=other, task_types=["work"])


def test_a_worker_decorator_without_its_task_types() -> None:
    supervisor = BackpressureSupervisor()

    async def work(_: Task) -> None: ...

    with pytest.raises(InvalidSetting, match=r"@supervisor\.worker"):
        supervisor.worker(work)  # type: ignore[arg-type]


@virtual
async def test_a_slot_that_is_entered_twice_or_asked_outside_of_its_block() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=Agent(), task_types=["work"], max_concurrent=2)
        slot = supervisor.slot("work")
        with pytest.raises(SlotMisused, match="outside of its block"):
            _ = slot.worker
        async with slot:
            with pytest.raises(SlotMisused, match="twice"):
                await slot.__aenter__()


@virtual
async def test_a_worker_that_comes_while_the_supervisor_closes() -> None:
    async with make_supervisor() as supervisor:
        flood(supervisor, "work", 1)
        closing = asyncio.ensure_future(supervisor.close())
        await run_ready(1)
        with pytest.raises(SupervisorClosed, match="is closing"):
            supervisor.register_worker("w", handler=Agent(), task_types=["work"])
        await closing


@virtual
async def test_a_handler_that_returns_late_swallows_its_cancellation_or_raises_affects_no_other_task() -> None:
    async def handler(task: Task) -> Any:
        if task.payload == "raises":
            raise SystemExit
        while True:
            try:
                await asyncio.sleep(3.0 if task.payload == "late" else 30.0)
            except asyncio.CancelledError:
                if task.payload == "swallows":
                    continue
                raise
            return task.payload

    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        supervisor.register_worker("bad", handler=handler, task_types=["bad"], max_concurrent=3)
        supervisor.register_worker("good", handler=Agent(), task_types=["good"])
        bad = [
            supervisor.submit_nowait(Task("bad", payload, timeout=2.0)) for payload in ("raises", "late", "swallows")
        ]
        good = flood(supervisor, "good", 50)
        assert all([(await ticket).success for ticket in good])
        assert [(await ticket).status for ticket in bad] == [
            TaskStatus.FAILED,
            TaskStatus.TIMED_OUT,
            TaskStatus.TIMED_OUT,
        ]
    await run_ready()


def test_every_error_is_a_forebay_error() -> None:
    for kind in (InvalidTask, DeadlinePassed, InvalidTimeout, InvalidThreshold, DuplicateWorker, UnknownTaskType):
        assert issubclass(kind, ForebayError)
