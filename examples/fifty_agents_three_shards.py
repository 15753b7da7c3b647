"""Fifty agents share what they find over three shards: files, or `... redis://a redis://b redis://c`."""

import asyncio
import sys
from collections import Counter

from forebay import BackpressureSupervisor, Task
from forebay.state import ShardedState

SHARDS = sys.argv[1:] or [f"sqlite:///shard-{letter}.db" for letter in "abc"]  # without arguments: three files
TOPICS = ["rivers", "lakes", "springs", "canals", "weirs"]


async def main() -> None:
    async with await ShardedState.connect(*SHARDS) as state, BackpressureSupervisor(max_queue_size=200) as supervisor:

        async def research(task: Task) -> None:
            number, topic = task.payload["agent"], task.payload["topic"]
            mine = state.namespace(f"agent-{number}")  # its own memory: together on one shard
            await mine.put("topic", topic)
            await mine.update("tasks", lambda tasks: (tasks or 0) + 1)
            # What all share: many agents add to the same list, and none overwrites what another has added.
            await state.update(f"notes on {topic}", lambda notes: [*(notes or []), f"agent {number} on {topic}"])

        supervisor.register_worker("researcher", handler=research, task_types=["research"], max_concurrent=50)
        payloads = [{"agent": number, "topic": TOPICS[number % 5]} for number in range(50)]
        await supervisor.map("research", payloads)

        notes = [entry async for entry in state.scan("notes on ")]
        print({entry.key: len(entry.value) for entry in notes})
        shards = Counter(state.namespace(f"agent-{number}").shard_of("topic") for number in range(50))
        print("memories of agents on each shard:", sorted(shards.values()))


asyncio.run(main())
