"""Goodput of each limit at a simulated provider, relative to an oracle that knows the capacity.

Ten simulated minutes for each scenario and limit, the first left out; medians over seeds (SEEDS=3). Goodput is the
service time of the answers that arrive within two minutes, as if the provider were idle. Known quotas are paced evenly,
the same for every limit. Also at 1 to 10 times the load that the provider can serve. Charts go to build/bench.
``--only LIMIT`` measures one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from bench.calls.charts import plot_goodput_by_load, plot_goodput_by_scenario
from bench.calls.limits import LIMITS, OURS, UPSTREAM, select
from bench.calls.parallel_runs import CHARTS, SEEDS, rounded_median, run_parallel
from bench.calls.scenarios import SCENARIOS, WARM_UP
from bench.calls.upstream_run import UpstreamRun

LOADS: Final = (1.0, 2.0, 4.0, 7.0, 10.0)  # times the capacity
QUICK: Final = ("steady", "halved and back", "silent slowdown", "1 % background refusals", "outage of a minute")
NAMES: Final = (UPSTREAM, *LIMITS)
_ORACLE: Final = "oracle"


def one(case: tuple[str, str, float | None, int]) -> tuple[float, float]:
    """Return the seconds of useful work a second, and the share of calls throttled, of one run."""
    name, limit, load, seed = case
    scenario = SCENARIOS[name] if load is None else replace(SCENARIOS[name], offered=load)
    if limit == UPSTREAM:
        record = UpstreamRun(scenario.config, scenario.callers(limit), seed=seed).run()
    else:
        record = scenario.run(limit, None if limit == _ORACLE else LIMITS[limit](scenario.config.slots), seed)
    end = 60 * scenario.minutes
    return record.work(WARM_UP, end), record.share_refused(WARM_UP, end)


def measure(name: str, load: float | None, limits: Sequence[str], seeds: int) -> dict[str, tuple[float, float]]:
    """Return the share of the oracle's work, and of calls throttled, for each limit in a scenario."""
    runs = [(name, limit, load, seed) for limit in (_ORACLE, *limits) for seed in range(seeds)]
    results = dict(zip(runs, run_parallel(one, runs), strict=True))
    table = {}
    for limit in limits:
        of_limit = [results[name, limit, load, seed] for seed in range(seeds)]
        oracle = [results[name, _ORACLE, load, seed][0] for seed in range(seeds)]
        work = rounded_median(work / best for (work, _), best in zip(of_limit, oracle, strict=True))
        table[limit] = work, rounded_median(throttled for _, throttled in of_limit)
    return table


def run(*, quick: bool = False, only: str | None = None) -> dict[str, float | bool]:
    """Return goodput and throttled calls by scenario and limit; each line is printed when it is done.

    `quick` is one seed, the scenarios of `QUICK` and two loads; `only` is one name in `NAMES`.
    """
    limits = select(NAMES, only)
    seeds = 1 if quick else SEEDS
    loads = (LOADS[0], LOADS[-1]) if quick else LOADS
    cases = [*((name, None) for name in (QUICK if quick else SCENARIOS)), *(("steady", load) for load in loads)]
    table = {}
    print(f"{'':36}" + "".join(f"{limit:>17}" for limit in limits))
    for name, load in cases:
        row = measure(name, load, limits, seeds)
        table.update({(name, limit, load): result for limit, result in row.items()})
        label = name if load is None else f"{load:g}x"
        print(f"{label:36}" + "".join(f"{work:9.3f} {share:7.1%}" for work, share in row.values()), flush=True)
    results: dict[str, float | bool] = {}
    for (name, limit, load), (work, throttled) in table.items():
        label = name if load is None else f"{load:g}x"
        results[f"{label}, {limit}"] = work
        results[f"{label}, {limit}, throttled"] = throttled
    for name in (name for name in (UPSTREAM, OURS) if name in limits):
        ours = [table["steady", name, load][0] for load in loads]
        results[f"least of {name}, 1x to 10x"] = min(ours)
        results[f"{name} monotone within 5 %"] = all(b >= 0.95 * a for a, b in itertools.pairwise(ours))
    CHARTS.mkdir(parents=True, exist_ok=True)
    by_scenario = {(name, limit): work for (name, limit, load), (work, _) in table.items() if load is None}
    plot_goodput_by_scenario(by_scenario, CHARTS)
    by_load = {limit: [table["steady", limit, load][0] for load in loads] for limit in limits}
    plot_goodput_by_load(by_load, loads, CHARTS)
    return results
