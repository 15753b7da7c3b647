"""Latency that the gateway adds to a call, compared with proxies beside it, each in its own process.

``--sides relay,uvicorn,forebay,workers,litellm`` chooses them: *relay* and *uvicorn* only forward (aiohttp on both
sides, and uvicorn over aiohttp's client), *workers* is the gateway with two worker processes, *litellm* is its proxy,
for which `bench.proxies.litellm_proxy` says what to install.

Milliseconds that each adds to the direct call, at the median and at the 99th percentile: two callers in a closed loop,
interleaved rounds, medians over the rounds. Calls per second of 32 callers, and microseconds of processor for each,
which depend less on what else the machine does: medians, and of ratios of processor time the least of each side. Calls
per second of 64 callers of two workers over those of one process, in interleaved rounds: medians, by the clock and by
the processor time of the busier worker, which is what they are with a core for each. The part of the busier worker in
the processor time of both, and of both in that of all processes, callers and provider included: on two cores the ratio
by the clock is at most twice that. Memory per open stream of the gateway.
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
QUICK_ROUNDS = 3
CALLS = 600
CALLERS = 2
CROWD = 32
CROWD_ROUNDS = 5
WORKERS_ROUNDS = 15
WORKERS_QUICK_ROUNDS = 7
WORKERS_CALLERS = 64
STREAMS = 1000
OURS = "forebay"
WORKERS = "workers"
BASELINE = "relay"
SIDES = {
    "relay": ("bench.baselines.bare_proxy", "aiohttp"),
    "uvicorn": ("bench.baselines.bare_proxy", "uvicorn"),
    "forebay": ("bench.proxies.forebay_gateway",),
    "litellm": ("bench.proxies.litellm_proxy",),
}
DEFAULT_SIDES = "relay,uvicorn,forebay,workers"


@contextlib.contextmanager
def started(*command: str) -> Iterator[tuple[int, int]]:
    """Start a Python module that prints its port; yield its process id and the port, and stop it at the end.

    A module that starts another process prints the id of that too.
    """
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE)  # noqa: S603
    try:
        assert process.stdout is not None
        printed = process.stdout.readline().split()
        if not printed:
            sys.exit(f"{command[0]} did not start")  # it has said why
        yield int(printed[1]) if len(printed) > 1 else process.pid, int(printed[0])
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process until now; 0 where the system does not say (it is not Linux)."""
    threads = Path(f"/proc/{pid}/task")
    if not threads.exists():
        return 0.0
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads.iterdir()) / 1e9


def resident_kb(pid: int) -> float:
    """Return the resident memory of a process in kilobytes."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return float(fields["VmRSS"].split()[0])


def percentile_ms(seconds: list[float], share: float) -> float:
    """Return a percentile of durations in milliseconds."""
    return 1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def run(*, sides: str = DEFAULT_SIDES, quick: bool = False) -> dict[str, float]:
    """Return the latencies, rates, processor times and memory."""
    names = list(dict.fromkeys(sides.split(",")))
    if unknown := [name for name in names if name not in (*SIDES, WORKERS)]:
        sys.exit(f"there is no side {unknown[0]!r}: choose among {','.join((*SIDES, WORKERS))}")
    with contextlib.ExitStack() as stack:
        provider_pid, provider = stack.enter_context(started("bench.proxies.provider"))
        url = f"http://127.0.0.1:{provider}"
        running = {"direct": (provider_pid, provider)}
        for name in (name for name in names if name != WORKERS):
            running[name] = stack.enter_context(started(*SIDES[name], url))
        results = added_latencies(
            {name: port for name, (_, port) in running.items()}, QUICK_ROUNDS if quick else ROUNDS
        )
        results |= rates(running, QUICK_ROUNDS if quick else CROWD_ROUNDS)
        if WORKERS in names:
            results |= worker_rates(url, provider_pid, WORKERS_QUICK_ROUNDS if quick else WORKERS_ROUNDS)
        if OURS in running:
            results["kb_per_open_stream"] = uvloop.run(kb_per_stream(*running[OURS]))
    return results


def added_latencies(ports: dict[str, int], rounds: int) -> dict[str, float]:
    """Return the latency of a direct call, and what each proxy adds to it."""
    latencies: dict[str, list[list[float]]] = {name: [] for name in ports}
    for number in range(rounds + 1):
        for name, port in ports.items():
            calls, _ = uvloop.run(closed_loop(port, callers=CALLERS, calls=CALLS))
            if number:  # the first round warms up
                latencies[name].append(calls)
    results: dict[str, float] = {}
    for percentile, share in (("p50", 0.5), ("p99", 0.99)):
        direct = [percentile_ms(calls, share) for calls in latencies["direct"]]
        results[f"direct_{percentile}_ms"] = statistics.median(direct)
        for name in ports.keys() - {"direct"}:
            pairs = zip(latencies[name], direct, strict=True)
            added = (percentile_ms(calls, share) - bare for calls, bare in pairs)
            results[f"{name}_adds_{percentile}_ms"] = statistics.median(added)
    return results


def rates(running: dict[str, tuple[int, int]], rounds: int) -> dict[str, float]:
    """Return calls per second and microseconds of processor for each; and our rates over those of the bare relay."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    processor: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, (pid, port) in running.items():
            before = cpu_seconds(pid)
            calls, took = uvloop.run(closed_loop(port, callers=CROWD, calls=CROWD * 60))
            seconds[name].append(took / len(calls))
            processor[name].append((cpu_seconds(pid) - before) / len(calls))
    results: dict[str, float] = {}
    for name in running:
        results[f"{name}_per_second"] = 1 / statistics.median(seconds[name])
        results[f"{name}_processor_us"] = 1e6 * statistics.median(processor[name])
    for name in running.keys() - {"direct", BASELINE}:
        if BASELINE in running:
            pairs = list(zip(seconds[BASELINE], seconds[name], strict=True))
            results[f"{name}_over_{BASELINE}"] = statistics.median(bare / ours for bare, ours in pairs)
            least = min(processor[name])
            results[f"{name}_over_{BASELINE}_processor"] = min(processor[BASELINE]) / least if least else 0.0
    return results


def worker_rates(url: str, provider: int, rounds: int) -> dict[str, float]:
    """Return the calls per second of two workers over those of one process, and how evenly they are divided.

    Args:
        url: of the provider.
        provider: its process id.
        rounds: of which one more is made, to warm up.
    """
    found: dict[str, list[float]] = {}
    with started(*SIDES[OURS], url) as (one, one_port), started(*SIDES[OURS], url, "2") as (parent, two_port):
        for number in range(rounds + 1):
            one_took, (one_spent, *_) = timed_calls(one_port, [one])
            two_took, (callers, provided, *spent) = timed_calls(two_port, [os.getpid(), provider, *children(parent)])
            if not number:
                continue
            round_ = {"two_workers_over_one": one_took / two_took}
            if spent:
                round_["two_workers_over_one_processor"] = one_spent / max(spent)
                round_["busier_worker"] = max(spent) / sum(spent)
                round_["gateway_of_all_processor"] = sum(spent) / (callers + provided + sum(spent))
            for name, value in round_.items():
                found.setdefault(name, []).append(value)
    for name, values in found.items():
        print(f"{name}, each round:", *(f"{value:.2f}" for value in values))
    return {name: statistics.median(values) for name, values in found.items()}


def timed_calls(port: int, pids: list[int]) -> tuple[float, list[float]]:
    """Make calls; return the seconds that they took, and the processor time of each of these processes."""
    before = [cpu_seconds(pid) for pid in pids]
    _, took = uvloop.run(closed_loop(port, callers=WORKERS_CALLERS, calls=WORKERS_CALLERS * 60))
    return took, [cpu_seconds(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]


def children(pid: int) -> list[int]:
    """Return the process ids of the children of a process; none where the system does not say (it is not Linux)."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


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
