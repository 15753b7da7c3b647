"""Workflows of three steps on DBOS, with its system database in SQLite. It runs in an environment that has DBOS.

As a program, it takes the path of the file, the journal mode, how many connections DBOS has, `threads` or `asyncio`,
how many workflows run at once, and how many there are. It prints the seconds that they take together.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from dbos import DBOS, DBOSConfig

SYNCHRONOUS_FULL = 2  # every commit is on disk before it is acknowledged
WARM_UP = 20


@DBOS.step()
def _research(number: int) -> dict[str, int]:
    return {"notes": number}


@DBOS.step()
def _draft(notes: dict[str, int]) -> dict[str, int]:
    return {"draft": notes["notes"] + 1}


@DBOS.step()
def _publish(draft: dict[str, int]) -> dict[str, int]:
    return {"page": draft["draft"] + 1}


@DBOS.workflow()
def _workflow(number: int) -> dict[str, int]:
    return _publish(_draft(_research(number)))


@DBOS.step()
async def _research_async(number: int) -> dict[str, int]:
    return {"notes": number}


@DBOS.step()
async def _draft_async(notes: dict[str, int]) -> dict[str, int]:
    return {"draft": notes["notes"] + 1}


@DBOS.step()
async def _publish_async(draft: dict[str, int]) -> dict[str, int]:
    return {"page": draft["draft"] + 1}


@DBOS.workflow()
async def _workflow_async(number: int) -> dict[str, int]:
    return await _publish_async(await _draft_async(await _research_async(number)))


def _in_threads(at_once: int, count: int) -> None:
    """Run `count` workflows; each of `at_once` threads starts one and waits for its result, again and again."""
    numbers, lock = iter(range(count)), threading.Lock()

    def run() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            assert DBOS.start_workflow(_workflow, number).get_result() == {"page": number + 2}

    with ThreadPoolExecutor(at_once) as threads:
        for ended in [threads.submit(run) for _ in range(at_once)]:
            ended.result()


def _in_asyncio(at_once: int, count: int) -> None:
    """Do the same in an event loop."""
    numbers = iter(range(count))

    async def run() -> None:
        for number in numbers:
            handle = await DBOS.start_workflow_async(_workflow_async, number)
            assert await handle.get_result() == {"page": number + 2}

    async def run_all() -> None:
        await asyncio.gather(*(run() for _ in range(at_once)))

    asyncio.run(run_all())


WAYS: dict[str, Callable[[int, int], None]] = {"threads": _in_threads, "asyncio": _in_asyncio}


def _prepare(path: str, journal: str) -> None:
    """Make the file, with a journal mode that it keeps, and check what SQLite does at a commit by default."""
    connection = sqlite3.connect(path)
    (mode,) = connection.execute(f"PRAGMA journal_mode = {journal}").fetchone()
    (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
    connection.close()
    assert (mode, synchronous) == (journal, SYNCHRONOUS_FULL), f"SQLite has {mode=}, {synchronous=}"


def main() -> None:
    """Run what the command line says."""
    path, journal, pool, way, *numbers = sys.argv[1:]
    at_once, count = map(int, numbers)
    _prepare(path, journal)
    url = f"sqlite:///{path}"
    DBOS(config=DBOSConfig(name="bench", system_database_url=url, sys_db_pool_size=int(pool), log_level="ERROR"))
    DBOS.launch()
    WAYS[way](at_once, WARM_UP)
    started = time.perf_counter()
    WAYS[way](at_once, count)
    print(time.perf_counter() - started, flush=True)
    os._exit(0)  # closing it would wait for its listeners


if __name__ == "__main__":
    main()
