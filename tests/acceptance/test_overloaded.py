"""Overloaded: a rejection that no framework takes for a provider's."""

from __future__ import annotations

import math
import pickle

import pytest
from tests.support.task_plane import Agent, error_of, flood, virtual

import forebay.errors
from forebay import BackpressureSupervisor, ForebayError, Overloaded, Task, TaskCancelled, TaskExpired
from forebay.errors import TaskFailed, TaskTimedOut

FORBIDDEN = ("rate limit", "ratelimit", "rate_limit", "throttl", "too many requests", "429")


@virtual
async def refused() -> None:
    async with BackpressureSupervisor(max_queue_size=0) as supervisor:
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        await supervisor.run(Task("work"))
        flood(supervisor, "work", 1)
        error = await error_of(supervisor.run(Task("work")))
        assert isinstance(error, Overloaded)
        found.append(error)


found: list[Overloaded] = []


@pytest.fixture(scope="module")
def overloaded() -> Overloaded:
    refused()
    return found[-1]


def test_it_has_no_status_code(overloaded: Overloaded) -> None:
    for name in ("status_code", "status", "code", "http_status", "response"):
        assert not hasattr(overloaded, name)


def test_neither_its_message_nor_its_class_uses_a_word_that_a_framework_retries_on(overloaded: Overloaded) -> None:
    text = f"{overloaded} {overloaded!r} {Overloaded.__doc__} {type(overloaded).__mro__}".lower()
    assert [word for word in FORBIDDEN if word in text] == []


def test_its_message_says_what_is_full_and_when_to_come_back(overloaded: Overloaded) -> None:
    assert str(overloaded).startswith("Rejected: pool:work is at 100%, and NORMAL is rejected from 80%; come back in ")
    assert str(overloaded).endswith(" s. Nothing was started.")


@pytest.mark.parametrize(
    ("retry_after", "load", "hint"),
    [
        (7.0, 1.0, "; come back in 7 s"),
        (82.4816, 1.0, "; come back in 82.5 s"),
        (999.4, 1.0, "; come back in 16.7 min"),
        (999.9, 1.0, "; come back in 16.7 min"),
        (75_101.6, 1.0, "; come back in 20.9 h"),
        (None, 1.0, "; back off before you come back: it is not known when there will be room"),
        (None, math.inf, ""),
    ],
)
def test_its_message_gives_the_time_in_a_readable_unit(retry_after: float | None, load: float, hint: str) -> None:
    assert str(Overloaded("full", load=load, retry_after=retry_after)) == f"Rejected: full{hint}. Nothing was started."


def test_related_errors_do_not_look_like_a_providers_rejection_either() -> None:
    for kind in (Overloaded, TaskFailed, TaskCancelled, TaskTimedOut, TaskExpired):
        assert not hasattr(kind, "status_code")
        assert [word for word in FORBIDDEN if word in (kind.__doc__ or "").lower()] == []


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("full", limited_by="pool:work", load=1.0, retry_after=2.5),
        TaskFailed(task_id="t", worker_id="w", error="ValueError: x"),
        TaskExpired(task_id="t", worker_id=None, error="late"),
        forebay.errors.UnknownTaskType(task_type="x", known="y"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_pickling_whole(error: ForebayError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_every_error_of_forebay_is_a_forebay_error_with_a_message_in_its_docstring() -> None:
    kinds = [kind for kind in vars(forebay.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 20
    for kind in kinds:
        assert issubclass(kind, ForebayError)
        assert kind.__doc__
