"""Fleets of agents on one rate-limited key, direct and through the gateway, relative to an oracle's schedule.

All agents start at once and call with the SDKs of OpenAI and Anthropic at their defaults (two retries, a timeout of ten
minutes). The provider is `forebay.simulation`; the only setting of the gateway is its address.

- *virtual*: virtual time. The SDKs, the gateway and the provider's server run their own code, down to the bytes of
  HTTP; the sockets between them are pipes in memory, and computing takes no time. Medians and sums over seeds.
- *sockets*: real time and real sockets, the provider and the gateway in their own processes.

Failed: agents that did not finish; a fleet that fails early is quick. Ratio: wall time through the gateway over that of
an oracle at the same provider, which sends each call, first come, first served, at the earliest moment at which it is
accepted. Foresight: the same over an oracle that also knows how much work each agent has left: the longest goes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from bench.baselines.oracle_schedule import foresight, schedule
from bench.calls.parallel_runs import SEEDS, rounded_median, run_parallel
from bench.fleet.cases import CASES, OVER_SOCKETS, QUICK, FleetCase
from bench.fleet.ways import WAYS, WayResult, over_sockets, virtually

_HEAD: Final = (
    f"{'':46}{'agents failed':>18}{'seconds':>26}{'ratio':>8}{'calls made':>20}{'429s':>12}\n"
    f"{'':46}{'direct':>9}{'gateway':>9}{'direct':>8}{'gateway':>9}{'oracle':>9}{'':8}{'needed':>8}{'direct':>6}{'gw':>6}"
    f"{'direct':>7}{'gw':>5}"
)
Runs = Sequence[tuple[FleetCase, Mapping[str, WayResult]]]  # the seeds of one case, and the results of each way


def run(*, quick: bool = False) -> dict[str, float | str]:
    """Return the results; `quick` is one seed, and four agents for half a minute over sockets."""
    seeds = 1 if quick else SEEDS
    print(_HEAD)
    results: dict[str, float | str] = {}
    jobs = [(name, seed, way) for name in CASES for seed in range(1, seeds + 1) for way in WAYS]
    measured = dict(zip(jobs, run_parallel(_virtual, jobs), strict=True))
    for name, case in CASES.items():
        results |= _summarize(
            f"virtual: {name}",
            [
                (replace(case, seed=seed), {way: measured[name, seed, way] for way in WAYS})
                for seed in range(1, seeds + 1)
            ],
        )
    cases = dict(QUICK) if quick else {name: CASES[name] for name in OVER_SOCKETS}
    for name, runs in asyncio.run(_over_sockets(cases)).items():
        results |= _summarize(f"sockets: {name}", runs)
    return results


def _virtual(job: tuple[str, int, str]) -> WayResult:
    name, seed, way = job
    return virtually(replace(CASES[name], seed=seed), way)


async def _over_sockets(cases: Mapping[str, FleetCase]) -> dict[str, Runs]:
    """Run all cases over sockets at once: they mostly wait."""
    jobs = [(name, way) for name in cases for way in WAYS]
    answers = await asyncio.gather(*(over_sockets(cases[name], way) for name, way in jobs))
    measured = dict(zip(jobs, answers, strict=True))
    return {name: [(case, {way: measured[name, way] for way in WAYS})] for name, case in cases.items()}


def _summarize(name: str, runs: Runs) -> dict[str, float | str]:
    """Return the results of one case, and print them as a line of the table."""
    results: dict[str, float | str] = {}
    agents = sum(case.agents for case, _ in runs)
    oracle = [schedule(case) for case, _ in runs]
    for way in WAYS:
        measured = [ways[way] for _, ways in runs]
        results[f"{name}: {way}, failed of {agents}"] = sum(one.failed for one in measured)
        results[f"{name}: {way}, seconds"] = rounded_median(one.seconds for one in measured)
        results[f"{name}: {way}, calls made"] = sum(one.calls for one in measured)
        results[f"{name}: {way}, 429s"] = sum(one.refused for one in measured)
        results[f"{name}: {way}, 503s and 529s"] = sum(one.overloaded for one in measured)
        results[f"{name}: {way}, failed by"] = _reasons(measured)
    seconds = [ways["gateway"].seconds for _, ways in runs]
    ratios = [ours / best for ours, best in zip(seconds, oracle, strict=True)]
    results[f"{name}: oracle, seconds"] = rounded_median(oracle)
    results[f"{name}: calls needed"] = sum(case.calls for case, _ in runs)
    results[f"{name}: ratio"] = rounded_median(ratios)
    results[f"{name}: worst ratio"] = round(max(ratios), 3)
    results[f"{name}: ratio to foresight"] = rounded_median(
        ours / foresight(case) for ours, (case, _) in zip(seconds, runs, strict=True)
    )
    print(_line(name, agents, results))
    return results


def _reasons(measured: Sequence[WayResult]) -> str:
    reasons: dict[str, int] = {}
    for one in measured:
        for reason, count in one.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return ", ".join(f"{count} by {reason}" for reason, count in reasons.items()) or "-"


def _line(name: str, agents: int, results: Mapping[str, float | str]) -> str:
    def value(key: str) -> float:
        return float(results[f"{name}: {key}"])

    shares = (f"{value(f'{way}, failed of {agents}') / agents:.0%}" for way in WAYS)
    seconds = (f"{value(f'{way}, seconds'):.0f}" for way in (*WAYS, "oracle"))
    calls = (f"{value(key):.0f}" for key in ("calls needed", "direct, calls made", "gateway, calls made"))
    refused = (f"{value(f'{way}, 429s'):.0f}" for way in WAYS)
    cells = zip((9, 9, 8, 9, 9), (*shares, *seconds), strict=True)
    more = zip((8, 6, 6, 7, 5), (*calls, *refused), strict=True)
    return (
        f"{name:46}"
        + "".join(f"{text:>{width}}" for width, text in cells)
        + f"{value('ratio'):8.3f}"
        + "".join(f"{text:>{width}}" for width, text in more)
    )
