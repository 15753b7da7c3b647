"""How much of a provider is put to use for callers who have little time, where more come than it can serve.

Shares of its slots, from the second to the third minute, medians over seeds (SEEDS=3): a whole upstream that is told by
when each call must be answered, beside one that is not. The average call takes 6.8 seconds alone, a quarter of them
more than 12. A provider refuses what exceeds its slots, or shares its capacity among all, or shares it and works on for
callers who have left.
"""

from __future__ import annotations

from typing import Final

from bench.calls.plant import Callers
from bench.calls.scenarios import CALL, SLOTS, provider
from bench.calls.table import SEEDS, everywhere, middle
from bench.calls.whole import Whole
from forebay.sim.config import ProviderConfig

MINUTES: Final = 3.0
PROVIDERS: Final[dict[str, ProviderConfig]] = {
    "refuses": provider(),
    "shares": provider(overcommit=None),
    "shares, works on": provider(overcommit=None, run_on=True),
}
PATIENCE: Final = (20.0, 30.0, 60.0)  # seconds
LOADS: Final = (1.5, 3.0, 10.0)  # times the capacity
_UNTOLD: Final = 3.0


def used(config: ProviderConfig, *, times: float, patience: float, seed: int, tells: bool = True) -> float:
    """The share of the slots that was put to use, once all is under way."""
    callers = Callers(rate=lambda _: times * SLOTS / CALL, minutes=MINUTES, patience=patience)
    return Whole(config, callers, seed=seed, tells=tells).run().work(60, 60 * MINUTES) / SLOTS


def one(case: tuple[str, float, float, bool, int]) -> float:
    """One run."""
    name, patience, times, tells, seed = case
    return used(PROVIDERS[name], times=times, patience=patience, seed=seed, tells=tells)


def run() -> dict[str, float]:
    """The shares by provider, seconds that callers have, and load."""
    ways = [*((load, True) for load in LOADS), (_UNTOLD, False)]
    cases = [(name, patience, *way) for name in PROVIDERS for patience in PATIENCE for way in ways]
    runs = [(*case, seed) for case in cases for seed in range(SEEDS)]
    found = dict(zip(runs, everywhere(one, runs), strict=True))
    figures = {}
    for name, patience, load, tells in cases:
        where = f"{name}, {patience:g} s, {load:g}x{'' if tells else ', not told'}"
        figures[where] = middle(found[name, patience, load, tells, seed] for seed in range(SEEDS))
    return figures
