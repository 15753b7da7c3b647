"""Budgets of an upstream and of its tenants, spent by many accounts at once, drawn from a seed.

Tasks of several tenants call two models under two keys. They read streams or leave them, hang up, and meet faults and
refusals, and a provider whose own spend cap is reached. What is spent is what the provider bills. A second storm uses
up one limit, lets thousands of others pass, and looks whether it is still used up.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from typing import Any, Final
from unittest import mock

import httpx
from tests.support.simulated_transport import SimulatedTransport, chat
from tests.support.supervisor_checks import InvariantViolation
from tests.support.upstream_checks import check_upstream

from forebay import BackpressureSupervisor, Budget, Overloaded, Quota, Task, Upstream
from forebay.quota import Price
from forebay.retry import Retry
from forebay.simulation import simulate
from forebay.simulation.provider.provider_config import BusyReason, Faults, ProviderConfig
from forebay.simulation.provider.simulated_provider import SimulatedProvider
from forebay.upstream.accounts import spend

MODELS: Final = ("gpt-4o-mini", "gpt-4o")
KEYS: Final = ("sk-1", "sk-2")
TENANTS: Final = 4
TASKS: Final = 160
SECONDS: Final = (5.0, 30.0, 240.0)  # over which the tasks come
MAX_TOKENS: Final = 120
COST: Final = (20 * 2.50 + MAX_TOKENS * 10.0) / 1e6  # dollars of the dearest call
WAYS: Final = ("whole", "whole", "stream", "leave", "hurry")
PROBES: Final = 4  # calls a minute that may be sent to a provider whose spend cap is reached: one for each account
FEW_TENANTS: Final = 1_000  # the bound of the table of tenants in a simulation, in place of a hundred thousand
AT_ONCE: Final = 20  # calls that are under way when it is


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
        self.spend_cap = rng.choice((None, 10 * COST)) if self.usd is None and self.tenant_usd is None else None
        self.bounded = rng.random() < 0.85  # requests name their largest answer
        self.config = ProviderConfig(
            slots=rng.choice((4, 50)),
            ttft=0.5,
            tpot=0.01,
            overcommit=1.0,
            busy_reason=BusyReason.CONCURRENCY,
            faults=Faults(error=rng.choice((0, 0.05)), cut=rng.choice((0, 0.1)), stray=rng.choice((0, 0.05))),
            spend_cap=self.spend_cap,
        )
        self.happened: Counter[str] = Counter()
        self.transport: SimulatedTransport
        self.clients: list[httpx.AsyncClient] = []

    async def main(self) -> None:
        """Run all tasks, and check what was billed and that nothing stays reserved."""
        provider = SimulatedProvider(self.config, seed=self.seed)
        self.transport = SimulatedTransport(provider)
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
            way = rng.choice(WAYS)
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
            async for _ in response.aiter_raw():
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
        if self.spend_cap is not None:
            self._check_suspension(self.spend_cap)

    def _check_suspension(self, cap: float) -> None:
        """Check that hardly any call is sent once the provider has said that its money is spent."""
        refused = [call.at for call in self.transport.sent if call.out_of_funds]
        for at in refused:
            at_once = sum(at <= other < at + 1.0 for other in refused)  # they were under way
            sent = sum(at + 1.0 <= other < at + 60.0 for other in refused)
            if at_once > AT_ONCE or sent > PROBES:
                raise InvariantViolation(f"{at_once} and {sent} calls were sent after ${cap:g} were spent")


class TableStorm:
    """A limit that a tenant, a model or a key has used up, and thousands of others who come after.

    Attributes:
        kind: whose limit it is.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(f"tables {seed}")
        self.kind = ("tenant", "model", "key")[seed % 3]
        self.others = {"tenant": rng.randint(10_100, 11_000), "model": rng.randint(1_100, 4_000), "key": 1_100}[
            self.kind
        ]
        self.happened: Counter[str] = Counter()

    async def main(self) -> None:
        """Use up the limit, let the others pass, and try again."""
        quotas = () if self.kind == "tenant" else (Quota(requests=2, per="day"),)
        upstream = Upstream(
            "llm",
            provider="openai",
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
                self.happened["calls of others"] += await self._is_served(upstream, client, f"other{number}")
            if await self._is_served(upstream, client, "first"):
                raise InvariantViolation(f"the limit of a {self.kind} is full again after {self.others} others")

    async def _is_served(self, upstream: Upstream, client: httpx.AsyncClient, name: str) -> bool:
        try:
            if self.kind == "key":
                await client.send(chat("gpt-4o-mini", "run Rivers?", key=name, output_tokens=1, max_tokens=1))
                return True
            model, tenant = ("m", name) if self.kind == "tenant" else (name, None)
            async with upstream.call(model, input_tokens=500_000, tenant=tenant) as call:
                call.settle(input_tokens=500_000, output_tokens=0)
        except Overloaded:
            return False
        return True


def run(seed: int) -> MoneyStorm:
    """Run the storm of a seed; raise if an invariant is violated."""
    storm, tables = MoneyStorm(seed), TableStorm(seed)
    simulate(storm.main, seed=seed, max_time=36_000.0)
    with mock.patch.object(spend, "_MAX_TENANTS", FEW_TENANTS):
        simulate(tables.main, seed=seed, max_time=36_000.0)
    storm.happened += tables.happened
    return storm


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        outcome = run(int(argument))
        print(argument, outcome.happened, sep="\n")
