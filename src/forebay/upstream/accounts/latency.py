"""The durations of calls: latency by output tokens, time in a slot, and whether a call can still end in time."""

from __future__ import annotations

import math
from typing import Final

from forebay.admission import EstimateBypass, ServiceTimes
from forebay.interfaces import Outcome
from forebay.upstream.call_request import CallOutcome, CallRequest

_DECAY: Final = 0.98  # weight of the calls before, at each new call
_MIN_CALLS: Final = 6  # before the model gives an estimate
_FIRST_CALLS: Final = 12  # that teach at any load
_MIN_LATENCY: Final = 1e-3  # seconds

_GAIN: Final = 0.05  # weight of the newest call in a mean
_GUESS: Final = 1.0  # seconds that a call is taken to last before the first has ended
_SAMPLES: Final = 60  # calls
_WAIT_SHARE: Final = 0.5  # of the time to a call's deadline: how long it may be expected to wait at most
_CERTAIN_WAIT_SHARE: Final = 0.8  # ... where the wait is known well
_LATE_SHARE: Final = 0.25  # of that time: with less left, a call is sent only if it is expected to end in time


class LatencyModel:
    """Expected latency of a call: ``ttft + output_tokens * tpot``, by least squares with exponential forgetting.

    `ttft` is the time to the first token and `tpot` the time for each further one, in seconds. After a dozen calls only
    calls under light load are learned from: otherwise the slowdown that our own load causes would, little by little,
    pass for normal. Its error matters little, since slowdowns are compared with each other. So it is not reset when
    it proves wrong: slowdowns after a reset could not be compared with those before.
    """

    __slots__ = ("_count", "_n", "_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self._count = 0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        """Add one success: its output tokens and its latency in seconds."""
        self._count += 1
        self._n = _DECAY * self._n + 1.0
        self._x = _DECAY * self._x + tokens
        self._y = _DECAY * self._y + seconds
        self._xx = _DECAY * self._xx + tokens * tokens
        self._xy = _DECAY * self._xy + tokens * seconds

    def expected(self, tokens: int) -> float | None:
        """Return the seconds that a call with `tokens` output tokens takes; None while too few calls are known."""
        if self._count < _MIN_CALLS:
            return None
        spread = self._n * self._xx - self._x * self._x
        mean = self._y / self._n
        tpot = (self._n * self._xy - self._x * self._y) / spread if spread > 1e-9 * self._n * self._n else 0.0
        tpot = max(0.0, tpot)
        ttft = (self._y - tpot * self._x) / self._n
        if ttft < 0.0:  # a line through the origin fits better than one that begins before the call does
            ttft, tpot = 0.0, self._y / self._x if self._x else 0.0
        expected = ttft + tokens * tpot
        return max(expected, _MIN_LATENCY, 0.05 * mean)

    def observe(self, tokens: int, seconds: float, *, light: bool) -> float | None:
        """Take one success into account, and return its slowdown: its latency over the expected one, or None.

        Args:
            tokens: its output tokens.
            seconds: its latency.
            light: the load was too light to slow it down.
        """
        expected = self.expected(tokens)
        slowdown = None if expected is None else seconds / expected
        if light or self._count < _FIRST_CALLS:
            self.learn(tokens, seconds)
        return slowdown


class CallDurations:
    """The times that calls take and hold their slots, learned from calls that have ended. Times are seconds.

    There are two means, because one would feed an overload. The *typical* duration is learned from successes, each
    divided by its slowdown, so that a slowdown of our own making does not pass for normal. The time for which a slot is
    *held* is learned from all calls that held one, those cut short included, so that the wait for a slot is not
    underestimated.

    Attributes:
        typical: seconds that a call takes; 0 before the first success.
        held: seconds that a call holds its slot; 0 before the first end.
    """

    __slots__ = ("_bypass", "_times", "held", "typical")

    def __init__(self) -> None:
        self.typical = 0.0
        self.held = 0.0
        self._times = ServiceTimes(_SAMPLES)
        self._bypass = EstimateBypass()

    @property
    def typical_or_guess(self) -> float:
        """Seconds that a call takes; a guess before the first success."""
        return self.typical or _GUESS

    def observe(
        self, held: float, outcome: CallOutcome, *, slowdown: float | None, slots: int, late: bool = False
    ) -> None:
        """Learn from a call that has ended.

        The mean of `held` is over at least two rounds of all slots. It bounds the queue: if it swung, each dip would
        admit more calls than can be served, and they would be sent late.

        Args:
            held: seconds that it held its slot.
            outcome: how it ended.
            slowdown: its latency over the expected one, if known.
            slots: how many slots there are.
            late: it was cut off at its deadline.
        """
        if outcome.released or outcome.rate_limited or outcome.kind is Outcome.OVERLOAD:
            return  # it was throttled, and held its slot for next to no time
        self.held = _mean(self.held, held, min(_GAIN, 0.5 / max(1, slots)))
        if outcome.kind is Outcome.SUCCESS and outcome.latency is not None:
            self._times.record(outcome.latency, success=True)
            self.typical = _mean(self.typical, outcome.latency / max(1.0, slowdown or 1.0), _GAIN)
        elif late:
            self._times.record_timeout(held)

    def acceptable_wait(self, since: float, request: CallRequest, *, certain: bool = False) -> float:
        """Return the seconds that a call may be expected to wait from `since` on; infinity without a deadline.

        That is half of the time to its deadline, if most calls fit into the rest; more if the wait is `certain`, since
        half of a long time is many times what a call takes.
        """
        time = request.deadline - since
        share = _CERTAIN_WAIT_SHARE if certain else _WAIT_SHARE
        return math.inf if time == math.inf else min(share * time, self._times.max_wait(time))

    def is_too_late(self, now: float, request: CallRequest, *, contested: bool) -> bool:
        """Return whether a call that could be sent now is not expected to end before its deadline.

        An estimate must not reject every call (see `EstimateBypass`). So it is optimistic, the time in which the
        fastest quarter of calls ended. Where other calls wait (`contested`), the call must be likely to end in time.
        """
        left, time = request.deadline - now, request.deadline - request.asked_at
        if contested:
            needed = self._times.required_time(time)
        else:
            needed = self._times.optimistic() if left < _LATE_SHARE * time else 0.0
        return self._bypass.should_reject(now, needed=needed, remaining=left)


def _mean(mean: float, newest: float, gain: float) -> float:
    return mean + gain * (newest - mean) if mean else newest
