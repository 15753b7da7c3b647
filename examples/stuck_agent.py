"""Kill an agent that hangs in C code, where neither a cancellation nor a signal reaches it, at its timeout.

Its slot serves the next task. In the event loop it would stop the process; in a thread it would never free its slot.
"""

import asyncio
import re

from forebay import BackpressureSupervisor, Task, TaskFailed, TaskTimedOut
from forebay.engine import ProcessEngine


def looks_valid(task: Task) -> bool:
    """Return whether a text consists of words. The pattern is a trap: on some texts `re` takes centuries."""
    return re.fullmatch(r"(\w+\s?)+", task.payload) is not None


async def main() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker(
        "checker",
        handler=looks_valid,
        task_types=["check"],
        timeout=3.0,  # seconds that a check may take
        engine=ProcessEngine(grace=0.1),  # further seconds in which it may stop by itself
    )
    async with supervisor:  # starts the first process
        for text in ["a good text", "a" * 60 + "!", "another good text"]:
            try:
                valid = await supervisor.run(Task("check", text))
                print(f"{text[:20]!r}: {valid}")
            except (TaskTimedOut, TaskFailed) as error:
                print(f"{text[:20]!r}: {type(error).__name__}")


if __name__ == "__main__":  # a process that runs the handler imports this file, and must not start the program again
    asyncio.run(main())
