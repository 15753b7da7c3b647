"""For tests of agents: virtual time, a simulated provider, handlers that do as told, overload to order, checkers.

What pytest offers as fixtures is made of these, and they work without it. What a simulated provider is like is told in
the words of `forebay.simulation`.
"""

from forebay.simulation import Simulation, simulate, start_provider
from forebay.testing.event_record import EventRecord, LimitExcess
from forebay.testing.handler_doubles import (
    PAYLOAD,
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
from forebay.testing.leaks import no_leaks
from forebay.testing.overload import RefusedTasks, overload
from forebay.testing.passthrough import PassthroughSupervisor
from forebay.testing.promises import (
    BrokenPromise,
    check_counts,
    check_limits,
    check_nothing_left,
    check_priorities,
    check_promises,
    check_spills,
    check_task_ends,
)
from forebay.testing.provider_double import FAST_PROVIDER, ProviderDouble, SimulatedProviderNotInstalled
from forebay.testing.upstreams import check_upstream
from forebay.testing.virtual_time import now, run_ready, virtual

__all__ = [
    "FAST_PROVIDER",
    "PAYLOAD",
    "BlockingHandler",
    "BrokenPromise",
    "EventRecord",
    "FlakyHandler",
    "HandlerDouble",
    "HangingHandler",
    "HeldHandler",
    "LimitExcess",
    "PassthroughSupervisor",
    "ProgressHandler",
    "ProviderDouble",
    "RefusedTasks",
    "ScriptExhausted",
    "ScriptedHandler",
    "SimulatedProviderNotInstalled",
    "Simulation",
    "SlowHandler",
    "UncancellableHandler",
    "check_counts",
    "check_limits",
    "check_nothing_left",
    "check_priorities",
    "check_promises",
    "check_spills",
    "check_task_ends",
    "check_upstream",
    "no_leaks",
    "now",
    "overload",
    "run_ready",
    "simulate",
    "start_provider",
    "virtual",
]
