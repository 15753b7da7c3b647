"""The settings of a supervisor, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from forebay.admission import PriorityThresholds
from forebay.errors import InvalidSetting
from forebay.events import Sink


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
    keep_results: int
    zombie_grace: float
    lag_bound: float | None

    def __post_init__(self) -> None:
        PriorityThresholds(self.backpressure_threshold)
        for name in ("lease", "zombie_grace", "lag_bound"):
            value = getattr(self, name)
            if value is None and name == "lag_bound":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                self._reject(name, "a positive number of seconds")
        for name, least in (("max_queue_size", 0), ("max_payload_bytes", 1), ("max_attempts", 1), ("keep_results", 0)):
            value = getattr(self, name)
            if value is None and name == "max_queue_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                self._reject(name, f"a whole number of at least {least}")

    def _reject(self, name: str, expected: str) -> None:
        raise InvalidSetting(owner="BackpressureSupervisor", name=name, value=getattr(self, name), expected=expected)


def event_sinks(on_event: Sink | Sequence[Sink]) -> tuple[Sink, ...]:
    """Return the sinks that were given, one or several.

    Raises:
        InvalidSetting: `on_event` is neither a callable nor a sequence of them.
    """
    sinks = (on_event,) if callable(on_event) else tuple(on_event) if isinstance(on_event, Sequence) else (on_event,)
    if not all(map(callable, sinks)):
        expected = "a callable that takes an Event, or a list of such callables"
        raise InvalidSetting(owner="BackpressureSupervisor", name="on_event", value=on_event, expected=expected)
    return sinks
