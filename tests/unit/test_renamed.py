"""Old names of arguments: the error gives the new name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest

from forebay import BackpressureSupervisor, Budget, Fallback, Overloaded, Retry, Task, Upstream
from forebay._renamed import renamed_arguments
from forebay.breaker import BreakerRules


@renamed_arguments(old="new", gone="pass other= twice")
@dataclass(frozen=True)
class Thing:
    """A thing whose arguments were renamed."""

    new: int = 0


@renamed_arguments(old="new")
def function(*, new: int = 0) -> int:
    """Return `new`."""
    return new


def test_an_old_name_gives_the_new_one() -> None:
    with pytest.raises(TypeError, match=r"^Thing: old is now new$"):
        Thing(old=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^Thing has no gone: pass other= twice$"):
        Thing(gone=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^function: old is now new$"):
        function(old=1)  # type: ignore[call-arg]


def test_new_names_work() -> None:
    assert Thing(new=1) == Thing(1)
    assert function(new=2) == 2


# --- the public names that have changed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (partial(Task, "research"), "thread", "thread_id"),
        (partial(Overloaded, "full"), "binding", "limited_by"),
        (partial(Upstream, "openai"), "longest_wait", "max_wait"),
        (partial(Upstream, "openai"), "start_wait", "max_start_wait"),
        (partial(Fallback, "gpt-4o-mini"), "of", "models"),
        (partial(Fallback, "gpt-4o-mini"), "when", "load_threshold"),
        (partial(Budget, usd=25), "reserve", "reserved_share"),
        (Retry, "ceiling", "max_delay"),
        (BreakerRules, "cool_off", "reset_timeout"),
        (BreakerRules, "ceiling", "max_reset_timeout"),
        (partial(BackpressureSupervisor().register_worker, "w", task_types=["t"]), "cool_off", "reset_timeout"),
        (partial(BackpressureSupervisor().slot, "t"), "thread", "thread_id"),
    ],
)
def test_every_public_name_that_changed_is_explained(make: Callable[..., object], old: str, new: str) -> None:
    with pytest.raises(TypeError, match=rf"^[\w.]+: {old} is now {new}$"):
        make(**{old: 1})


async def test_the_old_attribute_of_a_ticket_gives_the_new_one() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("w", handler=lambda task: task.payload, task_types=["t"])
        ticket = await supervisor.submit(Task("t"))
        with pytest.raises(AttributeError, match=r"^Ticket: binding is now limited_by$"):
            _ = ticket.binding
        assert not hasattr(ticket, "binding")
        assert "binding" not in dir(ticket)
