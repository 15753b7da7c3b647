"""A process that is stopped past its lease is refused when it comes back: its work is another's by then."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

from forebay.interfaces import RecordState
from forebay.overflow import SqliteTaskStore, decode_result

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

HEIR = """
import asyncio, sys
from forebay import BackpressureSupervisor, Task

async def main():
    async with BackpressureSupervisor(overflow=sys.argv[1], lease=0.5) as supervisor:
        @supervisor.worker("work", name="heir")
        async def work(task):
            return "in time"
        result = await supervisor.ticket("the task")
        print(result.worker_id, result.result, result.attempts, flush=True)

asyncio.run(main())
"""


def start(code: str, url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, url]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_late_completion_of_a_stopped_process_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db"
    with start(HOLDER, url) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "began\n"
            holder.send_signal(signal.SIGSTOP)
            with start(HEIR, url) as heir:
                told, _ = heir.communicate(timeout=60)
            assert told == "heir in time 2\n"
            holder.send_signal(signal.SIGCONT)
            late, _ = holder.communicate("go on\n", timeout=60)
        finally:
            holder.kill()
    assert late == "heir in time 2\n"  # its ticket has the result that counts

    async def check() -> None:
        ledger = SqliteTaskStore(tmp_path / "spill.db")
        await ledger.open()
        found = await ledger.find("the task")
        await ledger.close()
        assert found is not None
        state, row, completion = found
        assert (state, row.attempts) == (RecordState.DONE, 2)
        assert completion is not None
        assert completion.result is not None
        assert decode_result(completion.result) == "in time"

    asyncio.run(check())
