"""Many seeds of surges, over all cores: ``make sim ARGS="--seeds 0:5000 --failures 1"``."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

from tests.sim import surge

PATIENCE = 120  # real seconds for one seed


def seeds(text: str) -> range:
    """A seed, or a range of seeds ``first:past``."""
    first, colon, past = text.partition(":")
    return range(int(first), int(past)) if colon else range(int(first), int(first) + 1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__)
    parser.add_argument("--seeds", type=seeds, default=range(2000), help="FIRST:PAST, or one; by default 0:2000")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; by default one a core")
    return parser.parse_args()


def too_long(*_: object) -> None:
    """Stop a seed that does not come to an end: virtual time stands still in a loop without an await."""
    message = f"it took longer than {PATIENCE} s"
    raise TimeoutError(message)


def prove(seed: int) -> tuple[int, str | None, Counter[str]]:
    """Run a seed: what was broken, if anything was, and what happened in it."""
    logging.disable(logging.NOTSET)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(PATIENCE)
    try:
        return seed, None, surge.run(seed).happened
    except BaseException as failure:  # noqa: BLE001 - told to the parent
        return seed, f"{type(failure).__name__}: {failure}", Counter()
    finally:
        signal.alarm(0)


def outcomes(pool: ProcessPoolExecutor, wanted: range, jobs: int) -> Iterator[tuple[int, str | None, Counter[str]]]:
    """As they come; so few are under way at a time that one can stop."""
    rest = iter(wanted)
    under_way: set[Future[tuple[int, str | None, Counter[str]]]] = set()
    while True:
        under_way |= {pool.submit(prove, seed) for seed in itertools.islice(rest, 4 * jobs - len(under_way))}
        if not under_way:
            return
        done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def main() -> int:
    """Run the seeds, print the command that repeats each failure, and sum up."""
    options = arguments()
    began = time.monotonic()
    tried, failed, happened = 0, 0, Counter[str]()
    with ProcessPoolExecutor(options.jobs) as pool:
        for seed, failure, what in outcomes(pool, options.seeds, options.jobs):
            tried += 1
            happened += what
            if failure is not None:
                failed += 1
                print(f"seed {seed}: {failure}")
                print(f"  Repeat it with: .venv/bin/python -m tests.sim.surge {seed}", flush=True)
                if failed >= options.failures:
                    break
        pool.shutdown(cancel_futures=True)
    print(f"{tried} seeds in {time.monotonic() - began:.0f} s, {failed} failed; {happened['admitted']} tasks admitted,")
    print("  " + ", ".join(f"{count} {name}" for name, count in sorted(happened.items()) if name != "admitted"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
