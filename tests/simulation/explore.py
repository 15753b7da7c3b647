"""Surges, storms and supervisor scripts for ranges of seeds, on all cores: ``make sim ARGS="--seeds 0:5000"``.

``--inject NAME`` injects a bug of ``tests/mutation/bugs.py`` first, and stops at the first seed that finds it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeAlias

from hypothesis import HealthCheck, given, seed, settings
from tests.mutation import bugs
from tests.simulation import (
    blame_storm,
    call_surge,
    control_storm,
    conversation_mix,
    fair_share,
    fan_out_storm,
    hook_storm,
    money_storm,
    retry_storm,
    shutdown_storm,
    supervisor_scripts,
    surge,
    task_storm,
    tree_storm,
)

TIMEOUT = 300  # real seconds for one seed or batch
INJECTED_SEEDS = range(200)
BATCH = 100  # scripts
TASK_STORMS = (task_storm, shutdown_storm, conversation_mix, hook_storm, fair_share, retry_storm, fan_out_storm)
TREES = (tree_storm,)
CALL_STORMS = (control_storm, blame_storm, money_storm)

Outcome: TypeAlias = tuple[str, Counter[str]]  # the violation and how to repeat it, or ""; counts of outcomes
Job: TypeAlias = tuple[Callable[[int], Counter[str]], int, str]  # function, its number, the command that repeats it


def numbers(text: str) -> range:
    """Parse a number, or a range ``first:end``."""
    first, colon, end = text.partition(":")
    return range(int(first), int(end)) if colon else range(int(first), int(first) + 1)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=numbers, help="seeds of surges: FIRST:END, by default 0:2000")
    parser.add_argument("--storms", type=numbers, help="seeds of storms, by default 0:500")
    parser.add_argument("--batches", type=numbers, help=f"batches of {BATCH} scripts, by default 0:40")
    parser.add_argument("--failures", type=int, default=10, help="stop after that many failures")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; by default one per core")
    parser.add_argument(
        "--inject", metavar="NAME", help="inject a bug of tests/mutation/bugs.py; stop once it is found"
    )
    options = parser.parse_args()
    named = (options.seeds, options.storms, options.batches) != (None, None, None)  # then the others are left out
    defaults = (range(0), INJECTED_SEEDS, range(0)) if options.inject else (range(2000), range(500), range(40))
    for name, default in zip(("seeds", "storms", "batches"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, range(0) if named else default)
    if options.inject:
        options.failures = 1
    return options


def one_surge(number: int) -> Counter[str]:
    """Run the surge of a seed."""
    return surge.run(number).happened


def one_call_surge(number: int) -> Counter[str]:
    """Run the surge of a seed on a supervisor and an upstream, and its plateau."""
    return Counter({f"calls {what}": count for what, count in call_surge.run_with_plateau(number).happened.items()})


def one_storm(number: int) -> Counter[str]:
    """Run all storms of a seed on the task plane, and two of supervision trees, which are short."""
    trees = run_storms(2 * number, TREES) + run_storms(2 * number + 1, TREES)
    return run_storms(number, TASK_STORMS) + Counter({"tree storms": trees.pop("storms")}) + trees


def one_call_storm(number: int) -> Counter[str]:
    """Run all storms of a seed on the call plane."""
    happened = run_storms(number, CALL_STORMS)
    return Counter({"storms": 1, "calls in storms": happened.total()})


def run_storms(number: int, storms: Iterable[Any]) -> Counter[str]:
    """Run storms of a seed."""
    happened = Counter(storms=1)
    for storm in storms:
        try:
            happened += storm.run(number).happened
        except BaseException as failure:
            failure.add_note(f"in {storm.__name__}")
            raise
    return happened


def one_batch(number: int) -> Counter[str]:
    """Run scripts that hypothesis draws from the batch's number; a failure names the smallest script that fails."""
    happened = Counter(scripts=BATCH)

    @seed(number)
    @settings(max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(script=supervisor_scripts.SCRIPTS)
    def run(script: supervisor_scripts.SupervisorScript) -> None:
        supervisor_scripts.run_script(script)

    run()
    return happened


def too_long(*_: object) -> None:
    """Stop a run that does not end: virtual time stands still in a loop without an await."""
    message = f"it took longer than {TIMEOUT} s"
    raise TimeoutError(message)


def run_job(job: Job) -> Outcome:
    """Run a job in a process of the pool."""
    work, number, command = job
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("forebay").setLevel(logging.CRITICAL if work in (one_storm, one_call_storm) else logging.ERROR)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(TIMEOUT)
    try:
        return "", work(number)
    except BaseException as failure:  # noqa: BLE001 - returned to the parent
        notes = "\n".join(getattr(failure, "__notes__", ()))
        return f"{type(failure).__name__}: {failure}\n{notes}\n  Repeat it with: {command}", Counter()
    finally:
        signal.alarm(0)
        gc.collect()  # a simulation collects the young generation only


def outcomes(pool: ProcessPoolExecutor, jobs: Iterator[Job], ahead: int) -> Iterator[Outcome]:
    """Yield outcomes as jobs finish; only a few jobs are submitted ahead, so that the caller can stop."""
    pending: set[Future[Outcome]] = set()
    while True:
        pending |= {pool.submit(run_job, job) for job in itertools.islice(jobs, ahead - len(pending))}
        if not pending:
            return
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def inject(name: str | None) -> None:
    """Inject a bug into this process."""
    if name:
        getattr(bugs, name)()


def main() -> int:
    """Run all jobs, print the command that repeats each failure, and print a summary."""
    options = arguments()
    start = time.monotonic()
    failed, happened = 0, Counter[str]()
    scripts: Iterator[Job] = (
        (one_batch, number, f'make sim ARGS="--seeds 0:0 --batches {number}"') for number in options.batches
    )
    surges: Iterator[Job] = (
        (one_surge, number, f".venv/bin/python -m tests.simulation.surge {number}") for number in options.seeds
    )
    calls: Iterator[Job] = (
        (one_call_surge, number, f".venv/bin/python -m tests.simulation.call_surge {number}")
        for number in options.seeds
    )
    injected = f" --inject {options.inject}" if options.inject else ""
    storms: Iterator[Job] = (
        (storm, number, f'make sim ARGS="--storms {number}{injected}"')
        for number in options.storms
        for storm in (one_storm, one_call_storm)
    )
    jobs = itertools.chain(scripts, storms, surges, calls)
    with ProcessPoolExecutor(options.jobs, initializer=inject, initargs=(options.inject,)) as pool:
        for failure, what in outcomes(pool, jobs, (1 if options.inject else 4) * options.jobs):
            happened += what
            happened["surges"] += not failure and not {"scripts", "storms"} & set(what)
            if failure:
                failed += 1
                print(failure, flush=True)
                if failed >= options.failures:
                    break
        pool.shutdown(cancel_futures=True)
    passed = ", ".join(f"{happened.pop(kind, 0)} {kind}" for kind in ("surges", "storms", "scripts"))
    print(f"{passed} passed and {failed} failed, in {time.monotonic() - start:.0f} s. In them:")
    print("  " + ", ".join(f"{count} {name}" for name, count in sorted(happened.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
