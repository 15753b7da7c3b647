"""A supervisor whose handler runs in processes of its own, and calls through an upstream that all of them share.

Its arguments: the URL of the store, and a file that gets a line for each call: the id of the supervisor's process. It
runs tasks until the quota is used, and ends then.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Final

from forebay import BackpressureSupervisor, Overloaded, Quota, Task, Upstream

CALLS: Final = 60  # the quota
SLOTS: Final = 2
PAUSE: Final = 0.1  # seconds of a call

_upstreams: dict[str, Upstream] = {}  # one in each process, which all tasks of the process use


def shared_upstream(url: str) -> Upstream:
    """Return the upstream of this process."""
    if url not in _upstreams:
        _upstreams[url] = Upstream("agents", quotas=[Quota(requests=CALLS, per="day")], max_wait=5.0, shared=url)
    return _upstreams[url]


async def research(task: Task) -> bool:
    """Make a call; return False once the quota is used."""
    url, file, supervisor = task.payload
    try:
        async with shared_upstream(url).call("m"):
            with Path(file).open("a", encoding="utf-8") as calls:  # noqa: ASYNC230 - a line, in a process of its own
                calls.write(f"{supervisor}\n")
            await asyncio.sleep(PAUSE)
    except Overloaded:
        return False
    return True


async def main(url: str, file: str) -> None:
    """Run tasks, as many at a time as there are slots, until the quota is used."""
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker(
            "researcher",
            handler="tests.support.shared_agents:research",
            task_types=["research"],
            max_concurrent=SLOTS,
            engine="process",
        )

        async def work() -> None:
            while await supervisor.run(Task("research", [url, file, os.getpid()])):
                pass

        await asyncio.gather(*(work() for _ in range(SLOTS)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
