"""How long calls take and hold their slots, and whether one that is sent late can still be in time."""

from __future__ import annotations

import math

from forebay.admission import EstimateBypass, ServiceTimes
from forebay.interfaces import Outcome
from forebay.upstream.call_request import CallOutcome, CallRequest

_GAIN = 0.05  # weight of the newest call in a mean
_UNKNOWN = 1.0  # seconds that a call is taken to last before the first has ended
_SAMPLES = 60  # calls
_WAIT_SHARE = 0.5  # of a call's time to its deadline: as long it may be expected to wait at most
_LATE_SHARE = 0.25  # of that time: with less left, a call is sent only if it can be expected to make it


class CallDurations:
    """Learned from calls that have ended. Times are seconds.

    There are two means, since one would feed an overload. What a call *takes* is learned from successes, each over its
    stretch, so that no slow-down of our own making passes for what is normal. How long a slot is *held* is learned from
    all that held one, those that were cut short included, so that the wait for one is not thought shorter than it is.

    Attributes:
        typical: seconds that a call takes; 0 before the first success.
        held: seconds that a call holds its slot; 0 before the first end.
    """

    __slots__ = ("_late", "_times", "held", "typical")

    def __init__(self) -> None:
        self.typical = 0.0
        self.held = 0.0
        self._times = ServiceTimes(_SAMPLES)
        self._late = EstimateBypass()

    @property
    def typical_or_guess(self) -> float:
        """Seconds that a call takes, or is taken to take before the first has succeeded."""
        return self.typical or _UNKNOWN

    def observe(
        self, held: float, ended: CallOutcome, *, stretch: float | None, slots: int, late: bool = False
    ) -> None:
        """A call has held one of so many slots for so many seconds, and ended so.

        Args:
            held: seconds.
            ended: how.
            stretch: see `AccountLimits.observe_latency`.
            slots: that there are.
            late: its caller left when its time was up.

        The mean of `held` is over two rounds of all slots at least. It says how long the line may be: were it to swing,
        each dip would let more in than can be served, and they would be sent late.
        """
        if ended.released or ended.rate_limited or ended.kind is Outcome.OVERLOAD:
            return  # it was turned away, and held nothing worth the name
        self.held = _mean(self.held, held, min(_GAIN, 0.5 / max(1, slots)))
        if ended.kind is Outcome.SUCCESS and ended.latency is not None:
            self._times.record(ended.latency, success=True)
            self.typical = _mean(self.typical, ended.latency / max(1.0, stretch or 1.0), _GAIN)
        elif late:
            self._times.record_timeout(held)

    def acceptable_wait(self, since: float, ask: CallRequest) -> float:
        """Seconds that a call may be expected to wait from then on: half of its time, if most fit into the rest."""
        time = ask.deadline - since
        return math.inf if time == math.inf else min(_WAIT_SHARE * time, self._times.max_wait(time))

    def is_too_late(self, now: float, ask: CallRequest, *, contested: bool) -> bool:
        """Whether a call about to be sent comes too late, as far as may be judged; asked only if it is sent else.

        An estimate must not lock the door: see `EstimateBypass`. So it is judged kindly, by what the fastest quarter took;
        but where it is `contested`, for others wait who have more time, it has to be likely.
        """
        left, time = ask.deadline - now, ask.deadline - ask.asked_at
        if contested:
            needed = self._times.required_time(time)
        else:
            needed = self._times.optimistic() if left < _LATE_SHARE * time else 0.0
        return self._late.should_reject(now, needed=needed, remaining=left)


def _mean(mean: float, newest: float, gain: float) -> float:
    return mean + gain * (newest - mean) if mean else newest
