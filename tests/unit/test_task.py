"""Task: arguments of another supervisor or of an earlier Forebay give an error that says what to pass instead."""

from __future__ import annotations

import math
import pickle
from typing import Any

import msgspec
import pytest

from forebay import Overloaded, Priority, Task
from forebay.errors import InvalidTask


def test_a_task_is_made_with_two_positional_arguments_and_options() -> None:
    task = Task("research", {"topic": "rivers"}, task_id="1", thread_id="t", priority=Priority.HIGH)
    assert (task.task_type, task.payload, task.task_id, task.thread_id) == ("research", {"topic": "rivers"}, "1", "t")
    assert msgspec.structs.replace(task, payload=None) == Task(
        "research", task_id="1", thread_id="t", priority=Priority.HIGH
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": "t"}, "Task: thread is now thread_id"),
        ({"timeout_seconds": 30}, "Task: timeout_seconds is now timeout"),
        ({"deadline_seconds": 30}, r"Task has no deadline_seconds: pass deadline=Deadline\.within\(seconds\)"),
    ],
)
def test_an_old_name_gives_the_new_one(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}$"):
        Task("research", **options)


def test_a_third_positional_argument_is_explained() -> None:
    make: Any = Task
    with pytest.raises(TypeError, match=r'two positional arguments, task_type and payload.*task_id="1"'):
        make("1", "research", {})


def test_any_other_mistake_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="colour"):
        Task("research", colour="red")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="task_type"):
        Task()  # type: ignore[call-arg]


def test_priority_0_is_rejected_because_it_is_the_default_elsewhere() -> None:
    with pytest.raises(InvalidTask, match=r"priority is 0; .*Priority\.CRITICAL if you mean it.*NORMAL"):
        Task("research", priority=0)  # type: ignore[arg-type]
    assert Task("research", priority=3).priority is Priority.LOW  # type: ignore[arg-type]


def test_the_old_attribute_of_overloaded_gives_the_new_one() -> None:
    error = Overloaded("full", limited_by="pool:research")
    with pytest.raises(AttributeError, match="binding is now limited_by"):
        _ = error.binding
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = error.colour
    with pytest.raises(TypeError, match="binding is now limited_by"):
        Overloaded("full", binding="pool:research")  # type: ignore[call-arg]
    assert pickle.loads(pickle.dumps(error)).limited_by == "pool:research"  # noqa: S301 - our own bytes


@pytest.mark.parametrize(
    ("limited_by", "retry_after", "headers"),
    [
        (None, None, {}),
        ("pool:a", None, {"x-forebay-limited-by": "pool:a"}),
        ("pool:a", 0.0, {"retry-after": "0", "retry-after-ms": "0", "x-forebay-limited-by": "pool:a"}),
        (None, 1.2, {"retry-after": "2", "retry-after-ms": "1200"}),
        (None, 60, {"retry-after": "60", "retry-after-ms": "60000"}),
        (None, math.inf, {}),
        ("pool:ü\n", None, {"x-forebay-limited-by": "pool:\\xfc"}),
    ],
)
def test_a_rejection_as_headers(limited_by: str | None, retry_after: float | None, headers: dict[str, str]) -> None:
    assert Overloaded("full", limited_by=limited_by, retry_after=retry_after).headers() == headers


@pytest.mark.parametrize("field", ["task_type", "task_id", "key", "tenant", "thread_id"])
def test_the_texts_that_name_a_task_are_bounded(field: str) -> None:
    given: dict[str, Any] = {"task_type": "t", field: "x" * 1_024}
    assert getattr(Task(**given), field) == "x" * 1_024
    with pytest.raises(InvalidTask, match=f"Task {field} is 'x{{20}}...'; it must be at most 1,024.*not 1,025"):
        Task(**given | {field: "x" * 1_025})
