"""Latency that the gateway adds to a call, compared with proxies that only forward, each in its own process.

Milliseconds that each adds to the direct call, at the median and at the 99th percentile: two callers in a closed loop,
interleaved rounds, medians over the rounds. Requests per second of 32 callers. Memory per open stream, of a thousand.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import uvloop

from bench.proxies.load import closed_loop, open_streams

ROUNDS = 15
CALLS = 600
CALLERS = 2
CROWD = 32
STREAMS = 1000
OURS = "gateway"


@contextlib.contextmanager
def started(*command: str) -> Iterator[tuple[int, int]]:
    """Start a Python module that prints its port; yield its process id and the port, and stop it at the end."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE)  # noqa: S603
    try:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def resident_kb(pid: int) -> float:
    """Return the resident memory of a process in kilobytes."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return float(fields["VmRSS"].split()[0])


def percentile_ms(seconds: list[float], share: float) -> float:
    """Return a percentile of durations in milliseconds."""
    return 1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def run() -> dict[str, float]:
    """Return the latencies, rates and memory."""
    with contextlib.ExitStack() as stack:
        _, provider = stack.enter_context(started("bench.proxies.provider"))
        url = f"http://127.0.0.1:{provider}"
        pid, ours = stack.enter_context(started("bench.proxies.forebay_gateway", url))
        _, aiohttp = stack.enter_context(started("bench.baselines.bare_proxy", "aiohttp", url))
        _, uvicorn = stack.enter_context(started("bench.baselines.bare_proxy", "uvicorn", url))
        ports = {"direct": provider, "aiohttp": aiohttp, "uvicorn": uvicorn, OURS: ours}
        results: dict[str, float] = {}
        latencies: dict[str, list[list[float]]] = {name: [] for name in ports}
        for number in range(ROUNDS + 1):
            for name, port in ports.items():
                calls, _ = uvloop.run(closed_loop(port, callers=CALLERS, calls=CALLS))
                if number:  # the first round warms up
                    latencies[name].append(calls)
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            direct = [percentile_ms(calls, share) for calls in latencies["direct"]]
            results[f"direct_{name}_ms"] = statistics.median(direct)
            for proxy in ("aiohttp", "uvicorn", OURS):
                rounds = zip(latencies[proxy], direct, strict=True)
                added = (percentile_ms(calls, share) - bare for calls, bare in rounds)
                results[f"{proxy}_adds_{name}_ms"] = statistics.median(added)
        for name, port in ports.items():
            rates = []
            for _ in range(5):
                calls, seconds = uvloop.run(closed_loop(port, callers=CROWD, calls=CROWD * 60))
                rates.append(len(calls) / seconds)
            results[f"{name}_per_second"] = statistics.median(rates)
        results["kb_per_open_stream"] = uvloop.run(kb_per_stream(pid, ours))
    return results


async def kb_per_stream(pid: int, port: int) -> float:
    """Return the kilobytes that the gateway holds for each open stream."""
    for caller in await open_streams(port, 50):
        caller.transport.close()
    before = resident_kb(pid)
    callers = await open_streams(port, STREAMS)
    held = (resident_kb(pid) - before) / STREAMS
    for caller in callers:
        caller.transport.close()
    return held


if os.cpu_count() == 1:
    print("only one core: callers, proxy and provider share it, so the results say little")
