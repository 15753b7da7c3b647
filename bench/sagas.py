"""Sagas of three steps in SQLite, every commit on disk, compared with workflows of three steps on DBOS in SQLite."""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forebay import BackpressureSupervisor, Task
from forebay.saga import SagaRun, saga

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "dbos.txt"
TURNS = 5
AT_ONCE = {1: (200, 100), 100: (5_000, 300)}  # sagas at once: how many here, and how many on DBOS, in a turn
WARM_UP = 20
# DBOS as it comes, and with the best settings found for SQLite: the journal mode of its file, and its connections.
SETTINGS = {"dbos": ("delete", 20), "dbos_tuned": ("wal", 2)}
WAYS = ("threads", "asyncio")  # in which it runs workflows
SYNCS = 200  # to measure the disk


async def _research(number: int) -> dict[str, int]:
    return {"notes": number}


async def _draft(notes: dict[str, int]) -> dict[str, int]:
    return {"draft": notes["notes"] + 1}


async def _publish(draft: dict[str, int]) -> dict[str, int]:
    return {"page": draft["draft"] + 1}


async def _undo(output: dict[str, int] | None) -> None:
    pass


@saga("publish")
async def _saga(run: SagaRun, number: int) -> Any:
    notes = await run.step("research", _research, number, compensate=_undo)
    draft = await run.step("draft", _draft, notes, compensate=_undo)
    return await run.step("publish", _publish, draft, compensate=_undo)


async def _saga_seconds(url: str, at_once: int, count: int) -> float:
    """Return the seconds of `count` sagas; each of `at_once` callers runs one after the other."""
    async with BackpressureSupervisor(saga_log=url) as supervisor:
        supervisor.register_worker("publisher", handler=_saga, task_types=["publish"], max_concurrent=at_once)

        async def run_all(count: int) -> None:
            numbers = iter(range(count))

            async def run() -> None:
                for number in numbers:
                    assert await supervisor.run(Task("publish", number)) == {"page": number + 2}

            await asyncio.gather(*(run() for _ in range(at_once)))

        await run_all(WARM_UP)
        gc.collect()
        started = time.perf_counter()
        await run_all(count)
        return time.perf_counter() - started


def _dbos_seconds(python: Path, *arguments: object) -> float:
    """Return the seconds that `bench.baselines.dbos_sagas` prints."""
    command = [str(python), "-m", "bench.baselines.dbos_sagas", *map(str, arguments)]
    ended = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, timeout=600)  # noqa: S603
    return float(ended.stdout)


def _new_environment(path: Path) -> Path:
    """Return the Python of a new environment with DBOS."""
    python = path / "bin" / "python"
    for arguments in (
        ["venv", "--python", sys.executable, str(path)],
        ["pip", "install", "--python", str(python), "-r", str(LOCK)],
    ):
        subprocess.run([sys.executable, "-m", "uv", *arguments, "--quiet"], check=True)  # noqa: S603
    return python


def _sync_ms(path: Path) -> float:
    """Return the median time of an fdatasync after a write of 4 kB, in milliseconds."""
    seconds = []
    with path.open("wb", buffering=0) as file:
        for _ in range(SYNCS):
            file.write(bytes(4096))
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def _turn(python: Path, at_once: int) -> Mapping[str, float]:
    """Return the sagas per second of each kind, each with a new file in the same directory."""
    here, there = AT_ONCE[at_once]
    rates = {}
    with tempfile.TemporaryDirectory() as directory:
        for how in ("yes", "checkpoint"):
            url = f"sqlite:///{directory}/{how}.db?fsync={how}"
            rates[f"fsync_{how}"] = here / asyncio.run(_saga_seconds(url, at_once, here))
        for setting, (journal, pool) in SETTINGS.items():
            for way in WAYS:
                path = Path(directory, f"{setting}_{way}.db")
                seconds = _dbos_seconds(python, path, journal, pool, way, at_once, there)
                rates[f"{setting}_{way}"] = there / seconds
    return rates


def run(*, quick: bool = False) -> dict[str, Any]:
    """Return sagas per second, and the ratios of those at ``fsync=yes`` to the rates of DBOS: medians of turns.

    DBOS leaves SQLite at its defaults, ``synchronous=FULL`` and a rollback journal: a commit is on disk before it is
    acknowledged. As tuned it is as durable, and faster. So is ``fsync=yes``. With ``fsync=checkpoint`` a power failure
    can take the latest commits: its rate has nothing beside it.
    """
    results: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as directory:
        python = _new_environment(Path(directory, "venv"))
        results["sync_ms"] = _sync_ms(Path(directory, "sync"))
        for at_once in AT_ONCE:
            turns = [_turn(python, at_once) for _ in range(1 if quick else TURNS)]
            for name in turns[0]:
                results[f"at_{at_once}_{name}_per_s"] = statistics.median(turn[name] for turn in turns)
            for name in turns[0]:
                if name.startswith("dbos"):
                    ratios = [turn["fsync_yes"] / turn[name] for turn in turns]
                    results[f"at_{at_once}_over_{name}"] = statistics.median(ratios)
    return results
