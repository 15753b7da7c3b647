"""Token lengths and arrivals as real LLM traffic has them.

Fitted to the two traces of Azure LLM inference services that Microsoft published in the Azure Public Dataset
("AzureLLMInferenceTrace", 16 November 2023, CC-BY 4.0), introduced in P. Patel et al., "Splitwise: Efficient
Generative LLM Inference Using Phase Splitting", ISCA 2024. The fit is made by ``bench/fit_traffic.py``, its figures are
in ``traces.py``, and ``docs/traffic.md`` says how good it is.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Self

from forebay.simulation.provider import traffic_quantiles as traces


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution given by some of its quantiles, and interpolated between them: values at `chances` from 0 to 1."""

    chances: tuple[float, ...]
    values: tuple[float, ...]
    mean: float = field(init=False)

    def __post_init__(self) -> None:
        steps = zip(itertools.pairwise(self.chances), itertools.pairwise(self.values), strict=True)
        mean = sum((c1 - c0) * (v0 + v1) / 2 for (c0, c1), (v0, v1) in steps)
        object.__setattr__(self, "mean", mean)

    def value(self, chance: float) -> float:
        """The quantile at `chance`, linear between the known ones."""
        upper = min(bisect.bisect_right(self.chances, chance), len(self.chances) - 1)
        c0, c1 = self.chances[upper - 1], self.chances[upper]
        v0, v1 = self.values[upper - 1], self.values[upper]
        return v0 + (v1 - v0) * (chance - c0) / (c1 - c0)

    def chance(self, value: float) -> float:
        """The inverse: the share of values below `value`; in the middle of a jump, its middle."""
        low, high = bisect.bisect_left(self.values, value), bisect.bisect_right(self.values, value)
        if low < high:
            return (self.chances[low] + self.chances[high - 1]) / 2
        if low in (0, len(self.values)):
            return 0.0 if low == 0 else 1.0
        v0, v1 = self.values[low - 1], self.values[low]
        return self.chances[low - 1] + (self.chances[low] - self.chances[low - 1]) * (value - v0) / (v1 - v0)


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of LLM traffic: how long questions and answers are, and how they arrive.

    Immutable and without chance of its own: every draw takes a `random.Random`.
    """

    rate: float  # arrivals a second in the hour that was measured
    inputs: Quantiles  # tokens
    outputs: tuple[Quantiles, ...]  # tokens, for classes of input of equal size, shortest first
    gaps: Quantiles  # between arrivals, over their mean

    @classmethod
    @cache
    def conversation(cls) -> Self:
        """A chat service: answers of 16 to 1,000 tokens whose length goes with the question's; nearly Poisson."""
        return cls._fitted(
            traces.CONVERSATION_RATE, traces.CONVERSATION_INPUT, traces.CONVERSATION_OUTPUT, traces.CONVERSATION_GAP
        )

    @classmethod
    @cache
    def code(cls) -> Self:
        """A code completion service: long questions, mostly tiny answers, in bursts with long silences between."""
        return cls._fitted(traces.CODE_RATE, traces.CODE_INPUT, traces.CODE_OUTPUT, traces.CODE_GAP)

    @classmethod
    def _fitted(
        cls,
        rate: float,
        inputs: tuple[float, ...],
        outputs: tuple[tuple[float, ...], ...],
        gaps: tuple[float, ...],
    ) -> Self:
        return cls(
            rate,
            Quantiles(traces.INPUT_CHANCES, inputs),
            tuple(Quantiles(traces.OUTPUT_CHANCES, row) for row in outputs),
            Quantiles(traces.GAP_CHANCES, gaps),
        )

    def lengths(self, rng: random.Random) -> tuple[int, int]:
        """Draw one call: input and output tokens."""
        chance = rng.random()
        return round(self.inputs.value(chance)), self._output(rng, chance)

    def output_tokens(self, rng: random.Random, input_tokens: int) -> int:
        """Draw the length of the answer to a question of so many tokens."""
        return self._output(rng, self.inputs.chance(input_tokens))

    def interarrival(self, rng: random.Random, rate: float | None = None) -> float:
        """Draw the seconds from one arrival to the next, at `rate` arrivals a second (as measured, if None)."""
        return self.gaps.value(rng.random()) / self.gaps.mean / (self.rate if rate is None else rate)

    def _output(self, rng: random.Random, chance: float) -> int:
        row = self.outputs[min(math.floor(chance * len(self.outputs)), len(self.outputs) - 1)]
        return round(row.value(rng.random()))
