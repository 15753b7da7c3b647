"""Triggers: the rules by which recent faults open a circuit breaker."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from forebay._validate import check_share, check_whole, is_whole, reject
from forebay.breaker.fault_window import FaultWindow

_Z = 1.96  # standard deviations: 95 %, two-sided


class Trigger(Protocol):
    """A rule that opens a breaker. It is asked only after a fault, so a success must never be what makes it true."""

    @property
    def seconds(self) -> int:
        """The seconds that it looks back; 0 for none."""

    @property
    def calls(self) -> int:
        """The calls that it looks back; 0 for none."""

    def should_open(self, window: FaultWindow) -> bool:
        """Return whether the faults in the window are enough to open the breaker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimumSampleTrigger:
    """A trigger for few calls: it opens if chance does not explain the share of faults among the recent ones.

    There must be `min_calls` and `min_faults` in the last `seconds`, and the lower Wilson bound (95 %) of the share of
    faults must be above `share`. So 5 of 5 opens, and 4 of 31 too; 1 of 20 does not, nor does 4 of 32.

    The window is a minute because agents make few and slow calls: with four calls a minute, a window of ten seconds
    would never hold five. It also opens less often without cause: with 3 % faults and two calls a second 0.5 times an
    hour instead of 4. A busy dependency loses nothing where another trigger looks at the last calls, however recent.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.

    Attributes:
        min_calls: calls in the window, at least.
        min_faults: faults in the window, at least.
        share: the share of faults that counts as normal, from 0 up to but not including 1.
        seconds: length of the window.
        calls: not used by this trigger; 0.

    Raises:
        InvalidSetting: a setting is invalid; the message names it.
    """

    min_calls: int = 5
    min_faults: int = 4
    share: float = 0.05
    seconds: int = 60
    calls: int = 0

    def __post_init__(self) -> None:
        for name in ("min_calls", "min_faults", "seconds"):
            check_whole("MinimumSampleTrigger", name, getattr(self, name))
        check_share("MinimumSampleTrigger", "share", self.share, example=0.05)

    def should_open(self, window: FaultWindow) -> bool:
        """Return whether chance does not explain the recent faults."""
        calls, faults = window.recent()
        enough = calls >= self.min_calls and faults >= self.min_faults
        return enough and wilson_lower_bound(faults, calls) > self.share


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultCountTrigger:
    """A trigger that opens when at least `faults` of the last `calls` calls were faults, however long ago.

    20 of 25 finds an outage within 20 calls, and 50 of 1,000 a share of 6 % within about 800. `n` of `n` is `n` in a
    row.

    Attributes:
        faults: from 1 to `calls`.
        calls: how many calls it looks back.
        seconds: not used by this trigger; 0.

    Raises:
        InvalidSetting: a setting is invalid; the message names it.
    """

    faults: int
    calls: int
    seconds: int = 0

    def __post_init__(self) -> None:
        check_whole("FaultCountTrigger", "calls", self.calls)
        if not is_whole(self.faults) or self.faults > self.calls:
            reject("FaultCountTrigger", "faults", self.faults, f"a whole number from 1 to calls, which is {self.calls}")

    def should_open(self, window: FaultWindow) -> bool:
        """Return whether enough of the last calls were faults."""
        return window.faults_among(self.calls) >= self.faults


def consecutive_faults(faults: int = 5) -> FaultCountTrigger:
    """Return the trigger that opens after this many faults in a row.

    Raises:
        InvalidSetting: `faults` is not a whole number of at least 1.
    """
    return FaultCountTrigger(faults=faults, calls=faults)


def wilson_lower_bound(faults: int, calls: int) -> float:
    """Return the lower end of the 95 % Wilson score interval of the share of `faults` in `calls`."""
    share = faults / calls
    square = _Z * _Z / calls
    middle = share + square / 2
    reach = math.sqrt(square * (share * (1 - share) + square / 4))
    return (middle - reach) / (1 + square)
