"""Tools for tests of agents: virtual time, a simulated provider, handler doubles, overload, event records, leak checks.

They work with any test framework; the pytest plugin offers the same as fixtures.
"""

from forebay.simulation import Simulation, simulate, start_provider
from forebay.testing.event_record import EventRecord
from forebay.testing.handler_doubles import (
    BlockingHandler,
    FlakyHandler,
    HandlerDouble,
    HangingHandler,
    HeldHandler,
    ProgressHandler,
    ScriptedHandler,
    ScriptExhausted,
    SlowHandler,
    UncancellableHandler,
)
from forebay.testing.leaks import LeakFound, no_leaks
from forebay.testing.overload import RefusedTasks, overload
from forebay.testing.passthrough import PassthroughSupervisor
from forebay.testing.provider_double import ProviderDouble
from forebay.testing.virtual_time import now, run_ready, virtual

__all__ = [
    "BlockingHandler",
    "EventRecord",
    "FlakyHandler",
    "HandlerDouble",
    "HangingHandler",
    "HeldHandler",
    "LeakFound",
    "PassthroughSupervisor",
    "ProgressHandler",
    "ProviderDouble",
    "RefusedTasks",
    "ScriptExhausted",
    "ScriptedHandler",
    "Simulation",
    "SlowHandler",
    "UncancellableHandler",
    "no_leaks",
    "now",
    "overload",
    "run_ready",
    "simulate",
    "start_provider",
    "virtual",
]
