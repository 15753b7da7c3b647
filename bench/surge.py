"""The demo's surge, ten thousand tasks on ten workers and one key: Forebay, a classic supervisor, one with semaphores.

It takes about five and a half minutes. SURGE_SECONDS (100 for each side), SURGE_TASKS, SURGE_SPEED (of the simulated
provider) and SEED, in the environment, change it; ten seconds at speed 10 are the same surge in small, in which
Python costs relatively more.
"""

from __future__ import annotations

import os

import msgspec
from rich.console import Console

from demo.runner import run as run_surge
from demo.settings import Settings

SIDES = ("classic", "semaphore", "forebay")
REPORTED = (
    *("done", "failed", "spilled", "lost", "done_per_minute", "usd_per_done", "usd_ratio"),
    *("calls_429", "refused_share", "stray_429", "tokens_wasted", "wasted_share", "tokens_left"),
)


def run() -> dict[str, float | int | None]:
    """Return tasks done a minute on each side and their ratios (more is better), dollars, and lost tasks."""
    settings = Settings(
        tasks=int(os.environ.get("SURGE_TASKS", "10_000")),
        seconds=float(os.environ.get("SURGE_SECONDS", "100")),
        seed=int(os.environ.get("SEED", "7")),
        speed=float(os.environ.get("SURGE_SPEED", "1")),
        folder="build/bench",
    )
    if (status := run_surge(settings, Console(stderr=True))) != 0:
        raise SystemExit(status)
    report = msgspec.json.decode(settings.file("report.json").read_bytes())
    figures = {f"{side}_{name}": report[side][name] for name in REPORTED for side in SIDES}
    return {
        **{name: report[name] for name in ("tasks", "workers", "seconds", "seed")},
        **figures,
        "ratio": report["ratio"],
        "semaphore_ratio": report["semaphore_ratio"],
        "usd_least": report["usd_least"],
        "usd_ratio": report["usd_ratio"],
    }
