"""The load of the shards of a state, as task admission sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forebay._hooks import call_hook
from forebay.clock import now
from forebay.interfaces import LoadSource
from forebay.state.time_limits import TimeLimits
from forebay.task import Priority

_GAIN = 0.1  # of the moving mean of the seconds that a call takes


class StateLoad:
    """The load of a state: the mean of its shards' levels, each by its share of the keys.

    So a state of three shards of which one is down has a load of a third: a third of the keys fail, and the others go
    on. Which keys a task will use is not known before it runs.
    """

    def __init__(self) -> None:
        self._weights: dict[ShardLoad, float] = {}

    def add(self, shard: ShardLoad, weight: float) -> None:
        """Count a shard with its share of the keys, compared with the others'."""
        self._weights[shard] = weight

    def load(self) -> tuple[float, ShardLoad]:
        """Return the load, and the shard that adds most to it."""
        parts = {shard: weight * shard.level() for shard, weight in self._weights.items()}
        return min(1.0, sum(parts.values()) / sum(self._weights.values())), max(parts, key=parts.__getitem__)

    def is_down(self) -> bool:
        """Return whether all shards are down."""
        return all(shard.is_down for shard in self._weights)

    def relieve(self) -> None:
        """Start what has waited until a shard is up again."""
        for shard in self._weights:
            shard.relieve()


class ShardLoad:
    """The part of a shard in the load of its state. It is a `LoadSource`.

    The level of a shard is the seconds that a call takes, over those that it may take; 1.0 while it is down. The shard
    that adds most to the load of the state has all of it, and names it; so tasks whose workers use the state are
    rejected, or spilled, when most of it is down or slow.

    Args:
        name: of the shard, in messages.
        state: the load of its state, to which it is added.
        limits: the time limits of its calls.
        recheck: seconds until a shard that is down may be up again.

    Attributes:
        is_down: True while calls of it fail.
    """

    def __init__(self, name: str, state: StateLoad, *, limits: TimeLimits, recheck: float) -> None:
        self.name = name
        self._state = state
        self._limits = limits
        self._recheck = recheck
        self._latency = 0.0
        self.is_down = False
        self._on_relief: dict[object, Callable[[], None]] = {}

    def took(self, seconds: float) -> None:
        """Record the seconds that a call has taken."""
        self._latency += _GAIN * (seconds - self._latency)

    def went_down(self) -> None:
        """Record that the shard cannot be used."""
        self.is_down = True

    def came_up(self) -> None:
        """Record that the shard can be used again, and start what has waited for that."""
        self.is_down, self._latency = False, 0.0
        self._state.relieve()

    def relieve(self) -> None:
        """Start what has waited for the state."""
        for callback in list(self._on_relief.values()):
            call_hook(f"relief of {self.name}", callback)

    @property
    def accounts(self) -> Sequence[LoadSource]:
        """See `forebay.interfaces.LoadSource`."""
        return (self,)

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:  # noqa: ARG002 - all are served alike
        """See `forebay.interfaces.LoadSource`."""
        load, worst = self._state.load()
        return (load if worst is self else 0.0), ("down" if self.is_down else "latency")

    def level(self) -> float:
        """Return the seconds that a call takes now, over those that it may take, at most 1; 1 while it is down."""
        if self.is_down:
            return 1.0
        oldest = self._limits.oldest_start()
        age = 0.0 if oldest is None else now() - oldest
        return min(1.0, max(self._latency, age) / self._limits.seconds)

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:  # noqa: ARG002 - as above
        """See `forebay.interfaces.LoadSource`."""
        return (self._recheck if self.is_down else 0.0), 0.0

    def may_start(self, priority: Priority) -> bool:  # noqa: ARG002 - as above
        """See `forebay.interfaces.LoadSource`."""
        return not self._state.is_down()

    def typical_latency(self) -> float:
        """See `forebay.interfaces.LoadSource`."""
        return max(self._latency, 0.001)

    def blocks(self, priority: Priority) -> bool:  # noqa: ARG002 - as above
        """See `forebay.interfaces.LoadSource`."""
        return self._state.is_down()

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:
        """Do nothing: runs that have not begun do not load a shard."""

    def add_expected_calls(self, runs: int) -> None:
        """Do nothing, as `hold_back`."""

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        """See `forebay.interfaces.LoadSource`."""
        self._on_relief[holder] = callback

    def forget(self, holder: object) -> None:
        """See `forebay.interfaces.LoadSource`."""
        self._on_relief.pop(holder, None)
