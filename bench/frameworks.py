"""Fifty agents of each framework on one key whose rate limit direct use breaks: in .venv-frameworks and .venv-crewai.

The agents are those of the contract suite, of three calls each with a tool between them; the provider is its double,
which accepts 100 requests a minute, 100 of them at once. All agents start at once. *Direct*: each framework as it is,
with the retries of OpenAI's client. *Forebay*: a supervisor with a slot for each, and their client bound to an upstream
that is not told the limit.

`--only overhead` measures what the adapters cost instead: the same agents, whose models answer in process without HTTP,
run by the framework itself in asyncio tasks, and by a supervisor. An agent that serves one run only is made before the
framework's time is taken, but an adapter makes it, or a copy, during its run. `--only 'overhead openai-swarm'` measures
one sample. It is processor time, which a busy machine changes little.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib import import_module
from operator import sub
from typing import Any, Final

from tests.frameworks.conftest import INSTALLED
from tests.frameworks.openai_double import OpenAIDouble, openai_double
from tests.frameworks.sample import InProcess, Sample, closeable

from forebay import BackpressureSupervisor, Task, Upstream
from forebay.adapters import Handler
from forebay.adapters.handler_spec import HandlerSpec

AGENTS: Final = 50
CALLS: Final = 3
REQUESTS, PERIOD = 100, 60.0
OVERHEAD: Final = "overhead"
BATCH: Final = 10  # agents at once of the overhead
ROUNDS, LEAST_ROUNDS = 301, 11  # of the overhead, each of one batch by either way
SECONDS: Final = 20.0  # after which a sample has no further rounds

Ask = Callable[[int], Awaitable[Any]]


def run(*, only: str = "") -> dict[str, float | str]:
    """Return the results of each framework that is installed, or of one sample; or what their adapters cost."""
    modules = (import_module(f"tests.frameworks.samples.{name}") for name in INSTALLED)
    samples: list[Sample] = [sample for module in modules for sample in module.SAMPLES]
    results: dict[str, float | str] = {}
    for sample in samples:
        if only in (OVERHEAD, f"{OVERHEAD} {sample.name}") and sample.in_process is not None:
            results |= asyncio.run(_overhead(sample.name, sample.in_process(note)))
        if only in (sample.name, "") and not sample.streams:
            results |= asyncio.run(_direct(sample))
            results |= asyncio.run(_forebay(sample))
    return results


def note(text: str) -> str:
    """Take a note."""
    return text


async def _direct(sample: Sample) -> dict[str, float | str]:
    with openai_double() as double:
        async with contextlib.AsyncExitStack() as stack:
            made = sample.make(lambda kind: _client(kind, double, stack), note)
            handler = HandlerSpec(worker="agent", **made).build()
            return await _measure(f"{sample.name}, direct", double, partial(_call, handler))


async def _call(handler: Handler, number: int) -> Any:
    task = Task("ask", f"river {number}")
    if not handler.blocking:
        return await handler.call(task)
    return await (await asyncio.get_running_loop().run_in_executor(None, handler.call, task))


async def _forebay(sample: Sample) -> dict[str, float | str]:
    key = Upstream("key", provider="openai", max_wait=300)
    with openai_double() as double:
        async with contextlib.AsyncExitStack() as stack:
            made = sample.make(lambda kind: key.bind(_client(kind, double, stack)), note)
            supervisor = await stack.enter_async_context(BackpressureSupervisor())
            supervisor.register_worker("agent", task_types=["ask"], max_concurrent=AGENTS, **made)

            def ask(number: int) -> Awaitable[Any]:
                return supervisor.run(Task("ask", f"river {number}"))

            results = await _measure(f"{sample.name}, Forebay", double, ask)
    (account,) = key.statistics().accounts
    metered = (account.input_tokens, account.output_tokens)
    results[f"{sample.name}, Forebay: tokens metered / counted"] = sum(metered) / sum(double.tokens)
    return results


async def _overhead(name: str, agent: InProcess) -> dict[str, float | str]:
    """Return medians of alternating rounds: the microseconds of a run, and what the supervisor and adapter add."""
    making: list[float] = []
    direct: list[float] = []
    ours: list[float] = []
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("agent", task_types=["ask"], max_concurrent=BATCH, **agent.arguments)

        async def run_directly() -> None:
            gc.collect()
            began = time.process_time()
            ready = [agent.ready() for _ in range(BATCH)]
            making.append(1e6 * (time.process_time() - began) / BATCH)
            direct.append(await _batch(ready))

        async def supervise() -> None:
            ours.append(await _batch([lambda text: supervisor.run(Task("ask", text))] * BATCH))

        await run_directly()  # what is made once
        await supervise()
        gc.collect()
        gc.freeze()  # the modules of the frameworks are not looked at again
        for times in (making, direct, ours):
            times.clear()
        ends = time.perf_counter() + SECONDS
        while len(direct) < ROUNDS and (len(direct) < LEAST_ROUNDS or time.perf_counter() < ends):
            ways = [run_directly, supervise]
            for measure in ways if len(direct) % 2 else reversed(ways):
                await measure()
    alone, added = statistics.median(direct), statistics.median(map(sub, ours, direct))
    return {
        f"{name}: us to make its agent": statistics.median(making),
        f"{name}: us of a run, direct": alone,
        f"{name}: us added": added,
        f"{name}: added, %": 100 * added / alone,
    }


async def _batch(asks: Sequence[Callable[[str], Awaitable[Any]]]) -> float:
    """Return the microseconds of processor time of one of the agents that run at once."""
    gc.collect()
    began = time.process_time()
    await asyncio.gather(*(ask(f"river {number}") for number, ask in enumerate(asks)))
    return 1e6 * (time.process_time() - began) / len(asks)


def _client(kind: Callable[..., Any], double: OpenAIDouble, stack: contextlib.AsyncExitStack) -> Any:
    client = kind(api_key="sk-bench", base_url=double.url)
    for each in closeable(client):
        if hasattr(each, "__aenter__"):
            stack.push_async_exit(each)
        else:
            stack.push(each)
    return client


async def _measure(name: str, double: OpenAIDouble, ask: Ask) -> dict[str, float | str]:
    double.limit(REQUESTS, PERIOD)
    double.calls = CALLS
    began = time.perf_counter()
    ended = await asyncio.gather(*(ask(number) for number in range(AGENTS)), return_exceptions=True)
    failures = Counter(type(each).__name__ for each in ended if isinstance(each, BaseException))
    return {
        f"{name}: failed of {AGENTS}": float(failures.total()),
        f"{name}: failed by": ", ".join(f"{count} {kind}" for kind, count in failures.items()) or "-",
        f"{name}: seconds": time.perf_counter() - began,
        f"{name}: calls accepted, {AGENTS * CALLS} needed": float(double.answered),
        f"{name}: calls refused": float(sum(each.status == 429 for each in double.requests)),
    }
