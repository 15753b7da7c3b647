"""Seconds until service recovers after an outage, where every caller that got no answer submits again.

The provider shares its capacity among the calls in flight, and works on for callers that have left; the offered load is
0.8 of its capacity. In the outage it stands still for a minute. Without a limit on the calls in flight that is a
metastable failure: every answer comes too late and is asked for again, so the overload sustains itself (N. Bronson et
al., "Metastable Failures in Distributed Systems", HotOS 2021). The same at a provider that refuses excess calls.
Medians over seeds; no number means no recovery within eight minutes.
"""

from __future__ import annotations

import math
from typing import Final

from bench.baselines.semaphore import SEMAPHORE
from bench.calls.charts import plot_recovery
from bench.calls.limit_run import Callers, LimitRun, RunRecord
from bench.calls.limits import LIMITS, OURS, UPSTREAM, select
from bench.calls.parallel_runs import CHARTS, SEEDS, rounded_median, run_parallel
from bench.calls.scenarios import CALL, SLOTS, provider, steps
from bench.calls.upstream_run import UpstreamRun
from forebay.limit import FixedLimit

LOAD: Final = 0.8  # of the capacity
TRIGGER: Final = (120.0, 180.0)  # seconds from, to: the outage
MINUTES: Final = 11.0
_WINDOW: Final = 30.0  # seconds over which service is measured
_RECOVERED: Final = 0.9  # share of the earlier service
_UNBOUNDED: Final = 1_000_000  # resubmissions
CONTROL: Final = f"{SEMAPHORE}, uncapped retries"  # must collapse, else the benchmark shows nothing
NAMES: Final = (UPSTREAM, *LIMITS, CONTROL)


def one(case: tuple[str, int, bool]) -> RunRecord:
    """Simulate one run, at a provider that shares its capacity or one that refuses excess calls."""
    name, seed, shares = case
    config = provider(
        overcommit=None if shares else 1.0,
        finish_abandoned=shares,
        capacity_steps=steps((TRIGGER[0], 0), (TRIGGER[1], SLOTS)),
    )
    control = name == CONTROL
    callers = Callers(
        rate=lambda _: LOAD * SLOTS / CALL,
        minutes=MINUTES,
        timeout=60.0,
        queue_bound=2 * SLOTS if not control else 100 * SLOTS,
        max_attempts=6 if name == SEMAPHORE else math.inf,
        holds_slot_while_retrying=name in (SEMAPHORE, CONTROL),
        resubmissions=_UNBOUNDED if control else 3,
        max_delay=0.5 if control else 8.0,
    )
    if name == UPSTREAM:
        return UpstreamRun(config, callers, seed=seed).run()
    limit = FixedLimit(20 * SLOTS) if control else LIMITS[name](SLOTS)
    return LimitRun(config, callers, limit, seed=seed).run()


def seconds(record: RunRecord) -> float:
    """Return the seconds from the end of the outage until service is back for three windows; infinity for never."""
    before = min(record.work(60, TRIGGER[0]), LOAD * SLOTS)  # more than is offered was what had waited at the start
    at = TRIGGER[1]
    while at + 3 * _WINDOW <= 60 * MINUTES:
        if all(record.work(at + i * _WINDOW, at + (i + 1) * _WINDOW) >= _RECOVERED * before for i in range(3)):
            return at - TRIGGER[1]
        at += 2.0
    return math.inf


def run(*, only: str | None = None) -> dict[str, float | bool | None]:
    """Return the seconds by provider and limit, and the service at the end over the service before the outage.

    With `only`, those of one name in `NAMES`.
    """
    names = select(NAMES, only)
    results: dict[str, float | bool | None] = {}
    for shares in (True, False):
        cases = [(name, seed, shares) for name in names for seed in range(SEEDS)]
        records = dict(zip(cases, run_parallel(one, cases), strict=True))
        kind = "sharing" if shares else "throttling"
        for name in names:
            runs = [records[name, seed, shares] for seed in range(SEEDS)]
            recovery = rounded_median(seconds(record) for record in runs)
            results[f"{kind}, {name}, seconds"] = recovery if recovery < math.inf else None
            end = 60 * MINUTES
            results[f"{kind}, {name}, served at the end"] = rounded_median(
                record.work(end - 120, end) / record.work(60, TRIGGER[0]) for record in runs
            )
        CHARTS.mkdir(parents=True, exist_ok=True)
        plot_recovery({name: records[name, 0, shares] for name in names}, kind, TRIGGER, CHARTS)
    for name in (name for name in (UPSTREAM, OURS) if name in names):
        ours = [results[f"{kind}, {name}, seconds"] for kind in ("sharing", "throttling")]
        results[f"{name} within 90 s"] = all(recovery is not None and recovery <= 90 for recovery in ours)
    if CONTROL in names:
        results["the control collapses"] = results[f"sharing, {CONTROL}, seconds"] is None
    return results
