"""The simulation: an event loop in virtual time and the plant that it drives; nothing here decides for the product."""

from forebay.sim.errors import (
    AlreadyRunning,
    Deadlock,
    Endless,
    JobStopped,
    Lost,
    NotVirtual,
    RealIO,
    RealThread,
    SimulationError,
    Unhandled,
)
from forebay.sim.loop import VirtualLoop, virtual_loop
from forebay.sim.run import simulate
from forebay.sim.waiting import Waiting

__all__ = [
    "AlreadyRunning",
    "Deadlock",
    "Endless",
    "JobStopped",
    "Lost",
    "NotVirtual",
    "RealIO",
    "RealThread",
    "SimulationError",
    "Unhandled",
    "VirtualLoop",
    "Waiting",
    "simulate",
    "virtual_loop",
]
