import asyncio

from agent_framework import Agent
from agent_framework.openai import OpenAIChatCompletionClient
from openai import AsyncOpenAI
from forebay import BackpressureSupervisor, Task, Upstream
from forebay.simulation import ProviderConfig, start_provider  # stands for OpenAI

async def main(url: str) -> None:
    key = Upstream("key", provider="openai", max_concurrent=5)  # for all agents together
    client = key.bind(AsyncOpenAI(api_key="sk-...", base_url=url))
    model = OpenAIChatCompletionClient(model="gpt-4o-mini", async_client=client)
    agent = Agent(client=model, name="researcher", instructions="Write notes.")  # your agent, as it is
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("researcher", handler=agent, task_types=["research"], max_concurrent=20)
        results = await asyncio.gather(*(supervisor.run(Task("research", f"river {n}")) for n in range(50)))
    account = key.statistics().accounts[0]
    print(len(results), "agents,", account.sent, "calls,", account.throttled, "refused")
with start_provider(ProviderConfig(slots=5, overcommit=1.0, ttft=0.01, tpot=0.0001)) as provider:
    asyncio.run(main(provider.openai_url))
