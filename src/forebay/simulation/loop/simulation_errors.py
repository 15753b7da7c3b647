"""Errors of a simulation itself, as opposed to errors of the code that it runs."""

# ruff: noqa: D205, D415 - a docstring here is the message that a user reads
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay.errors import ForebayError

if TYPE_CHECKING:
    from forebay.simulation.loop.waiting_tasks import WaitingTask


@dataclass(frozen=True, slots=True, kw_only=True)
class UnhandledError:
    """An error that no code handled: asyncio would only have logged it."""

    at: float  # virtual seconds
    task: str  # name of the asyncio task; empty if no task raised it
    message: str
    exception: BaseException | None

    def __str__(self) -> str:
        """Return the time, the task and the error in one line."""
        task = f"{self.task}: " if self.task else ""
        return f"at {self.at:.6f} s: {task}{self.message}" + (f": {self.exception!r}" if self.exception else "")


class SimulationError(ForebayError):
    """The simulation could not continue."""


class Deadlock(SimulationError):
    """Deadlock at {now:.6f} s of virtual time (seed {seed}): no callback is ready and no timer is set, so none of the
    tasks below can continue. Find out which code should have woken them; the same seed repeats the run.{listing}
    """

    now: float
    seed: int
    waiting: tuple[WaitingTask, ...]


class SimulationBoundExceeded(SimulationError):
    """The simulation exceeded {bound} at {now:.6f} s of virtual time, after {steps} steps (seed {seed}). Raise the
    bound if the run only needs longer; otherwise one of the tasks below never ends.{listing}
    """

    bound: str
    now: float
    seed: int
    steps: int
    waiting: tuple[WaitingTask, ...]


class UnhandledErrors(SimulationError):
    """Unhandled errors: {count} (seed {seed}). Await the task that raised, or read its exception. If a test expects an
    error, remove it from the loop's `errors` before the simulation ends.{listing}
    """

    seed: int
    count: int
    errors: tuple[UnhandledError, ...]


class RealIO(SimulationError, NotImplementedError):
    """loop.{what}() needs real input or output, which a simulation does not have. Give the code under test a simulated
    provider or store; for blocking work that returns, use loop.run_in_executor, which a simulation runs inline.
    """

    what: str


class RealThread(SimulationError, RuntimeError):
    """loop.call_soon_threadsafe() was called from thread {thread!r}. Threads run in real time, which no seed controls:
    under a virtual loop, do the work in loop.run_in_executor, which a simulation runs inline.
    """

    thread: str


class JobStopped(SimulationError):
    """A job in run_in_executor raised {raised}. A future that carried it would stop the loop or the code that awaits
    it: raise an ordinary exception in the job.
    """

    raised: str


class VirtualLoopRequired(SimulationError, RuntimeError):
    """{what} needs a running virtual loop: start one with forebay.simulation.simulate(main, seed=...)."""

    what: str


class LoopAlreadyRunning(SimulationError, RuntimeError):
    """simulate() runs its own event loop and was called while another one was running: call it from a plain function. A
    test that uses it is a `def`, not an `async def`.
    """
