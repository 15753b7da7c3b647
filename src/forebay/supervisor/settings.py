"""The settings of a supervisor, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from forebay._hooks import is_async
from forebay._validate import (
    check_choice,
    check_instance,
    check_not_negative,
    check_positive,
    check_whole,
    is_positive,
    reject,
)
from forebay.admission import PriorityThresholds
from forebay.events import Sink
from forebay.retry import RetryBudget
from forebay.supervisor.tenants import Tenant
from forebay.supervisor.tree.restart_policy import Strategy

_OWNER: Final = "BackpressureSupervisor"
MAX_LEASE: Final = 600.0  # seconds; so a lease that ends later was given before the wall clock was set back
MAX_STORE_SILENCE: Final = 10.0  # seconds for which draining, and then closing, wait for an overflow without an answer
MAX_RESTARTS: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorSettings:
    """The settings that ``BackpressureSupervisor`` describes.

    Raises:
        InvalidThreshold, InvalidSetting: one of them is invalid.
    """

    backpressure_threshold: float
    max_queue_size: int | None
    lease: float
    max_payload_bytes: int
    max_attempts: int
    result_retention: float
    retry_budget: RetryBudget
    keep_results: int
    keep_results_bytes: int
    zombie_grace: float
    lag_bound: float | None
    max_cost_wait: float
    tenants: Mapping[str, Tenant]
    strategy: str
    max_restarts: int
    within: float

    def __post_init__(self) -> None:
        PriorityThresholds(self.backpressure_threshold)
        check_instance(_OWNER, "retry_budget", self.retry_budget, RetryBudget, example="RetryBudget(share=0.1)")
        check_positive(_OWNER, "zombie_grace", self.zombie_grace, unit="seconds")
        if not is_positive(self.lease) or self.lease > MAX_LEASE:
            reject(_OWNER, "lease", self.lease, f"a positive number of seconds, at most {MAX_LEASE:.0f}")
        check_positive(_OWNER, "result_retention", self.result_retention, unit="seconds")
        check_not_negative(_OWNER, "max_cost_wait", self.max_cost_wait, unit="seconds", infinite=True)
        check_positive(_OWNER, "lag_bound", self.lag_bound, unit="seconds", none="to leave it unmeasured")
        check_whole(_OWNER, "max_queue_size", self.max_queue_size, minimum=0, none="for the default")
        for name, minimum in (
            ("max_payload_bytes", 1),
            ("max_attempts", 1),
            ("keep_results", 0),
            ("keep_results_bytes", 0),
        ):
            check_whole(_OWNER, name, getattr(self, name), minimum=minimum)
        check_whole(_OWNER, "max_restarts", self.max_restarts, minimum=0, maximum=MAX_RESTARTS)
        check_positive(_OWNER, "within", self.within, unit="seconds")
        check_choice(_OWNER, "strategy", self.strategy, [strategy.value for strategy in Strategy])

    @property
    def restart_strategy(self) -> Strategy:
        """The workers that are restarted together."""
        return Strategy(self.strategy)


def event_sinks(on_event: Sink | Sequence[Sink]) -> tuple[Sink, ...]:
    """Return the sinks that were given, one or several.

    Raises:
        InvalidSetting: `on_event` is neither a plain callable nor a sequence of them.
    """
    sinks = (on_event,) if callable(on_event) else tuple(on_event) if isinstance(on_event, Sequence) else (on_event,)
    if not all(map(callable, sinks)):
        expected = "a callable that takes an Event, or a list of such callables"
        reject(_OWNER, "on_event", on_event, expected)
    if any(map(is_async, sinks)):
        expected = "a plain function: a sink is called, not awaited. `async for event in supervisor.events()` may await"
        reject(_OWNER, "on_event", "an async function", expected)
    return sinks
