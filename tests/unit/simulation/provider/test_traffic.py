"""Fitted traffic, compared with published statistics of the traces and, if they are available, with the traces."""

from __future__ import annotations

import bisect
import csv
import datetime as dt
import itertools
import os
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.clock import new_random
from forebay.simulation.provider.traffic import Quantiles, Traffic

KINDS = {"conv": Traffic.conversation(), "code": Traffic.code()}
PUBLISHED = {  # in the README of the traces
    "conv": {"rate": 5.5, "input": {0.5: 1020, 0.99: 4142}, "output": {0.01: 16, 0.5: 129, 0.99: 601, 1.0: 1000}},
    "code": {"rate": 2.6, "input": {0.5: 1469, 0.99: 7436}, "output": {0.01: 6, 0.5: 13, 0.99: 252, 1.0: 1899}},
}
FOLDERS = [Path(os.environ.get("FOREBAY_TRACES", "/nowhere")), Path(__file__).parents[5] / "shared" / "data"]
DATA = next((folder for folder in FOLDERS if folder.is_dir()), None)
needs_traces = pytest.mark.skipif(DATA is None, reason="the traces are not here")

Trace = tuple[list[int], list[int], list[float]]


@cache
def sample(kind: str) -> Trace:
    """Draw input, output and gaps (divided by their mean) of 40,000 calls."""
    rng = new_random(11)
    lengths = [KINDS[kind].lengths(rng) for _ in range(40_000)]
    gaps = [KINDS[kind].interarrival(rng, 1.0) for _ in range(40_000)]
    return [i for i, _ in lengths], [o for _, o in lengths], gaps


@cache
def trace(kind: str) -> Trace:
    assert DATA is not None
    with (DATA / f"AzureLLMInferenceTrace_{kind}.csv").open() as file:
        rows = list(csv.DictReader(file))
    times = sorted(dt.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    return [int(r["ContextTokens"]) for r in rows], [int(r["GeneratedTokens"]) for r in rows], [g / mean for g in gaps]


def quantile(values: list[int] | list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def mean(values: list[int] | list[float]) -> float:
    return sum(values) / len(values)


def dispersion(gaps: list[float], span: float) -> float:
    """Return variance / mean of the arrivals in spans of `span` mean gaps: 1 for a Poisson process."""
    counts: dict[int, int] = {}
    for at in itertools.accumulate(gaps):
        counts[int(at / span)] = counts.get(int(at / span), 0) + 1
    spans = max(counts) + 1
    average = sum(counts.values()) / spans
    squares = sum((count - average) ** 2 for count in counts.values()) + (spans - len(counts)) * average**2
    return squares / spans / average


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_have_the_published_quantiles(kind: str) -> None:
    inputs, outputs, _ = sample(kind)
    for values, published in ((inputs, PUBLISHED[kind]["input"]), (outputs, PUBLISHED[kind]["output"])):
        assert isinstance(published, dict)
        for share, value in published.items():
            # The longest output is drawn about once in 30,000: the sample must only come near it, and not exceed it.
            assert quantile(values, share) == pytest.approx(value, rel=0.06 if share < 1 else 0.2, abs=2)
            assert share < 1 or max(values) <= value


@pytest.mark.parametrize("kind", KINDS)
def test_arrivals_have_the_measured_or_the_given_rate(kind: str) -> None:
    traffic = KINDS[kind]
    assert traffic.rate == pytest.approx(PUBLISHED[kind]["rate"], rel=0.02)
    rng, twin = new_random(1), new_random(1)
    assert traffic.interarrival(rng) == pytest.approx(traffic.interarrival(twin, 1.0) / traffic.rate)
    _, _, gaps = sample(kind)
    assert mean(gaps) == pytest.approx(1.0, rel=0.1 if kind == "code" else 0.02)


def test_conversation_is_nearly_poisson_and_code_is_bursty() -> None:
    assert dispersion(sample("conv")[2], 10) == pytest.approx(1.2, abs=0.2)
    assert dispersion(sample("code")[2], 10) > 10


def test_output_length_depends_on_input_length() -> None:
    rng = new_random(2)
    traffic = Traffic.conversation()
    middling = sorted(traffic.output_tokens(rng, 1050) for _ in range(2000))[1000]
    long = sorted(traffic.output_tokens(rng, 4000) for _ in range(2000))[1000]
    assert middling == pytest.approx(402, abs=20)
    assert long == pytest.approx(60, abs=10)


@needs_traces
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", [0, 1, 2], ids=["input", "output", "gaps"])
def test_draws_have_the_distribution_of_the_trace(kind: str, what: int) -> None:
    drawn, real = sorted(sample(kind)[what]), sorted(trace(kind)[what])
    points = [real[len(real) * n // 200] for n in range(200)]
    for point in points:
        assert share_below(drawn, point) == pytest.approx(share_below(real, point), abs=0.04)
    assert mean(drawn) == pytest.approx(mean(real), rel=0.1)


@needs_traces
@pytest.mark.parametrize("kind", KINDS)
def test_work_and_burstiness_match_the_trace(kind: str) -> None:
    """The mean duration of a call and the burstiness of arrivals decide capacity."""
    assert mean(sample(kind)[1]) == pytest.approx(mean(trace(kind)[1]), rel=0.05)
    for span in (5, 30):
        drawn, real = dispersion(sample(kind)[2], span), dispersion(trace(kind)[2], span)
        assert real / 2.5 < drawn < real * 1.5


def share_below(ordered: list[int] | list[float], value: float) -> float:
    """Return the share of values below `value`, plus half of the share equal to it."""
    return (bisect.bisect_left(ordered, value) + bisect.bisect_right(ordered, value)) / 2 / len(ordered)


@given(st.floats(0, 1, exclude_max=True))
def test_a_quantile_and_its_chance_are_inverse(share: float) -> None:
    table = Quantiles((0.0, 0.25, 0.5, 1.0), (2.0, 10.0, 50.0, 1000.0))
    assert table.chance(table.value(share)) == pytest.approx(share, abs=1e-9)
    assert table.mean == pytest.approx(0.25 * 6 + 0.25 * 30 + 0.5 * 525)


def test_a_jump_and_the_ends_have_a_probability() -> None:
    table = Quantiles((0.0, 0.2, 0.6, 1.0), (5.0, 7.0, 7.0, 9.0))
    assert [table.chance(value) for value in (0, 7, 100)] == [0.0, pytest.approx(0.4), 1.0]
