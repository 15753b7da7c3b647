"""The simulation: an event loop in virtual time and the plant that it drives; nothing here decides for the product."""

from forebay.sim.calls import Accepted, Call, Cut, Event, Finished, FirstToken, Progress, Refused
from forebay.sim.config import (
    PRICES,
    Acceleration,
    Allowance,
    Bursts,
    Busy,
    Dialect,
    Faults,
    InvalidProvider,
    Price,
    ProviderConfig,
    Slow,
    Step,
    Unit,
)
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
from forebay.sim.faults import Reason
from forebay.sim.ledger import Bill, Statistics, Usage
from forebay.sim.loop import VirtualLoop, virtual_loop
from forebay.sim.process import PlantFailed, RunningPlant, start_plant
from forebay.sim.provider import Provider
from forebay.sim.run import Simulation, simulate
from forebay.sim.traffic import Quantiles, Traffic
from forebay.sim.virtual import Answer, Broken, Completion, Refusal, SimulatedProvider
from forebay.sim.waiting import Waiting

__all__ = [
    "PRICES",
    "Acceleration",
    "Accepted",
    "Allowance",
    "AlreadyRunning",
    "Answer",
    "Bill",
    "Broken",
    "Bursts",
    "Busy",
    "Call",
    "Completion",
    "Cut",
    "Deadlock",
    "Dialect",
    "Endless",
    "Event",
    "Faults",
    "Finished",
    "FirstToken",
    "InvalidProvider",
    "JobStopped",
    "Lost",
    "NotVirtual",
    "PlantFailed",
    "Price",
    "Progress",
    "Provider",
    "ProviderConfig",
    "Quantiles",
    "RealIO",
    "RealThread",
    "Reason",
    "Refusal",
    "Refused",
    "RunningPlant",
    "SimulatedProvider",
    "Simulation",
    "SimulationError",
    "Slow",
    "Statistics",
    "Step",
    "Traffic",
    "Unhandled",
    "Unit",
    "Usage",
    "VirtualLoop",
    "Waiting",
    "simulate",
    "start_plant",
    "virtual_loop",
]
