"""An asyncio event loop in virtual time: hours pass in milliseconds, and one seed always gives the same run."""

from forebay.simulation.loop.simulate import Simulation, simulate
from forebay.simulation.loop.simulation_errors import (
    Deadlock,
    JobStopped,
    LoopAlreadyRunning,
    RealIO,
    RealThread,
    SimulationBoundExceeded,
    SimulationError,
    UnhandledError,
    UnhandledErrors,
    VirtualLoopRequired,
)
from forebay.simulation.loop.virtual_loop import VirtualLoop, virtual_loop
from forebay.simulation.loop.waiting_tasks import WaitingTask

__all__ = [
    "Deadlock",
    "JobStopped",
    "LoopAlreadyRunning",
    "RealIO",
    "RealThread",
    "Simulation",
    "SimulationBoundExceeded",
    "SimulationError",
    "UnhandledError",
    "UnhandledErrors",
    "VirtualLoop",
    "VirtualLoopRequired",
    "WaitingTask",
    "simulate",
    "virtual_loop",
]
