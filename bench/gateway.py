"""What the gateway adds to a call, beside proxies that do nothing else, each in a process of its own.

Milliseconds that each adds to the direct call, at the median and at the 99th percentile: two callers that call one
after the other, interleaved rounds, medians over these. Requests a second of 32 callers. Memory of an open stream, of a
thousand.
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
    """A process of ours that prints its port: its id, and that port."""
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


def resident(pid: int) -> float:
    """Kilobytes."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return float(fields["VmRSS"].split()[0])


def percentile(took: list[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * sorted(took)[min(len(took) - 1, int(share * len(took)))]


def run() -> dict[str, float]:
    """The figures."""
    with contextlib.ExitStack() as stack:
        _, provider = stack.enter_context(started("bench.proxies.provider"))
        url = f"http://127.0.0.1:{provider}"
        pid, ours = stack.enter_context(started("bench.proxies.ours", url))
        _, aiohttp = stack.enter_context(started("bench.proxies.bare", "aiohttp", url))
        _, uvicorn = stack.enter_context(started("bench.proxies.bare", "uvicorn", url))
        ports = {"direct": provider, "aiohttp": aiohttp, "uvicorn": uvicorn, OURS: ours}
        figures: dict[str, float] = {}
        taken: dict[str, list[list[float]]] = {name: [] for name in ports}
        for number in range(ROUNDS + 1):
            for name, port in ports.items():
                took, _ = uvloop.run(closed_loop(port, callers=CALLERS, calls=CALLS))
                if number:  # the first one warms up
                    taken[name].append(took)
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            direct = [percentile(took, share) for took in taken["direct"]]
            figures[f"direct_{name}_ms"] = statistics.median(direct)
            for proxy in ("aiohttp", "uvicorn", OURS):
                added = (percentile(took, share) - bare for took, bare in zip(taken[proxy], direct, strict=True))
                figures[f"{proxy}_adds_{name}_ms"] = statistics.median(added)
        for name, port in ports.items():
            rates = []
            for _ in range(5):
                took, seconds = uvloop.run(closed_loop(port, callers=CROWD, calls=CROWD * 60))
                rates.append(len(took) / seconds)
            figures[f"{name}_per_second"] = statistics.median(rates)
        figures["kb_per_open_stream"] = uvloop.run(memory(pid, ours))
    return figures


async def memory(pid: int, port: int) -> float:
    """Kilobytes that the gateway holds for each stream that is open."""
    for caller in await open_streams(port, 50):
        caller.transport.close()
    before = resident(pid)
    callers = await open_streams(port, STREAMS)
    held = (resident(pid) - before) / STREAMS
    for caller in callers:
        caller.transport.close()
    return held


if os.cpu_count() == 1:
    print("one core: callers, proxy and provider share it, and what is measured is that")
