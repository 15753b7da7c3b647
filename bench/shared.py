"""Admissions of processes that share an account, beside token-throttle and hardcap, and what becomes of its quota.

`round_trip`: each admission is one decision of the store. `leased`: each is one of the process, from the chunk that it
leases. `calls`: the same as users make them, `async with upstream.call()`. Medians of turns, all processes together.
The others are asked once for each call, and told once what it has used.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.account_caller import CENTS, QUOTA, THOUSANDS
from tests.support.counting_provider import CountingProvider, counting_provider
from tests.support.redis_servers import redis_server

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "shared.txt"
TURNS = 3
SECONDS = 2.0  # that each process admits in a turn
PROCESSES = (1, 2, 4)
OURS = ("round_trip", "leased", "calls")
OTHERS = {"sqlite": ("token_throttle",), "redis": ("token_throttle", "hardcap")}
USE_SECONDS = 40.0
CALLERS = 8  # of each process, while the use of the quota is measured


def _new_environment(path: Path) -> Path:
    """Return the Python of a new environment with the others."""
    python = path / "bin" / "python"
    for arguments in (
        ["venv", "--python", sys.executable, str(path)],
        ["pip", "install", "--python", str(python), "-r", str(LOCK)],
    ):
        subprocess.run([sys.executable, "-m", "uv", *arguments, "--quiet"], check=True)  # noqa: S603
    return python


@contextmanager
def _started(commands: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes, and let them begin once all are ready."""
    pipe = subprocess.PIPE
    with ExitStack() as stack:
        processes = []
        for command in commands:
            process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)  # noqa: S603
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        yield processes


def _rate(python: str, module: str, kind: str, url: str, processes: int) -> tuple[float, float]:
    """Return the admissions a second of all processes, and the microseconds of their processors for one."""
    command = [python, "-m", module, kind, url, str(SECONDS)]
    count = cpu = 0.0
    with _started([command] * processes) as running:
        for process in running:
            assert process.stdout is not None
            calls, seconds = process.stdout.readline().split()
            count += float(calls)
            cpu += float(seconds)
        for process in running:  # one that is killed leaves the next ones to wait for what it may have used
            process.wait(timeout=30)
    return count / SECONDS, 1e6 * cpu / count


def _quota(url: str) -> dict[str, float]:
    """Return how much of a quota four processes use that always have calls, and by how much they pass it at most."""
    with counting_provider() as provider:
        models = [CENTS, *(THOUSANDS.replace("*", str(number)) for number in range(1, 4))]
        caller = [sys.executable, "-m", "tests.support.account_caller", url, str(provider.port)]
        with _started([[*caller, model, str(CALLERS)] for model in models]):
            started = time.monotonic()
            time.sleep(USE_SECONDS)
        return _use(provider, started)


def _use(provider: CountingProvider, started: float) -> dict[str, float]:
    rate = QUOTA.amount / QUOTA.seconds
    times = [arrived - started for arrived in provider.arrivals if arrived - started <= USE_SECONDS]
    granted = [QUOTA.amount + rate * arrived for arrived in times]
    overshoot = max(count / amount - 1.0 for count, amount in zip(range(1, len(times) + 1), granted, strict=True))
    return {"use": len(times) / (QUOTA.amount + rate * USE_SECONDS), "overshoot": max(0.0, overshoot)}


def run(*, quick: bool = False) -> dict[str, Any]:
    """Return admissions a second (more is better), microseconds of processor for one, and shares of a quota."""
    results: dict[str, Any] = {"cores": os.cpu_count()}
    rates: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = str(_new_environment(directory / "venv"))
        server = stack.enter_context(redis_server())
        for turn in range(1 if quick else TURNS):
            urls = {
                "sqlite": f"sqlite:///{directory}/{{}}-{turn}.db",
                "redis": f"redis://127.0.0.1:{server.master().port}/0",
            }
            for store, url in urls.items():
                for count in PROCESSES:
                    for kind in (*OURS, *OTHERS[store]):
                        ours = kind in OURS
                        module = "bench.accounts.ledger_calls" if ours else "bench.baselines.shared_limits"
                        measured = _rate(sys.executable if ours else python, module, kind, url.format(kind), count)
                        rates.setdefault(f"{store}_{kind}_{count}", []).append(measured)
        for name, measured_ in rates.items():
            results[f"{name}_per_s"] = statistics.median(rate for rate, _ in measured_)
            results[f"{name}_us"] = statistics.median(cpu for _, cpu in measured_)
        for store, url in {
            "sqlite": f"sqlite:///{directory}/use.db",
            "redis": f"redis://127.0.0.1:{server.master().port}/1",
        }.items():
            for name, share in _quota(url).items():
                results[f"{store}_{name}"] = share
    return results
