"""A simulated LLM provider with capacity, rate limits, prices and faults; nothing here uses the product's decisions."""

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
    InvalidSimulatedCall,
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
    "Dialect",
    "Faults",
    "FirstToken",
    "InvalidProviderConfig",
    "InvalidSimulatedCall",
    "ProviderConfig",
    "ProviderModel",
    "ProviderProcess",
    "ProviderProcessFailed",
    "ProviderRefusal",
    "ProviderStatistics",
    "Quantiles",
    "RefusalReason",
    "SimulatedCall",
    "SimulatedProvider",
    "SimulatedRateLimit",
    "Slowdown",
    "TokenPrice",
    "TokensProduced",
    "Traffic",
    "Unit",
    "start_provider",
]
