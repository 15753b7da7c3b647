"""Runs of many scenarios and limits in parallel, and their medians."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Final, TypeVar

A = TypeVar("A")
B = TypeVar("B")

SEEDS: Final = int(os.environ.get("SEEDS", "3"))
CHARTS: Final = Path("build") / "bench"


def run_parallel(run: Callable[[A], B], cases: Iterable[A]) -> list[B]:
    """Run all cases on all processors; return the results in order."""
    with ProcessPoolExecutor() as pool:
        return list(pool.map(run, cases))


def rounded_median(values: Iterable[float]) -> float:
    """Return the median, to three places."""
    return round(median(values), 3)
