"""Fixtures and settings of all tests: hypothesis profiles, and a check for calls that block the event loop."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import HealthCheck, Phase, settings

# New examples for developers, the same ones in CI, few in the inner loop. A failure prints how to repeat its example.
settings.register_profile("explore", print_blob=True, deadline=None)
settings.register_profile(
    "ci", derandomize=True, print_blob=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", settings.get_profile("explore"), max_examples=15)
# For mutants: it is enough to find one failure, and the same one each time.
_FIND = (Phase.explicit, Phase.generate)
settings.register_profile("mutation", settings.get_profile("ci"), phases=_FIND, max_examples=40, database=None)
settings.load_profile("ci" if "CI" in os.environ else "explore")

# A shell's background job ignores SIGINT, and what nohup starts SIGHUP: the programs of tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_report_header() -> str:
    return f"hypothesis profile: {settings.get_current_profile_name()}"


def pytest_collection_finish() -> None:
    """Let garbage collections pass over the modules and tests that there are: to visit them takes 0.4 s each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def blockbuster(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """Fail tests that block a running event loop with Forebay on the stack; threads of its executors may block.

    A test that blocks on purpose is marked ``blocks``.
    """
    if request.node.get_closest_marker("blocks"):
        yield None
        return
    with blockbuster_ctx("forebay") as watch:
        for function in watch.functions.values():
            # An import reads files: allow it, because an optional library is imported on first use.
            function.can_block_in("<frozen importlib._bootstrap>", "_find_and_load")
            # A factory is called once on registration, and a framework may run a loop of its own in an agent's thread.
            function.can_block_in("forebay/adapters/factory.py", "handler_from_factory")
            function.can_block_in("forebay/adapters/agent_thread.py", "_outcome")
        yield watch
