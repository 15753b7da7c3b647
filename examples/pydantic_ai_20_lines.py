import asyncio

from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from forebay import BackpressureSupervisor, Task, Upstream
from forebay.simulation import ProviderConfig, start_provider  # stands for OpenAI

async def main(url: str) -> None:
    key = Upstream("key", provider="openai", max_concurrent=5)  # for all agents together
    async with AsyncOpenAI(api_key="sk-...", base_url=url) as client, BackpressureSupervisor() as supervisor:
        model = OpenAIChatModel("gpt-4o-mini", provider=OpenAIProvider(openai_client=key.bind(client)))
        agent = Agent(model, name="researcher", instructions="Write notes.")  # your agent, as it is
        supervisor.register_worker("researcher", handler=agent, task_types=["research"], max_concurrent=20)
        results = await asyncio.gather(*(supervisor.run(Task("research", f"river {n}")) for n in range(50)))
    account = key.statistics().accounts[0]
    print(len(results), "agents,", account.sent, "calls,", account.throttled, "refused")
with start_provider(ProviderConfig(slots=5, overcommit=1.0, ttft=0.01, tpot=0.0001)) as provider:
    asyncio.run(main(provider.openai_url))
