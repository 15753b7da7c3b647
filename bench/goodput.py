"""How much useful work a limit gets out of a provider, over what an oracle gets that knows the capacity.

Ten simulated minutes for each scenario and limit, the first left out; medians over seeds (SEEDS=3). Useful is what an
answer takes on an idle provider, if it comes within two minutes of its call. Quotas are paced evenly here, the same for
all. Also: from 1 to 10 times the load that the provider bears. Pictures go to build/bench.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Final

from bench.calls.limits import LIMITS, OURS, UPSTREAM
from bench.calls.picture import curves, heat
from bench.calls.scenarios import MINUTES, SCENARIOS, WARM_UP
from bench.calls.table import PICTURES, SEEDS, everywhere, middle
from bench.calls.upstream_run import UpstreamRun

LOADS: Final = (1.0, 2.0, 4.0, 7.0, 10.0)  # times the capacity
NAMES: Final = (UPSTREAM, *LIMITS)
_ORACLE: Final = "oracle"
_END: Final = 60 * MINUTES


def one(case: tuple[str, str, float | None, int]) -> tuple[float, float]:
    """Seconds of useful work a second, and the share of calls refused, of one run."""
    name, limit, load, seed = case
    scenario = SCENARIOS[name] if load is None else replace(SCENARIOS[name], offered=load)
    if limit == UPSTREAM:
        record = UpstreamRun(scenario.config, scenario.callers(limit), seed=seed).run()
    else:
        record = scenario.run(limit, None if limit == _ORACLE else LIMITS[limit](scenario.config.slots), seed)
    return record.work(WARM_UP, _END), record.share_refused(WARM_UP, _END)


def measure(name: str, load: float | None) -> dict[str, tuple[float, float]]:
    """For each limit in a scenario: the share of the oracle's work, and of calls refused."""
    runs = [(name, limit, load, seed) for limit in (_ORACLE, *NAMES) for seed in range(SEEDS)]
    found = dict(zip(runs, everywhere(one, runs), strict=True))
    table = {}
    for limit in NAMES:
        mine = [found[name, limit, load, seed] for seed in range(SEEDS)]
        oracle = [found[name, _ORACLE, load, seed][0] for seed in range(SEEDS)]
        work = middle(work / best for (work, _), best in zip(mine, oracle, strict=True))
        table[limit] = work, middle(refused for _, refused in mine)
    return table


def run() -> dict[str, float | bool]:
    """The shares, by scenario and limit, each with the share of its calls that were refused; printed as they come."""
    cases = [*((name, None) for name in SCENARIOS), *(("steady", load) for load in LOADS)]
    table = {}
    print(f"{'':28}" + "".join(f"{limit:>17}" for limit in NAMES))
    for name, load in cases:
        row = measure(name, load)
        table.update({(name, limit, load): figures for limit, figures in row.items()})
        where = name if load is None else f"{load:g}x"
        print(f"{where:28}" + "".join(f"{work:9.3f} {refused:7.1%}" for work, refused in row.values()), flush=True)
    figures: dict[str, float | bool] = {}
    for (name, limit, load), (work, refused) in table.items():
        where = name if load is None else f"{load:g}x"
        figures[f"{where}, {limit}"] = work
        figures[f"{where}, {limit}, refused"] = refused
    for name in (UPSTREAM, OURS):
        ours = [table["steady", name, load][0] for load in LOADS]
        figures[f"least of {name}, 1x to 10x"] = min(ours)
        figures[f"{name} monotone within 5 %"] = all(b >= 0.95 * a for a, b in itertools.pairwise(ours))
    PICTURES.mkdir(parents=True, exist_ok=True)
    heat({(name, limit): work for (name, limit, load), (work, _) in table.items() if load is None}, PICTURES)
    curves({limit: [table["steady", limit, load][0] for load in LOADS] for limit in NAMES}, LOADS, PICTURES)
    return figures
