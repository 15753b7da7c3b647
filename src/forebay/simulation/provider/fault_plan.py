"""What fate has in store for an arriving call, drawn from the seed."""

from __future__ import annotations

import enum
import math
import random
from dataclasses import dataclass

from forebay.simulation.provider.provider_config import Bursts, Faults


class RefusalReason(enum.StrEnum):
    """Why a call was refused."""

    REQUESTS = "requests"  # an allowance is used up
    TOKENS = "tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    TOO_LARGE = "too_large"  # it asks for more than an allowance ever holds
    ACCELERATION = "acceleration"  # use grows too fast
    SPEND_CAP = "spend_cap"  # the money is used up
    CONCURRENCY = "concurrency"  # too many in flight: the account's limit
    OVERLOADED = "overloaded"  # too many in flight: the provider's capacity, an outage, or a burst
    STRAY = "stray"  # no reason at all
    ERROR = "error"
    BAD_GATEWAY = "bad_gateway"
    UNAVAILABLE = "unavailable"
    UNKNOWN_MODEL = "unknown_model"


@dataclass(frozen=True, slots=True)
class CallFaults:
    """What will happen to a call, load aside."""

    refusal: RefusalReason | None = None
    cut_after: float | None = None  # after this share of its output
    reported: bool = False  # the cut is told as an error; else the connection drops
    slowdown: float = 1.0  # its times are so much longer


class FaultPlan:
    """Draws a fate for each arrival. Every arrival costs the same draws, so one fault more moves no other."""

    def __init__(self, faults: Faults, seed: str) -> None:
        self._faults = faults
        self._random = random.Random(seed)
        self._bursts = _BurstSchedule(faults.bursts, random.Random(f"{seed}/bursts")) if faults.bursts else None

    def draw(self, now: float) -> CallFaults:
        """The fate of a call that arrives at `now`."""
        refusal, burst, ending, share, straggles = (self._random.random() for _ in range(5))
        faults = self._faults
        if self._bursts is not None and self._bursts.is_active(now) and burst < self._bursts.share:
            return CallFaults(refusal=RefusalReason.OVERLOADED)
        for chance, reason in (
            (faults.stray, RefusalReason.STRAY),
            (faults.error, RefusalReason.ERROR),
            (faults.bad_gateway, RefusalReason.BAD_GATEWAY),
            (faults.unavailable, RefusalReason.UNAVAILABLE),
        ):
            if refusal < chance:
                return CallFaults(refusal=reason)
            refusal -= chance
        factor = faults.straggler_factor if straggles < faults.straggler else 1.0
        if ending < faults.cut + faults.late_error:
            return CallFaults(cut_after=share, reported=ending >= faults.cut, slowdown=factor)
        return CallFaults(slowdown=factor)


class _BurstSchedule:
    """When bursts begin and end; time only goes forward."""

    def __init__(self, bursts: Bursts, rng: random.Random) -> None:
        self.share = bursts.share
        self._bursts = bursts
        self._random = rng
        self._begins = -math.inf
        self._next = self._gap(0.0)

    def is_active(self, now: float) -> bool:
        while now >= self._next:
            self._begins = self._next
            self._next = self._begins + self._gap(self._begins)
        return now < self._begins + self._bursts.seconds

    def _gap(self, begins: float) -> float:
        every, seconds = self._bursts.every, self._bursts.seconds
        if self._bursts.regular:
            return every
        quiet = self._random.expovariate(1.0 / (every - seconds))
        return quiet if begins == 0.0 else seconds + quiet
