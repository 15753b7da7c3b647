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
from bench.calls.whole import Whole

LOADS: Final = (1.0, 2.0, 4.0, 7.0, 10.0)  # times the capacity
NAMES: Final = (UPSTREAM, *LIMITS)
_ORACLE: Final = "oracle"
_END: Final = 60 * MINUTES


def one(case: tuple[str, str, float | None, int]) -> tuple[float, float]:
    """Seconds of useful work a second, and the share of calls refused, of one run."""
    name, limit, load, seed = case
    scenario = SCENARIOS[name] if load is None else replace(SCENARIOS[name], offered=load)
    if limit == UPSTREAM:
        record = Whole(scenario.config, scenario.callers(limit), seed=seed).run()
    else:
        record = scenario.run(limit, None if limit == _ORACLE else LIMITS[limit](scenario.config.slots), seed)
    return record.work(WARM_UP, _END), record.share_refused(WARM_UP, _END)


def measure(cases: list[tuple[str, float | None]]) -> dict[tuple[str, str, float | None], tuple[float, float]]:
    """Of each scenario, load and limit: the share of the oracle's work, and of calls refused."""
    limits = [_ORACLE, *NAMES]
    runs = [(name, limit, load, seed) for name, load in cases for limit in limits for seed in range(SEEDS)]
    found = dict(zip(runs, everywhere(one, runs), strict=True))
    table = {}
    for (name, load), limit in itertools.product(cases, NAMES):
        seeds = range(SEEDS)
        work = middle(found[name, limit, load, seed][0] / found[name, _ORACLE, load, seed][0] for seed in seeds)
        table[name, limit, load] = work, middle(found[name, limit, load, seed][1] for seed in seeds)
    return table


def run() -> dict[str, float | bool]:
    """The shares, by scenario and limit, each with the share of its calls that were refused."""
    table = measure([*((name, None) for name in SCENARIOS), *(("steady", load) for load in LOADS)])
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
