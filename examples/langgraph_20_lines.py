import asyncio
from typing import TypedDict

from langgraph.graph import StateGraph
from forebay import BackpressureSupervisor, Task

class State(TypedDict, total=False):
    topic: str
    notes: str

async def research(state: State) -> State:  # your agent, as it is
    return {"notes": f"what is known of {state['topic']}"}
graph = StateGraph(State).add_node("research", research).set_entry_point("research").compile()

async def main() -> None:
    async with BackpressureSupervisor(backpressure_threshold=0.8, overflow="sqlite:///spill.db") as supervisor:
        supervisor.register_worker("researcher", handler=graph, task_types=["research"], max_concurrent=5)
        tickets = [await supervisor.submit(Task("research", {"topic": f"river {n}"})) for n in range(200)]
        print((await tickets[-1]).result["notes"])  # it was spilled, waited outside, and came back
asyncio.run(main())
