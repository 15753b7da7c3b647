"""What can go wrong with a simulation itself, as opposed to what is simulated."""

# ruff: noqa: D205, D415 - a docstring here is the message that a user reads
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay.errors import ForebayError

if TYPE_CHECKING:
    from forebay.simulation.loop.waiting_tasks import WaitingTask


@dataclass(frozen=True, slots=True, kw_only=True)
class UnhandledError:
    """An error that reached nobody: what asyncio would have logged and forgotten."""

    at: float  # virtual seconds
    task: str  # the task's name; empty if it was none
    message: str
    exception: BaseException | None

    def __str__(self) -> str:
        """Say who lost what, and when."""
        who = f"{self.task}: " if self.task else ""
        return f"at {self.at:.6f} s: {who}{self.message}" + (f": {self.exception!r}" if self.exception else "")


class SimulationError(ForebayError):
    """A simulation could not go on."""


class Deadlock(SimulationError):
    """Deadlock at {now:.6f} s of virtual time (seed {seed}): nothing is ready and no timer is set, so none of these can
    ever go on. Find who should have woken them; the same seed gives the same run.{listing}
    """

    now: float
    seed: int
    waiting: tuple[WaitingTask, ...]


class SimulationBoundExceeded(SimulationError):
    """The simulation passed {bound} at {now:.6f} s of virtual time, after {steps} steps (seed {seed}): raise the bound
    if it only needs longer; otherwise one of these does not end.{listing}
    """

    bound: str
    now: float
    seed: int
    steps: int
    waiting: tuple[WaitingTask, ...]


class UnhandledErrors(SimulationError):
    """Errors that reached nobody: {count} (seed {seed}). Await what raised, or look at its exception; one that a test
    expects is to be taken out of the loop's `errors` before the end.{listing}
    """

    seed: int
    count: int
    errors: tuple[UnhandledError, ...]


class RealIO(SimulationError, NotImplementedError):
    """loop.{what}() reaches outside, and a simulation has no outside: hand the code under test a simulated provider or
    store, or, for work that blocks and returns, go through loop.run_in_executor, which runs it in line.
    """

    what: str


class RealThread(SimulationError, RuntimeError):
    """loop.call_soon_threadsafe() was called from thread {thread!r}, but threads keep real time and no seed: under a
    virtual loop, hand what the thread does to loop.run_in_executor, which runs it in line.
    """

    thread: str


class JobStopped(SimulationError):
    """A job in run_in_executor raised {raised}, which no future can carry without stopping the loop or its reader: the
    job should raise an ordinary exception.
    """

    raised: str


class VirtualLoopRequired(SimulationError, RuntimeError):
    """{what} needs to run under a virtual loop: start it with forebay.simulation.simulate(main, seed=...)."""

    what: str


class LoopAlreadyRunning(SimulationError, RuntimeError):
    """simulate() runs a loop of its own and was called from inside another one: call it from a plain function; a test
    that uses it is a `def`, not an `async def`.
    """
