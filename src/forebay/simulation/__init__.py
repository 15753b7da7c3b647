"""The simulation: an event loop in virtual time and the plant that it drives; nothing here decides for the product."""

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
from forebay.simulation.provider.billing import Bill, BilledUsage, ProviderStatistics
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import (
    PRICES,
    AccelerationLimit,
    Bursts,
    BusyReason,
    CapacityStep,
    Dialect,
    Faults,
    InvalidProviderConfig,
    ProviderConfig,
    SimulatedRateLimit,
    Slowdown,
    TokenPrice,
    Unit,
)
from forebay.simulation.provider.provider_model import ProviderModel
from forebay.simulation.provider.provider_process import ProviderProcess, ProviderProcessFailed, start_provider
from forebay.simulation.provider.simulated_call import (
    CallAccepted,
    CallCompleted,
    CallCut,
    CallEvent,
    CallRefused,
    FirstToken,
    SimulatedCall,
    TokensProduced,
)
from forebay.simulation.provider.simulated_provider import (
    AnswerCut,
    CallStream,
    CompletedCall,
    ProviderRefusal,
    SimulatedProvider,
)
from forebay.simulation.provider.traffic import Quantiles, Traffic

__all__ = [
    "PRICES",
    "AccelerationLimit",
    "AnswerCut",
    "Bill",
    "BilledUsage",
    "Bursts",
    "BusyReason",
    "CallAccepted",
    "CallCompleted",
    "CallCut",
    "CallEvent",
    "CallRefused",
    "CallStream",
    "CapacityStep",
    "CompletedCall",
    "Deadlock",
    "Dialect",
    "Faults",
    "FirstToken",
    "InvalidProviderConfig",
    "JobStopped",
    "LoopAlreadyRunning",
    "ProviderConfig",
    "ProviderModel",
    "ProviderProcess",
    "ProviderProcessFailed",
    "ProviderRefusal",
    "ProviderStatistics",
    "Quantiles",
    "RealIO",
    "RealThread",
    "RefusalReason",
    "SimulatedCall",
    "SimulatedProvider",
    "SimulatedRateLimit",
    "Simulation",
    "SimulationBoundExceeded",
    "SimulationError",
    "Slowdown",
    "TokenPrice",
    "TokensProduced",
    "Traffic",
    "UnhandledError",
    "UnhandledErrors",
    "Unit",
    "VirtualLoop",
    "VirtualLoopRequired",
    "WaitingTask",
    "simulate",
    "start_provider",
    "virtual_loop",
]
