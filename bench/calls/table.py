"""Runs of many scenarios and limits at once, and what they come to."""

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
PICTURES: Final = Path("build") / "bench"


def everywhere(run: Callable[[A], B], cases: Iterable[A]) -> list[B]:
    """Run all cases on all processors, in order."""
    with ProcessPoolExecutor() as pool:
        return list(pool.map(run, cases))


def middle(values: Iterable[float]) -> float:
    """The median, to three places."""
    return round(median(values), 3)
