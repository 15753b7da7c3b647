"""The same callers through a whole `Upstream`, with its queue, deadlines, retries and retry budget, in virtual time.

The calls depend on the seed alone, as in `bench.calls.limit_run`, so that the upstream meets the same ones.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Final

from bench.calls.limit_run import Callers, RunRecord
from forebay import Deadline, Overloaded, clock
from forebay.interfaces import Charge, Outcome
from forebay.simulation import Traffic, simulate
from forebay.simulation.provider.provider_config import ProviderConfig
from forebay.simulation.provider.simulated_provider import AnswerCut, ProviderRefusal, SimulatedProvider
from forebay.upstream import Upstream
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.call_request import AttemptResult, CallOutcome, Permit
from forebay.upstream.failed_attempts import judge_error_answer
from forebay.upstream.fallbacks.fallback_chain import PlainRoute
from forebay.upstream.providers import Headers, classify, read_rate_limits
from forebay.upstream.sdk_exceptions import ErrorAnswer
from forebay.upstream.shared.stores.store import LedgerStore

MODEL: Final = "gpt-4o-mini"
EXPECTED_OUTPUT: Final = 200  # tokens: the callers' estimate


async def send_call(
    provider: SimulatedProvider, account: ThreadSafeAccount, permit: Permit, tokens: tuple[int, int]
) -> AttemptResult:
    """Send one call of `tokens` of input and output; return its result, judged as by a bound client."""
    input_tokens, output_tokens = tokens
    try:
        answer = await provider.call(model=MODEL, input_tokens=input_tokens, output_tokens=output_tokens)
    except ProviderRefusal as refusal:
        kind = classify(refusal.status, refusal.headers, refusal.body)
        answer_to = ErrorAnswer(refusal.status, Headers(refusal.headers), refusal.body)
        result = judge_error_answer(account, permit, kind, answer_to)
        result.error = ConnectionError(str(refusal))
        return result
    except AnswerCut as error:
        outcome = CallOutcome(kind=Outcome.FAULT, latency=clock.now() - permit.granted_at)
        return AttemptResult(error=error, retryable=True, outcome=outcome)
    outcome = CallOutcome(
        kind=Outcome.SUCCESS,
        used=Charge(input_tokens=input_tokens, output_tokens=output_tokens, tokens=input_tokens + output_tokens),
        latency=clock.now() - permit.granted_at,
        output_tokens=output_tokens,
        rate_limit_headers=read_rate_limits(answer.headers, wall=clock.wall_time()) if account.needs_headers() else (),
    )
    return AttemptResult(outcome=outcome)


class UpstreamRun:
    """One run of callers on one key.

    Args:
        config: the provider.
        callers: the callers; each hangs up after its timeout.
        seed: of all random numbers.
        with_deadlines: whether the upstream knows the callers' timeouts.
        processes: upstreams that share the key, and know nothing of each other without `shared`; the callers use them
            in turn.
        shared: the store of the account of all of them.
    """

    def __init__(  # noqa: PLR0913 - what a run differs in
        self,
        config: ProviderConfig,
        callers: Callers,
        *,
        seed: int = 0,
        with_deadlines: bool = True,
        processes: int = 1,
        shared: LedgerStore | None = None,
    ) -> None:
        self.config, self.callers, self.seed = config, callers, seed
        self.record = RunRecord()
        self.served = [0] * processes  # calls answered in time, by process
        self._with_deadlines = with_deadlines
        self.upstreams = [Upstream("key", provider="openai", shared=shared) for _ in range(processes)]
        self.accounts = [upstream.core.accounts.account(MODEL) for upstream in self.upstreams]
        self.account = self.accounts[0]
        self.provider: SimulatedProvider

    def fairness(self) -> float:
        """Return Jain's index of the calls that each process was served: 1 if all got the same."""
        return sum(self.served) ** 2 / (len(self.served) * sum(served**2 for served in self.served))

    def run(self) -> RunRecord:
        """Simulate all minutes, and let the last calls end; return what happened."""
        simulate(self._main, seed=self.seed)
        return self.record

    async def _main(self) -> None:
        self.provider = SimulatedProvider(self.config, seed=self.seed)
        self._draws = random.Random(f"{self.seed}/retries")
        rng, traffic = random.Random(f"{self.seed}/arrivals"), Traffic.conversation()
        loop = asyncio.get_running_loop()
        end = 60 * self.callers.minutes
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(self._sample())
            processes = itertools.cycle(range(len(self.upstreams)))
            while loop.time() < end:
                rate = self.callers.rate(loop.time())
                if rate > 0:
                    group.create_task(self._caller(self.callers.lengths(rng), next(processes)))
                await asyncio.sleep(traffic.interarrival(rng, rate) if rate > 0 else 1.0)
            sampling.cancel()

    async def _caller(self, tokens: tuple[int, int], process: int) -> None:
        loop = asyncio.get_running_loop()
        for left in range(self.callers.resubmissions, -1, -1):
            delay = self._draws.uniform(0.5, 1.5)
            try:
                async with asyncio.timeout(self.callers.timeout):
                    await self._call(tokens, process)
            except Overloaded as rejection:
                delay = rejection.retry_after or delay
            except (TimeoutError, ConnectionError, AnswerCut):
                pass
            else:
                service_time = self.config.ttft + max(1, tokens[1]) * self.config.tpot
                self.record.done.append((loop.time(), service_time))
                self.served[process] += 1
                return
            if not left or loop.time() + delay >= 60 * self.callers.minutes:
                return
            await asyncio.sleep(delay)

    async def _call(self, tokens: tuple[int, int], process: int) -> None:
        upstream, account = self.upstreams[process], self.accounts[process]
        charge = Charge(input_tokens=tokens[0], output_tokens=EXPECTED_OUTPUT, tokens=tokens[0] + EXPECTED_OUTPUT)
        deadline = Deadline.within(self.callers.timeout) if self._with_deadlines else None
        request = upstream.core.request(MODEL, charge, deadline=deadline)

        async def attempt(_: PlainRoute, permit: Permit) -> AttemptResult:
            self.record.sent.append(clock.now())
            result = await send_call(self.provider, account, permit, tokens)
            if result.outcome.kind is Outcome.OVERLOAD or result.outcome.rate_limited:
                self.record.refused.append(clock.now())
            return result

        await upstream.runner.run(PlainRoute(upstream, account, request), attempt)

    async def _sample(self) -> None:
        account = self.account.account
        while True:
            now = clock.now()
            self.record.levels.append((now, account.limit.limit(now), account.in_flight))
            await asyncio.sleep(1.0)
