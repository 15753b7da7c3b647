"""For tests of agents: virtual time, a simulated provider, handlers that do as told, overload to order, checkers.

What pytest offers as fixtures is made of these, and they work without it. What a simulated provider is like is told in
the words of `forebay.sim`.
"""

from forebay.sim import Simulation, simulate, start_plant
from forebay.testing.handlers import (
    PAYLOAD,
    Blocking,
    Double,
    Flaky,
    Hangs,
    Held,
    Reporting,
    Scripted,
    ScriptEnded,
    Slow,
    Stubborn,
)
from forebay.testing.leaks import no_leaks
from forebay.testing.overload import Refused, overload
from forebay.testing.passthrough import Passthrough
from forebay.testing.promises import (
    BrokenPromise,
    check_counts,
    check_endings,
    check_leftovers,
    check_limits,
    check_priorities,
    check_promises,
    check_spills,
)
from forebay.testing.provider import QUICK, PlantNotInstalled, ProviderDouble
from forebay.testing.record import Excess, Record
from forebay.testing.upstreams import check_upstream
from forebay.testing.virtual import now, turns, virtual

__all__ = [
    "PAYLOAD",
    "QUICK",
    "Blocking",
    "BrokenPromise",
    "Double",
    "Excess",
    "Flaky",
    "Hangs",
    "Held",
    "Passthrough",
    "PlantNotInstalled",
    "ProviderDouble",
    "Record",
    "Refused",
    "Reporting",
    "ScriptEnded",
    "Scripted",
    "Simulation",
    "Slow",
    "Stubborn",
    "check_counts",
    "check_endings",
    "check_leftovers",
    "check_limits",
    "check_priorities",
    "check_promises",
    "check_spills",
    "check_upstream",
    "no_leaks",
    "now",
    "overload",
    "simulate",
    "start_plant",
    "turns",
    "virtual",
]
