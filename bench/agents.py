"""Fleets of agents on one rate-limited key, direct and through the gateway, beside an oracle's schedule.

Agents that start at once call with the SDKs of OpenAI and Anthropic as these come (two retries, ten minutes). The
provider is `forebay.simulation`, the gateway is told nothing but where that is.

- *virtual*: virtual time. The SDKs, the gateway and the provider's server run their own code, down to the bytes of
  HTTP; the sockets between them are pipes in memory, and processors take no time. Medians and sums over seeds.
- *sockets*: real time, real sockets, the provider and the gateway in processes of their own.

Failed: agents that did not finish, of all; a fleet that fails early is quick. Ratio: wall time through the gateway over
that of an oracle on the same plant, who sends each call at the earliest moment at which it is let in, first come, first
served. Foresight: the same over an oracle who also knows how much each agent has left to do: the longest go first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from bench.calls.table import SEEDS, everywhere, middle
from bench.fleet.cases import CASES, FOR_REAL, SHORT, Case
from bench.fleet.oracle import foresight, schedule
from bench.fleet.ways import WAYS, Measured, over_sockets, virtually

_HEAD: Final = (
    f"{'':46}{'agents failed':>18}{'seconds':>26}{'ratio':>8}{'calls made':>20}{'429s':>12}\n"
    f"{'':46}{'direct':>9}{'gateway':>9}{'direct':>8}{'gateway':>9}{'oracle':>9}{'':8}{'needed':>8}{'direct':>6}{'gw':>6}"
    f"{'direct':>7}{'gw':>5}"
)
Runs = Sequence[tuple[Case, Mapping[str, Measured]]]  # of one case, by seed


def run(*, quick: bool = False) -> dict[str, float | str]:
    """The figures; `quick` is one seed, and four agents for half a minute over sockets."""
    seeds = 1 if quick else SEEDS
    print(_HEAD)
    figures: dict[str, float | str] = {}
    jobs = [(name, seed, way) for name in CASES for seed in range(1, seeds + 1) for way in WAYS]
    measured = dict(zip(jobs, everywhere(_virtual, jobs), strict=True))
    for name, case in CASES.items():
        figures |= _figures(
            f"virtual: {name}",
            [
                (replace(case, seed=seed), {way: measured[name, seed, way] for way in WAYS})
                for seed in range(1, seeds + 1)
            ],
        )
    cases = dict(SHORT) if quick else {name: CASES[name] for name in FOR_REAL}
    for name, runs in asyncio.run(_for_real(cases)).items():
        figures |= _figures(f"sockets: {name}", runs)
    return figures


def _virtual(job: tuple[str, int, str]) -> Measured:
    name, seed, way = job
    return virtually(replace(CASES[name], seed=seed), way)


async def _for_real(cases: Mapping[str, Case]) -> dict[str, Runs]:
    """All at once, since they mostly wait."""
    jobs = [(name, way) for name in cases for way in WAYS]
    answers = await asyncio.gather(*(over_sockets(cases[name], way) for name, way in jobs))
    measured = dict(zip(jobs, answers, strict=True))
    return {name: [(case, {way: measured[name, way] for way in WAYS})] for name, case in cases.items()}


def _figures(name: str, runs: Runs) -> dict[str, float | str]:
    """What the runs of one case come to; printed as a line of the table too."""
    figures: dict[str, float | str] = {}
    agents = sum(case.agents for case, _ in runs)
    oracle = [schedule(case) for case, _ in runs]
    for way in WAYS:
        of = [ways[way] for _, ways in runs]
        figures[f"{name}: {way}, failed of {agents}"] = sum(one.failed for one in of)
        figures[f"{name}: {way}, seconds"] = middle(one.seconds for one in of)
        figures[f"{name}: {way}, calls made"] = sum(one.calls for one in of)
        figures[f"{name}: {way}, 429s"] = sum(one.refused for one in of)
        figures[f"{name}: {way}, 503s and 529s"] = sum(one.overloaded for one in of)
        figures[f"{name}: {way}, failed by"] = _whys(of)
    took = [ways["gateway"].seconds for _, ways in runs]
    ratios = [seconds / best for seconds, best in zip(took, oracle, strict=True)]
    figures[f"{name}: oracle, seconds"] = middle(oracle)
    figures[f"{name}: calls needed"] = sum(case.calls for case, _ in runs)
    figures[f"{name}: ratio"] = middle(ratios)
    figures[f"{name}: worst ratio"] = round(max(ratios), 3)
    figures[f"{name}: ratio to foresight"] = middle(
        seconds / foresight(case) for seconds, (case, _) in zip(took, runs, strict=True)
    )
    print(_line(name, agents, figures))
    return figures


def _whys(measured: Sequence[Measured]) -> str:
    whys: dict[str, int] = {}
    for one in measured:
        for why, count in one.whys.items():
            whys[why] = whys.get(why, 0) + count
    return ", ".join(f"{count} by {why}" for why, count in whys.items()) or "-"


def _line(name: str, agents: int, figures: Mapping[str, float | str]) -> str:
    def of(what: str) -> float:
        return float(figures[f"{name}: {what}"])

    shares = (f"{of(f'{way}, failed of {agents}') / agents:.0%}" for way in WAYS)
    seconds = (f"{of(f'{who}, seconds'):.0f}" for who in (*WAYS, "oracle"))
    calls = (f"{of(what):.0f}" for what in ("calls needed", "direct, calls made", "gateway, calls made"))
    refused = (f"{of(f'{way}, 429s'):.0f}" for way in WAYS)
    cells = zip((9, 9, 8, 9, 9), (*shares, *seconds), strict=True)
    more = zip((8, 6, 6, 7, 5), (*calls, *refused), strict=True)
    return (
        f"{name:46}"
        + "".join(f"{text:>{width}}" for width, text in cells)
        + f"{of('ratio'):8.3f}"
        + "".join(f"{text:>{width}}" for width, text in more)
    )
