import asyncio

from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
from forebay import BackpressureSupervisor, Task, Upstream
from forebay.simulation import ProviderConfig, start_provider  # stands for OpenAI

async def main(url: str) -> None:
    key = Upstream("key", provider="openai", max_concurrent=5)  # for all agents together
    client = OpenAIChatCompletionClient(model="gpt-4o-mini-2024-07-18", api_key="sk-...", base_url=url)
    agent = AssistantAgent("researcher", key.bind(client), system_message="Write notes.")  # your agent, as it is
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("researcher", handler=agent, task_types=["research"], max_concurrent=20)
        results = await asyncio.gather(*(supervisor.run(Task("research", f"river {n}")) for n in range(50)))
    await client.close()
    account = key.statistics().accounts[0]
    print(len(results), "agents,", account.sent, "calls,", account.throttled, "refused")
with start_provider(ProviderConfig(slots=5, overcommit=1.0, ttft=0.01, tpot=0.0001)) as provider:
    asyncio.run(main(provider.openai_url))
