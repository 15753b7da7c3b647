"""The supervisors of an application that runs in containers: `forebay worker app:worker`, and who submits its tasks.

The overflow is named by the environment, so that the same code runs here, in Compose and in Kubernetes.
"""

import asyncio
import os
import sys

from forebay import BackpressureSupervisor, Task

SLOTS = 4  # of one worker process: `seats` of the autoscaler


def make_supervisor() -> BackpressureSupervisor:
    """Return a supervisor on the shared overflow."""
    supervisor = BackpressureSupervisor(overflow=os.environ["FOREBAY_OVERFLOW"], max_queue_size=0)
    supervisor.register_worker("agent", handler=work, task_types=["work"], max_concurrent=SLOTS)
    return supervisor


async def work(task: Task) -> str:
    """Run one task: put your agent here."""
    await asyncio.sleep(0.1)
    return f"done: {task.payload}"


async def submit(count: int) -> int:
    """Store tasks in the overflow, for whatever worker takes them, and wait for their results."""
    async with make_supervisor() as supervisor:
        supervisor.pause("work")  # here none runs
        tickets = [await supervisor.submit(Task("work", number)) for number in range(count)]
        results = [await ticket for ticket in tickets]
    sys.stdout.write(f"{len(results)} of {count} tasks are done\n")
    return 0 if len(results) == count else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(submit(int(sys.argv[1]) if len(sys.argv) > 1 else 20)))
