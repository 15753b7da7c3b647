import asyncio

from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from forebay import BackpressureSupervisor, Task, Upstream
from forebay.simulation import ProviderConfig, start_provider  # stands for OpenAI
key = Upstream("key", provider="openai", max_concurrent=5)  # for all agents together

async def main(agent: Agent[None, str]) -> None:
    async with client, BackpressureSupervisor() as supervisor:  # the agent is yours, as it is
        supervisor.register_worker("researcher", handler=agent, task_types=["research"], max_concurrent=20)
        results = await asyncio.gather(*(supervisor.run(Task("research", f"river {n}")) for n in range(50)))
    account = key.statistics().accounts[0]
    print(len(results), "agents,", account.sent, "calls,", account.throttled, "refused")
with start_provider(ProviderConfig(slots=5, overcommit=1.0, ttft=0.01, tpot=0.0001)) as provider:
    client = key.bind(AsyncOpenAI(api_key="sk-...", base_url=provider.openai_url))
    model = OpenAIChatModel("gpt-4o-mini", provider=OpenAIProvider(openai_client=client))
    asyncio.run(main(Agent(model, name="researcher", instructions="Write notes.")))
