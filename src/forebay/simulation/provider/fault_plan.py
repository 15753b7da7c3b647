"""The faults of each arriving call, drawn from the seed."""

from __future__ import annotations

import enum
import math
import random
from dataclasses import dataclass

from forebay.simulation.provider.provider_config import Bursts, Faults


class RefusalReason(enum.StrEnum):
    """The reason for which a call was refused."""

    REQUESTS = "requests"  # a rate limit is used up
    TOKENS = "tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    TOO_LARGE = "too_large"  # the call needs more than a rate limit ever grants
    ACCELERATION = "acceleration"  # usage grows too fast
    PENALTY = "penalty"  # a call was refused by a limit a short time ago
    SPEND_CAP = "spend_cap"  # the account's money is spent
    CONCURRENCY = "concurrency"  # too many calls in flight: the account's limit
    OVERLOADED = "overloaded"  # too many calls in flight for the provider, an outage, or a burst
    STRAY = "stray"  # no cause
    ERROR = "error"
    BAD_GATEWAY = "bad_gateway"
    UNAVAILABLE = "unavailable"
    UNKNOWN_MODEL = "unknown_model"


@dataclass(frozen=True, slots=True)
class CallFaults:
    """The faults of one call; load plays no part in them."""

    refusal: RefusalReason | None = None
    cut_after: float | None = None  # share of the output after which the answer is cut
    reported: bool = False  # the cut is reported as an error; otherwise the connection drops
    slowdown: float = 1.0  # factor on the call's times


class FaultPlan:
    """The faults that a provider draws for its calls.

    Every arrival takes the same number of draws, so that enabling one fault does not change the others.
    """

    def __init__(self, faults: Faults, seed: str) -> None:
        self._faults = faults
        self._random = random.Random(seed)
        self._bursts = _BurstSchedule(faults.bursts, random.Random(f"{seed}/bursts")) if faults.bursts else None

    def draw(self, now: float) -> CallFaults:
        """Draw the faults of a call that arrives at `now`."""
        refusal, burst, ending, share, straggler = (self._random.random() for _ in range(5))
        faults = self._faults
        if self._bursts is not None and self._bursts.is_active(now) and burst < self._bursts.share:
            return CallFaults(refusal=RefusalReason.OVERLOADED)
        for probability, reason in (
            (faults.stray, RefusalReason.STRAY),
            (faults.error, RefusalReason.ERROR),
            (faults.bad_gateway, RefusalReason.BAD_GATEWAY),
            (faults.unavailable, RefusalReason.UNAVAILABLE),
        ):
            if refusal < probability:
                return CallFaults(refusal=reason)
            refusal -= probability
        slowdown = faults.straggler_factor if straggler < faults.straggler else 1.0
        if ending < faults.cut + faults.late_error:
            return CallFaults(cut_after=share, reported=ending >= faults.cut, slowdown=slowdown)
        return CallFaults(slowdown=slowdown)


class _BurstSchedule:
    """The start times of bursts; `now` never goes backwards."""

    def __init__(self, bursts: Bursts, rng: random.Random) -> None:
        self.share = bursts.share
        self._bursts = bursts
        self._random = rng
        self._start = -math.inf
        self._next_start = self._gap_after(0.0)

    def is_active(self, now: float) -> bool:
        while now >= self._next_start:
            self._start = self._next_start
            self._next_start = self._start + self._gap_after(self._start)
        return now < self._start + self._bursts.seconds

    def _gap_after(self, start: float) -> float:
        every, seconds = self._bursts.every, self._bursts.seconds
        if self._bursts.regular:
            return every
        quiet = self._random.expovariate(1.0 / (every - seconds))
        return quiet if start == 0.0 else seconds + quiet
