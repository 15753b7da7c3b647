"""Seconds until service is back after a trigger has passed, where every caller who got nothing comes again.

A provider that shares its capacity among all that is in flight, and works on for callers who have left; 0.8 times its
capacity is offered. The trigger: for a minute it stands still. Without a cap on what is in flight that is a metastable
failure: everything comes too late, is asked for again, and the load that keeps it so is of its own making (N. Bronson
et al., "Metastable Failures in Distributed Systems", HotOS 2021). Medians over seeds; no figure means never, in eight
minutes.
"""

from __future__ import annotations

import math
from typing import Final

from bench.calls.limits import LIMITS, OURS, SEMAPHORE, UPSTREAM
from bench.calls.picture import timelines
from bench.calls.scenarios import CALL, SLOTS, provider, steps
from bench.calls.simulated_key import Callers, LimitRun, RunRecord
from bench.calls.table import PICTURES, SEEDS, everywhere, middle
from bench.calls.upstream_run import UpstreamRun
from forebay.limit import FixedLimit

LOAD: Final = 0.8  # of the capacity
TRIGGER: Final = (120.0, 180.0)  # seconds from, to
MINUTES: Final = 11.0
_WINDOW: Final = 30.0  # seconds over which service is measured
_BACK: Final = 0.9  # of what was served before
_ALWAYS: Final = 1_000_000  # times that a caller comes again
CONTROL: Final = f"{SEMAPHORE}, uncapped retries"
NAMES: Final = (UPSTREAM, *LIMITS, CONTROL)


def one(case: tuple[str, int, bool]) -> RunRecord:
    """One run, refusing what exceeds the slots or sharing."""
    name, seed, shares = case
    config = provider(
        overcommit=None if shares else 1.0,
        finish_abandoned=shares,
        capacity_steps=steps((TRIGGER[0], 0), (TRIGGER[1], SLOTS)),
    )
    wild = name == CONTROL
    callers = Callers(
        rate=lambda _: LOAD * SLOTS / CALL,
        minutes=MINUTES,
        patience=60.0,
        queue_bound=2 * SLOTS if not wild else 100 * SLOTS,
        max_attempts=6 if name == SEMAPHORE else math.inf,
        holds_slot_while_retrying=name in (SEMAPHORE, CONTROL),
        resubmissions=_ALWAYS if wild else 3,
        max_delay=0.5 if wild else 8.0,
    )
    if name == UPSTREAM:
        return UpstreamRun(config, callers, seed=seed).run()
    limit = FixedLimit(20 * SLOTS) if wild else LIMITS[name](SLOTS)
    return LimitRun(config, callers, limit, seed=seed).run()


def seconds(record: RunRecord) -> float:
    """From the end of the trigger until service is back, and stays for two windows; infinity for never."""
    before = record.work(60, TRIGGER[0])
    at = TRIGGER[1]
    while at + 3 * _WINDOW <= 60 * MINUTES:
        if all(record.work(at + i * _WINDOW, at + (i + 1) * _WINDOW) >= _BACK * before for i in range(3)):
            return at - TRIGGER[1]
        at += 2.0
    return math.inf


def run() -> dict[str, float | bool | None]:
    """Seconds by limit and provider, and what is served at the end over what was served before the trigger."""
    figures: dict[str, float | bool | None] = {}
    for shares in (True, False):
        cases = [(name, seed, shares) for name in NAMES for seed in range(SEEDS)]
        records = dict(zip(cases, everywhere(one, cases), strict=True))
        kind = "sharing" if shares else "refusing"
        for name in NAMES:
            runs = [records[name, seed, shares] for seed in range(SEEDS)]
            took = middle(seconds(record) for record in runs)
            figures[f"{kind}, {name}, seconds"] = took if took < math.inf else None
            end = 60 * MINUTES
            figures[f"{kind}, {name}, served at the end"] = middle(
                record.work(end - 120, end) / record.work(60, TRIGGER[0]) for record in runs
            )
        PICTURES.mkdir(parents=True, exist_ok=True)
        timelines({name: records[name, 0, shares] for name in NAMES}, kind, TRIGGER, PICTURES)
    for name in (UPSTREAM, OURS):
        ours = [figures[f"{kind}, {name}, seconds"] for kind in ("sharing", "refusing")]
        figures[f"{name} within 90 s"] = all(took is not None and took <= 90 for took in ours)
    figures["the control collapses"] = figures[f"sharing, {CONTROL}, seconds"] is None
    return figures
