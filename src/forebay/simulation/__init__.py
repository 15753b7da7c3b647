"""Simulation: an asyncio event loop in virtual time, and an LLM provider with limits and faults.

Neither half imports the product's decisions, so that one bug cannot hide in both. The names below are those that tests
usually need; `forebay.simulation.loop` and `forebay.simulation.provider` export the others.
"""

from forebay.simulation.loop import Deadlock, Simulation, VirtualLoop, simulate, virtual_loop
from forebay.simulation.provider import (
    AnswerCut,
    Bursts,
    CapacityStep,
    Faults,
    ProviderConfig,
    ProviderProcess,
    ProviderRefusal,
    SimulatedProvider,
    SimulatedRateLimit,
    Slowdown,
    Traffic,
    Unit,
    start_provider,
)

__all__ = [
    "AnswerCut",
    "Bursts",
    "CapacityStep",
    "Deadlock",
    "Faults",
    "ProviderConfig",
    "ProviderProcess",
    "ProviderRefusal",
    "SimulatedProvider",
    "SimulatedRateLimit",
    "Simulation",
    "Slowdown",
    "Traffic",
    "Unit",
    "VirtualLoop",
    "simulate",
    "start_provider",
    "virtual_loop",
]
