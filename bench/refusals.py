"""Goodput of a whole upstream at providers whose refusals say nothing or mislead, relative to an oracle.

Ten simulated minutes for each scenario, the first left out; medians over seeds (SEEDS=3). The columns are goodput, the
share of calls refused from the second minute on, the same from the sixth, and Jain's index of what each process of
those that share the key was served.
"""

from __future__ import annotations

from typing import Final

from bench.calls.parallel_runs import SEEDS, rounded_median, run_parallel
from bench.calls.rate_scenarios import RATE_SCENARIOS
from bench.calls.scenarios import MINUTES, WARM_UP
from bench.calls.upstream_run import UpstreamRun

QUICK: Final = ("rate, nothing told", "slots, Retry-After 30", "slots, penalty of 20 s")
_END: Final = 60 * MINUTES
_LATE: Final = 300.0  # seconds


def one(case: tuple[str, int]) -> tuple[float, float, float, float]:
    """Return goodput over an oracle's, the shares of calls refused, and the fairness, of one run."""
    name, seed = case
    scenario = RATE_SCENARIOS[name]
    run = UpstreamRun(scenario.config, scenario.callers("upstream"), seed=seed, processes=scenario.processes)
    record = run.run()
    oracle = scenario.run("oracle", None, seed).work(WARM_UP, _END)
    work = record.work(WARM_UP, _END) / oracle
    return work, record.share_refused(WARM_UP, _END), record.share_refused(_LATE, _END), run.fairness()


def run(*, quick: bool = False) -> dict[str, float | bool]:
    """Return goodput and refused calls by scenario; each line is printed when it is done."""
    seeds = 1 if quick else SEEDS
    results: dict[str, float | bool] = {}
    for name in QUICK if quick else RATE_SCENARIOS:
        runs = run_parallel(one, [(name, seed) for seed in range(1, seeds + 1)])
        work, refused, late, fairness = (rounded_median(column) for column in zip(*runs, strict=True))
        shared = f"   fairness {fairness:.2f}" if RATE_SCENARIOS[name].processes > 1 else ""
        print(f"{name:45}{work:9.3f} {refused:7.1%} {late:7.1%}{shared}", flush=True)
        results |= {name: work, f"{name}, refused": refused}
    return results
