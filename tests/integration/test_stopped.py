"""A process that is stopped past its lease: its late completion is rejected, because another process has the task."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.task_stores import SHARED_SERVICES, StoreBackend

from forebay.interfaces import RecordState
from forebay.overflow import decode_result, open_task_store

HOLDER = """
import asyncio, sys
from forebay import BackpressureSupervisor, Task

async def work(task):
    print("began", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    return "too late"

async def main():
    async with BackpressureSupervisor(overflow=sys.argv[1], lease=0.5) as supervisor:
        supervisor.register_worker("stopped", handler=work, task_types=["work"])
        ticket = await supervisor.submit(Task("work", task_id="the task", durable=True))
        result = await ticket
        print(result.worker_id, result.result, result.attempts, flush=True)

asyncio.run(main())
"""

SUCCESSOR = """
import asyncio, sys
from forebay import BackpressureSupervisor, Task

async def main():
    async with BackpressureSupervisor(overflow=sys.argv[1], lease=0.5) as supervisor:
        @supervisor.worker("work", name="successor")
        async def work(task):
            return "in time"
        result = await (await supervisor.find("the task"))
        print(result.worker_id, result.result, result.attempts, flush=True)

asyncio.run(main())
"""


def start(code: str, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, url]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("backend", SHARED_SERVICES, ids=str)
def test_the_late_completion_of_a_stopped_process_is_rejected(backend: StoreBackend, tmp_path: Path) -> None:
    url = backend.url(tmp_path)
    with start(HOLDER, url) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "began\n"
            holder.send_signal(signal.SIGSTOP)
            with start(SUCCESSOR, url) as successor:
                output, _ = successor.communicate(timeout=60)
            assert output == "successor in time 2\n"
            holder.send_signal(signal.SIGCONT)
            late, _ = holder.communicate("go on\n", timeout=60)
        finally:
            holder.kill()
    assert late == "successor in time 2\n"  # its ticket has the result that counts

    async def check() -> None:
        store = open_task_store(url)
        await store.open()
        found = await store.find("the task")
        await store.close()
        assert found is not None
        state, record, completion = found
        assert (state, record.attempts) == (RecordState.DONE, 2)
        assert completion is not None
        assert completion.result is not None
        assert decode_result(completion.result) == "in time"

    asyncio.run(check())
