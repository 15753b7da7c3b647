"""The same callers through a whole `Upstream`: its line, deadlines, retries and retry budget, in virtual time.

What is offered depends on the seed alone, as in the plant, so that it meets the same. Each caller says by when it needs
its answer, and hangs up then.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

from bench.calls.plant import Callers, Record
from forebay import Deadline, Overloaded, clock
from forebay.sim import Traffic, simulate
from forebay.sim.config import ProviderConfig
from forebay.sim.virtual import Broken, Refusal, SimulatedProvider
from forebay.typing import Charge, Outcome
from forebay.upstream import Upstream
from forebay.upstream.ask import Ended, Permit
from forebay.upstream.attempt import Tried
from forebay.upstream.desk import Desk
from forebay.upstream.rules import Meaning, meaning_of, notices

MODEL: Final = "gpt-4o-mini"
EXPECTED: Final = 200  # tokens of output, as callers expect who cannot know


async def asked(provider: SimulatedProvider, desk: Desk, permit: Permit, tokens: tuple[int, int]) -> Tried:
    """One attempt at a call of so many tokens of input and output, as a bound client would tell of it."""
    incoming, outgoing = tokens
    try:
        answer = await provider.call(model=MODEL, input_tokens=incoming, output_tokens=outgoing)
    except Refusal as refusal:
        meaning = meaning_of(refusal.status, refusal.headers, refusal.body)
        rate, after = meaning is Meaning.RATE, refusal.retry_after
        heard = notices(refusal.headers, wall=clock.wall_time())
        ended = Ended(outcome=meaning.outcome, released=not rate, rate=rate, retry_after=after, notices=heard, usd=0.0)
        error = ConnectionError(str(refusal))
        return Tried(error=error, again=meaning.retried, counts=meaning.uses_attempt, retry_after=after, ended=ended)
    except Broken as broken:
        return Tried(error=broken, again=True, ended=Ended(outcome=Outcome.FAULT, seconds=clock.now() - permit.at))
    heard = notices(answer.headers, wall=clock.wall_time()) if desk.listens() else ()
    seconds = clock.now() - permit.at
    used = Charge(input_tokens=incoming, output_tokens=outgoing, tokens=incoming + outgoing)
    return Tried(ended=Ended(outcome=Outcome.SUCCESS, used=used, seconds=seconds, made=outgoing, notices=heard))


class Whole:
    """One run of callers on one key; `tells`: whether they say by when they need their answer."""

    def __init__(self, config: ProviderConfig, callers: Callers, *, seed: int = 0, tells: bool = True) -> None:
        self.config, self.callers, self.seed = config, callers, seed
        self.record = Record()
        self._tells = tells
        self.upstream = Upstream("key", provider="openai")
        self.desk = self.upstream.books.desk(MODEL)
        self.provider: SimulatedProvider

    def run(self) -> Record:
        """Let the minutes pass, and what was begun end."""
        simulate(self._main, seed=self.seed)
        return self.record

    async def _main(self) -> None:
        self.provider = SimulatedProvider(self.config, seed=self.seed)
        self._draws = random.Random(f"{self.seed}/retries")
        rng, traffic = random.Random(f"{self.seed}/arrivals"), Traffic.conversation()
        loop = asyncio.get_running_loop()
        end = 60 * self.callers.minutes
        async with asyncio.TaskGroup() as group:
            looking = group.create_task(self._look())
            while loop.time() < end:
                rate = self.callers.rate(loop.time())
                if rate > 0:
                    group.create_task(self._caller(traffic.lengths(rng)))
                await asyncio.sleep(traffic.interarrival(rng, rate) if rate > 0 else 1.0)
            looking.cancel()

    async def _caller(self, tokens: tuple[int, int]) -> None:
        loop = asyncio.get_running_loop()
        for again in range(self.callers.again, -1, -1):
            after = self._draws.uniform(0.5, 1.5)
            try:
                async with asyncio.timeout(self.callers.patience):
                    await self._call(tokens)
            except Overloaded as refusal:
                after = refusal.retry_after or after
            except (TimeoutError, ConnectionError, Broken):
                pass
            else:
                alone = self.config.ttft + max(1, tokens[1]) * self.config.tpot
                self.record.done.append((loop.time(), alone))
                return
            if not again or loop.time() + after >= 60 * self.callers.minutes:
                return
            await asyncio.sleep(after)

    async def _call(self, tokens: tuple[int, int]) -> None:
        charge = Charge(input_tokens=tokens[0], output_tokens=EXPECTED, tokens=tokens[0] + EXPECTED)
        deadline = Deadline.within(self.callers.patience) if self._tells else None
        ask = self.upstream.ask(MODEL, charge, deadline=deadline)

        async def attempt(permit: Permit) -> Tried:
            self.record.sent.append(clock.now())
            tried = await asked(self.provider, self.desk, permit, tokens)
            if tried.ended.outcome is Outcome.OVERLOAD:
                self.record.refused.append(clock.now())
            return tried

        await self.upstream.driver(self.desk).run(ask, attempt)

    async def _look(self) -> None:
        account = self.desk.account
        while True:
            now = clock.now()
            self.record.levels.append((now, account.limit.limit(now), account.in_flight))
            await asyncio.sleep(1.0)
