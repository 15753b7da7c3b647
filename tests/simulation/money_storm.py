"""Money at a provider, spent by many accounts at once, drawn from a seed.

Each seed runs three storms. In the first, tasks of several tenants call two models under two keys on budgets: they read
streams or leave them, hang up, and meet faults and refusals. What is spent is what the provider bills. In the second,
the provider's own spend cap is reached, and hardly a call is sent from then on. The third uses up one limit, lets many
others pass, and looks whether it is still used up, and whether the others have limits of their own.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from typing import Any, Final
from unittest import mock

import httpx
from tests.support.cheap_collection import cheap_collections
from tests.support.simulated_transport import SimulatedTransport, chat
from tests.support.supervisor_checks import InvariantViolation
from tests.support.upstream_checks import check_upstream

from forebay import BackpressureSupervisor, Budget, Overloaded, Quota, Task, Upstream, clock
from forebay.quota import Price
from forebay.retry import Retry
from forebay.simulation import simulate
from forebay.simulation.provider.provider_config import BusyReason, Faults, ProviderConfig
from forebay.simulation.provider.simulated_provider import SimulatedProvider
from forebay.upstream.accounts import account_registry, spend

MODELS: Final = ("gpt-4o-mini", "gpt-4o")
KEYS: Final = ("sk-1", "sk-2")
TENANTS: Final = 4
TASKS: Final = 100
SECONDS: Final = (5.0, 30.0, 240.0)  # over which the tasks come
MAX_TOKENS: Final = 120
COST: Final = (20 * 2.50 + MAX_TOKENS * 10.0) / 1e6  # dollars of the dearest call
WAYS: Final = (("whole", "whole", "stream", "leave", "hurry"), ("whole", "stream"), ("leave",), ("hurry",))
TABLE: Final = (
    101  # the bound of tables in a simulation, in place of thousands; a prime: each entry is dropped some time
)
SUSPENSION: Final = 60.0  # seconds between two calls to a provider whose spend cap is reached
REFUSAL_DELAY: Final = 1.0  # seconds that it takes to say so
KINDS: Final = ("tenant", "model", "key", "spelling", "junk")
ONE_KEY: Final = ("spelling", "junk")  # of them: the others are the first once more
SPELLINGS: Final = ("bearer {}", "BEARER {}", "Bearer  {}", "Bearer\t{}", "{}")  # of one key


class MoneyStorm:
    """Tasks that spend money, and a provider that bills it.

    Attributes:
        happened: how often each thing happened.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(f"money {seed}")
        self.usd = rng.choice((None, 5 * COST, 20 * COST))
        self.tenant_usd = rng.choice((None, 3 * COST, 10 * COST))
        self.seconds = rng.choice(SECONDS)
        self.bounded = rng.random() < 0.85  # requests name their largest answer
        self.ways = rng.choice(WAYS)
        self.config = ProviderConfig(
            slots=rng.choice((4, 50)),
            ttft=0.5,
            tpot=0.01,
            overcommit=1.0,
            busy_reason=BusyReason.CONCURRENCY,
            faults=Faults(error=rng.choice((0, 0.05)), cut=rng.choice((0, 0.1, 0.3)), stray=rng.choice((0, 0.05))),
        )
        self.hidden_tokens = rng.choice((0, 40))
        self.reports_usage = rng.random() < 0.5
        self.happened: Counter[str] = Counter()
        self.transport: SimulatedTransport

    async def main(self) -> None:
        """Run all tasks, and check what was billed and that nothing stays reserved."""
        provider = SimulatedProvider(self.config, seed=self.seed)
        self.transport = SimulatedTransport(
            provider, hidden_tokens=self.hidden_tokens, reports_usage=self.reports_usage
        )
        upstream = Upstream(
            "llm",
            provider="openai",
            budget=None if self.usd is None else Budget(usd=self.usd),
            tenant_budget=None if self.tenant_usd is None else Budget(usd=self.tenant_usd),
            retry=Retry(max_attempts=3, base_delay=0.2),
        )
        rng = random.Random(f"money {self.seed}/callers")
        async with upstream.bind(httpx.AsyncClient(transport=self.transport, timeout=300.0)) as client:
            self.client = client
            async with BackpressureSupervisor() as supervisor, asyncio.TaskGroup() as group:
                supervisor.register_worker("agents", handler=self._agent, task_types=["run"], max_concurrent=40)
                for number in range(TASKS):
                    task = Task("run", number, tenant=f"tenant{rng.randrange(TENANTS)}")
                    group.create_task(self._submit(supervisor, task, rng.uniform(0, self.seconds)))
            gc.collect()  # streams that were dropped
            await asyncio.sleep(60.0)
        check_upstream(upstream)
        self._check(upstream)

    async def _submit(self, supervisor: BackpressureSupervisor, task: Task, at: float) -> None:
        await asyncio.sleep(at)
        ticket = await supervisor.submit(task)
        self.happened[str((await ticket).status.value) if ticket else "rejected"] += 1

    async def _agent(self, task: Task) -> None:
        rng = random.Random(f"{self.seed}/{task.payload}")
        for _ in range(rng.randint(1, 3)):
            way = rng.choice(self.ways)
            fields: dict[str, Any] = {"max_tokens": MAX_TOKENS} if self.bounded else {}
            request = chat(
                rng.choice(MODELS),
                f"{task.tenant} Rivers?",
                key=rng.choice(KEYS),
                output_tokens=rng.randint(10, MAX_TOKENS),
                stream=way in ("stream", "leave"),
                **fields,
            )
            if way == "hurry":
                request.extensions["timeout"] = httpx.Timeout(rng.uniform(0.1, 1.5)).as_dict()
            try:
                await self._call(request, way)
            except Overloaded as error:
                self.happened[f"call rejected: {(error.limited_by or '').partition(':')[0]}"] += 1
            except httpx.HTTPError as error:
                self.happened[f"call {type(error).__name__}"] += 1

    async def _call(self, request: httpx.Request, way: str) -> None:
        response = await self.client.send(request, stream=way in ("stream", "leave"))
        self.happened[f"call {response.status_code}"] += 1
        if way == "stream":
            await response.aread()
        elif way == "leave":
            async for chunk in response.aiter_raw():
                if not self.hidden_tokens or b'"content":"",' not in chunk:
                    break
            await response.aclose()

    def _check(self, upstream: Upstream) -> None:
        bills = self.transport.provider.bills()
        billed = sum(bill.usd for bill in bills.values())
        most = 0.0 if self.bounded else self.transport.peak * COST  # an answer without a bound may be longer than usual
        if self.usd is not None and billed > self.usd + most:
            raise InvariantViolation(f"${billed:g} were spent of a budget of ${self.usd:g}")
        for tenant, bill in bills.items():
            if self.tenant_usd is not None and bill.usd > self.tenant_usd + most:
                raise InvariantViolation(f"{tenant} has spent ${bill.usd:g} of ${self.tenant_usd:g}")
        counted = upstream.statistics().spent_usd
        if counted is not None and counted < billed - 1e-9:
            raise InvariantViolation(f"${counted:g} are counted, and ${billed:g} were billed")


class SpendCapStorm:
    """Callers of several models under two keys, whose money at the provider is spent.

    Attributes:
        happened: how often each thing happened.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(f"spend cap {seed}")
        self.models = [*MODELS, *(f"gpt-4o-{number}" for number in range(rng.randint(0, 4)))]
        self.callers = rng.randint(6, 12)
        self.happened: Counter[str] = Counter()

    async def main(self) -> None:
        """Let everybody call for some minutes, and check how many calls were sent in vain."""
        config = ProviderConfig(
            slots=50, ttft=0.5, tpot=0.01, by_key=True, spend_cap=3 * COST, refusal_delay=REFUSAL_DELAY
        )
        transport = SimulatedTransport(SimulatedProvider(config, seed=self.seed))
        upstream = Upstream("llm", provider="openai", retry=Retry(max_attempts=3, base_delay=0.2))
        client = upstream.bind(httpx.AsyncClient(transport=transport, timeout=300.0))
        async with client, asyncio.TaskGroup() as group:
            for number in range(self.callers):
                group.create_task(self._caller(client, number))
        check_upstream(upstream)
        for key in KEYS:
            self._check_key([(call.at, call.model) for call in transport.sent if call.out_of_funds and call.key == key])

    async def _caller(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        while clock.now() < 4 * SUSPENSION:
            tokens = rng.randint(10, MAX_TOKENS)
            request = chat(rng.choice(self.models), "run", key=rng.choice(KEYS), output_tokens=tokens)
            try:
                self.happened[f"call {(await client.send(request)).status_code}"] += 1
                pause = 1.0
            except Overloaded as error:
                self.happened["call rejected"] += 1
                pause = min(5.0, error.retry_after or 5.0)
            await asyncio.sleep(rng.uniform(0.1, 1.0) * pause)

    def _check_key(self, refused: list[tuple[float, str]]) -> None:
        """Check that no model of a key is called for a minute, once the calls under way have come back, and then once.

        Args:
            refused: times and models of the calls that were sent in vain.
        """
        if not refused:
            raise InvariantViolation("the spend cap was not reached")
        latest = dict.fromkeys(self.models, refused[0][0])
        for at, model in refused:
            if (pause := at - latest[model]) > REFUSAL_DELAY:
                latest[model] = at
                if pause < SUSPENSION:
                    raise InvariantViolation(f"{model} was called {pause:.0f} s after it was known that money is spent")
            elif latest[model] > refused[0][0]:
                raise InvariantViolation(f"{model} was called twice at a time after the money was spent")


class TableStorm:
    """A limit that a tenant, a model or a key has used up, and many others who come after.

    Attributes:
        kind: whose limit it is.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(f"tables {seed}")
        self.kind = KINDS[seed % len(KINDS)]
        self.others = rng.randint(2 * TABLE, 4 * TABLE)
        self.happened: Counter[str] = Counter()

    async def main(self) -> None:
        """Use up the limit, let the others pass, and try again."""
        quotas = () if self.kind == "tenant" else (Quota(requests=2, per="day"),)
        upstream = Upstream(
            "llm",
            provider="anthropic" if self.kind == "junk" else "openai",
            tenant_budget=Budget(usd=1.0, per="day") if self.kind == "tenant" else None,
            quotas=quotas,
            models={"pattern*": ()} if self.kind == "model" else None,
            prices={"m": Price(input=1.0, output=1.0)},
            max_wait=5.0,
        )
        config = ProviderConfig(slots=10, ttft=0.01, tpot=0.0001)
        transport = SimulatedTransport(SimulatedProvider(config, seed=self.seed))
        async with upstream.bind(httpx.AsyncClient(transport=transport)) as client:
            while await self._is_served(upstream, client, "first"):
                self.happened["calls of the first"] += 1
            for number in range(self.others):
                name = "first" if self.kind in ONE_KEY else f"other{number}"
                self.happened["calls of others"] += await self._is_served(upstream, client, name, number)
            gc.collect()  # what is not held is gone
            if await self._is_served(upstream, client, "first"):
                raise InvariantViolation(f"the limit of a {self.kind} is full again after {self.others} others")
        served = self.happened["calls of others"]
        least = TABLE if self.kind == "tenant" else self.others  # tenants beyond the table share a budget
        if served if self.kind in ONE_KEY else served < least:
            raise InvariantViolation(f"{served} calls of {self.others} others were served, by {self.kind}")

    async def _is_served(self, upstream: Upstream, client: httpx.AsyncClient, name: str, number: int = 0) -> bool:
        try:
            if self.kind in ("key", *ONE_KEY):
                await client.send(self._request(name, number))
                return True
            model, tenant = ("m", name) if self.kind == "tenant" else (name, None)
            async with upstream.call(model, input_tokens=500_000, tenant=tenant) as call:
                call.settle(input_tokens=500_000, output_tokens=0)
        except Overloaded:
            return False
        return True

    def _request(self, key: str, number: int) -> httpx.Request:
        request = chat("gpt-4o-mini", "run Rivers?", key=key, output_tokens=1, max_tokens=1)
        if self.kind == "spelling" and number:
            request.headers["authorization"] = SPELLINGS[number % len(SPELLINGS)].format(key)
        elif self.kind == "junk":
            request.url = request.url.copy_with(path="/v1/messages")
            request.headers["x-api-key"] = key
            request.headers["authorization"] = f"Bearer junk{number}"
        return request


def run(seed: int) -> MoneyStorm:
    """Run the storms of a seed; raise if an invariant is violated."""
    storm, cap, tables = MoneyStorm(seed), SpendCapStorm(seed), TableStorm(seed)
    with cheap_collections():
        simulate(storm.main, seed=seed, max_time=36_000.0)
        simulate(cap.main, seed=seed, max_time=36_000.0)
        with mock.patch.object(spend, "_MAX_TENANTS", TABLE), mock.patch.object(account_registry, "_CACHED", TABLE):
            simulate(tables.main, seed=seed, max_time=36_000.0)
    storm.happened += cap.happened + tables.happened
    return storm


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        outcome = run(int(argument))
        print(argument, outcome.happened, sep="\n")
