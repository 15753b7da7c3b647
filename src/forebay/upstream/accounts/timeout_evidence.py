"""Evidence in callers' timeouts: whether an attempt that was cut off speaks against the provider."""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

_SAMPLES: Final = 60  # attempts that are remembered
_MIN_ANSWERS: Final = 8  # before the durations of answers say what is usual
_CHANCE: Final = 0.02  # below this, chance does not explain the silence
_LONG: Final = 30.0  # seconds without an answer that count against a provider of which little is known
_MOST: Final = 0.5  # share of the calls that end within the time that a caller waits, for a retry to be worth it


class TimeoutVerdict(NamedTuple):
    """The judgement of an attempt that its caller cut off.

    Attributes:
        fault: the silence counts against the provider.
        retry_may_help: calls usually take no longer than the caller waits.
    """

    fault: bool
    retry_may_help: bool


class TimeoutEvidence:
    """The durations of an account's latest attempts, against which timeouts are judged. Pure.

    A caller that waits 2 s for calls that take 5 s proves nothing. So a timeout counts against the provider only if
    chance does not explain it: the chances of all timeouts since the latest answer are multiplied, each being the share
    of the known calls that took longer. An attempt that was cut off took longer than its caller waited; it is no
    evidence about longer times (the estimate of Kaplan and Meier, in one step).
    """

    __slots__ = ("_answered", "_chance", "_cut_off")

    def __init__(self) -> None:
        self._answered: deque[float] = deque(maxlen=_SAMPLES)  # seconds of attempts that succeeded
        self._cut_off: deque[float] = deque(maxlen=_SAMPLES)  # seconds of attempts that were cut off
        self._chance = 1.0  # of the silence since the latest answer, if the provider is healthy

    def record_answer(self) -> None:
        """Note that the provider answers: the silence has ended."""
        self._chance = 1.0

    def record_success(self, seconds: float) -> None:
        """Add an attempt that succeeded after `seconds`."""
        self._chance = 1.0
        self._answered.append(seconds)

    def judge(self, seconds: float) -> TimeoutVerdict:
        """Judge an attempt that its caller cut off after `seconds`, and remember it."""
        if len(self._answered) < _MIN_ANSWERS:
            verdict = TimeoutVerdict(fault=seconds >= _LONG, retry_may_help=True)
        else:
            longer = sum(each > seconds for each in self._answered)
            cut_off_later = sum(each >= seconds for each in self._cut_off)
            share = (longer + cut_off_later + 1) / (len(self._answered) + cut_off_later + 1)
            self._chance *= share
            verdict = TimeoutVerdict(fault=self._chance < _CHANCE, retry_may_help=share <= _MOST)
        self._cut_off.append(seconds)
        return verdict
