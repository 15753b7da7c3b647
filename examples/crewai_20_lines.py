import asyncio, os
os.environ.update(CREWAI_DISABLE_TELEMETRY="true", CREWAI_TRACING_ENABLED="false")
from crewai import LLM, Agent, Crew, Task as Step
from forebay import BackpressureSupervisor, Task, Upstream
from forebay.simulation import ProviderConfig, start_provider  # stands for OpenAI

async def main(url: str) -> None:
    key = Upstream("key", provider="openai", max_concurrent=5)  # for all agents together
    llm = key.bind(LLM("openai/gpt-4o-mini", api_key="sk-...", base_url=url))
    agent = Agent(role="researcher", goal="Notes", backstory="Curious.", llm=llm, respect_context_window=False)
    crew = Crew(agents=[agent], tasks=[Step(description="{topic}", expected_output="Notes", agent=agent)])
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("researcher", handler=crew, task_types=["research"], max_concurrent=20)
        topics = [Task("research", {"topic": f"river {n}"}) for n in range(50)]
        results = await asyncio.gather(*(supervisor.run(task) for task in topics))
    account = key.statistics().accounts[0]
    print(len(results), "agents,", account.sent, "calls,", account.throttled, "refused")
with start_provider(ProviderConfig(slots=5, overcommit=1.0, ttft=0.01, tpot=0.0001)) as provider:
    asyncio.run(main(provider.openai_url))
