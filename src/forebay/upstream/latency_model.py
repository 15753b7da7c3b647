"""How long a call is expected to take for its output tokens, and so how far it was stretched."""

from __future__ import annotations

_FORGET = 0.98  # weight of what was known, at each new call
_LEAST = 12  # calls before anything is said
_FLOOR = 1e-3  # seconds
_FAST = 2 / 3  # of the time expected


class LatencyModel:
    """``time = ttft + tokens * tpot``, learned from successes by least squares in which old ones fade.

    `ttft` is the time to the first token and `tpot` the time for each further one, both in seconds. Once a dozen calls
    are known, only those of a light load are learned from: else a provider that our own load slows down, little by
    little, would never be found slow. If a dozen in a row are far faster than what is known, that was wrong, and is
    forgotten.
    """

    __slots__ = ("_count", "_fast", "_n", "_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._count = self._fast = 0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def learn(self, tokens: int, seconds: float) -> None:
        """Take one success into account."""
        self._count += 1
        self._n = _FORGET * self._n + 1.0
        self._x = _FORGET * self._x + tokens
        self._y = _FORGET * self._y + seconds
        self._xx = _FORGET * self._xx + tokens * tokens
        self._xy = _FORGET * self._xy + tokens * seconds

    def expected(self, tokens: int) -> float | None:
        """Seconds that a call with so many output tokens takes, or None while too few were seen."""
        if self._count < _LEAST:
            return None
        spread = self._n * self._xx - self._x * self._x
        mean = self._y / self._n
        tpot = (self._n * self._xy - self._x * self._y) / spread if spread > 1e-9 * self._n * self._n else 0.0
        tpot = max(0.0, tpot)
        ttft = (self._y - tpot * self._x) / self._n
        if ttft < 0.0:  # a line through the origin fits better than one that begins before the call does
            ttft, tpot = 0.0, self._y / self._x if self._x else 0.0
        expected = ttft + tokens * tpot
        return max(expected, _FLOOR, 0.05 * mean)

    def observe(self, tokens: int, seconds: float, *, light: bool) -> float | None:
        """Take one success into account: its time over the time expected, or None if that is not known yet.

        Args:
            tokens: that it made.
            seconds: that it took.
            light: whether the load was too light to slow it down.
        """
        expected = self.expected(tokens)
        stretch = None if expected is None else seconds / expected
        if stretch is not None:
            self._fast = self._fast + 1 if stretch < _FAST else 0
            if self._fast == _LEAST:
                self._forget()
        if light or self._count < _LEAST:
            self.learn(tokens, seconds)
        return stretch
