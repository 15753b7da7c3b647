"""Token lengths and arrival times of real LLM traffic.

The distributions are fitted to the two traces of Azure LLM inference services that Microsoft published in the Azure
Public Dataset ("AzureLLMInferenceTrace", 16 November 2023, CC-BY 4.0) and introduced in P. Patel et al., "Splitwise:
Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024. ``bench/fit_traffic.py`` makes the fit, its
numbers are in ``traffic_quantiles.py``, and ``docs/traffic.md`` states its quality.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Self

from forebay.simulation.provider import traffic_quantiles


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A distribution given by quantiles: `values` at the probabilities `chances`, from 0 to 1, linear in between."""

    chances: tuple[float, ...]
    values: tuple[float, ...]
    mean: float = field(init=False)

    def __post_init__(self) -> None:
        steps = zip(itertools.pairwise(self.chances), itertools.pairwise(self.values), strict=True)
        mean = sum((c1 - c0) * (v0 + v1) / 2 for (c0, c1), (v0, v1) in steps)
        object.__setattr__(self, "mean", mean)

    def value(self, chance: float) -> float:
        """Return the quantile at the probability `chance`, interpolated between the known ones."""
        upper = min(bisect.bisect_right(self.chances, chance), len(self.chances) - 1)
        c0, c1 = self.chances[upper - 1], self.chances[upper]
        v0, v1 = self.values[upper - 1], self.values[upper]
        return v0 + (v1 - v0) * (chance - c0) / (c1 - c0)

    def chance(self, value: float) -> float:
        """Return the share of values below `value`, the inverse of `value()`; at a jump, the middle of the jump."""
        low, high = bisect.bisect_left(self.values, value), bisect.bisect_right(self.values, value)
        if low < high:
            return (self.chances[low] + self.chances[high - 1]) / 2
        if low in (0, len(self.values)):
            return 0.0 if low == 0 else 1.0
        v0, v1 = self.values[low - 1], self.values[low]
        return self.chances[low - 1] + (self.chances[low] - self.chances[low - 1]) * (value - v0) / (v1 - v0)


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of LLM traffic: the lengths of input and output, and the times between arrivals.

    Immutable and without a generator of its own: every draw takes a `random.Random`.
    """

    rate: float  # arrivals a second in the measured hour
    inputs: Quantiles  # tokens
    outputs: tuple[Quantiles, ...]  # tokens, one for each of the equally large classes of input, shortest first
    gaps: Quantiles  # between arrivals, divided by their mean

    @classmethod
    @cache
    def conversation(cls) -> Self:
        """Return the traffic of a chat service: outputs of 16 to 1,000 tokens, arrivals nearly Poisson."""
        return cls._fitted(
            traffic_quantiles.CONVERSATION_RATE,
            traffic_quantiles.CONVERSATION_INPUT,
            traffic_quantiles.CONVERSATION_OUTPUT,
            traffic_quantiles.CONVERSATION_GAP,
        )

    @classmethod
    @cache
    def code(cls) -> Self:
        """Return the traffic of a code completion service: long inputs, mostly tiny outputs, bursts and long pauses."""
        return cls._fitted(
            traffic_quantiles.CODE_RATE,
            traffic_quantiles.CODE_INPUT,
            traffic_quantiles.CODE_OUTPUT,
            traffic_quantiles.CODE_GAP,
        )

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
            Quantiles(traffic_quantiles.INPUT_CHANCES, inputs),
            tuple(Quantiles(traffic_quantiles.OUTPUT_CHANCES, row) for row in outputs),
            Quantiles(traffic_quantiles.GAP_CHANCES, gaps),
        )

    def lengths(self, rng: random.Random) -> tuple[int, int]:
        """Draw the input and output tokens of one call."""
        chance = rng.random()
        return round(self.inputs.value(chance)), self._output(rng, chance)

    def output_tokens(self, rng: random.Random, input_tokens: int) -> int:
        """Draw the output tokens of a call with `input_tokens` of input."""
        return self._output(rng, self.inputs.chance(input_tokens))

    def interarrival(self, rng: random.Random, rate: float | None = None) -> float:
        """Draw the seconds from one arrival to the next, at `rate` arrivals a second; None: the measured rate."""
        return self.gaps.value(rng.random()) / self.gaps.mean / (self.rate if rate is None else rate)

    def _output(self, rng: random.Random, chance: float) -> int:
        row = self.outputs[min(math.floor(chance * len(self.outputs)), len(self.outputs) - 1)]
        return round(row.value(rng.random()))
