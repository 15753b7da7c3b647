"""Callers, models and requests that fail, beside healthy ones, drawn from a seed: they must not harm the healthy ones.

The healthy ones are compared with their like who are alone on such a key. It has room for all of them, unless the bad
ones hold streams. Where half of an account's calls fail, its breaker opens for all: then the healthy callers are served
again once the bad ones have left.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import math
import random
from collections import Counter
from typing import Any, Final

import httpx
from tests.support.cheap_collection import cheap_collections
from tests.support.simulated_transport import ERROR_AFTER, POISON, WRONG, SimulatedTransport, chat
from tests.support.supervisor_checks import InvariantViolation
from tests.support.upstream_checks import check_upstream

from forebay import Overloaded, Upstream, clock
from forebay.breaker.breaker import UPSTREAM_RULES
from forebay.interfaces import Outcome
from forebay.limit import FixedLimit, Grant
from forebay.retry import Retry
from forebay.simulation import simulate
from forebay.simulation.provider.provider_config import BusyReason, Faults, ProviderConfig
from forebay.simulation.provider.simulated_provider import SimulatedProvider

MODEL, OTHER_MODEL = "gpt-4o-mini", "gpt-4o"
MINUTES: Final = 3
MAX_WAIT: Final = 20.0  # seconds, of the upstream
LONGEST_WAIT: Final = 1.5 * MAX_WAIT + 1.0  # seconds without being sent, rejected or sent again
HEALTHY: Final = 12  # callers
KINDS: Final = (
    ("hasty",),
    ("dead",),
    ("silent",),
    ("poisoned",),
    ("leaving",),
    ("keeping",),
    ("cancelled",),
    ("hasty", "quitting", "hanging", "wrong"),
)  # of bad callers; seeds take them in turn
STREAMING: Final = ("leaving", "keeping")
CROWDED: Final = (*STREAMING, "cancelled", "hanging")  # the healthy callers need all slots
TTFT, TPOT = 0.5, 0.03
PAUSE: Final = 0.6  # seconds between two calls of a caller, on average
HELD: Final = {"leaving": 3.0, "keeping": 0.5 * MAX_WAIT + 1.5, "cancelled": 3.0}  # seconds for which calls hold slots
TEXTS: Final = {"poisoned": POISON, "wrong": WRONG}
LEAST: Final = 0.9  # of the calls that the provider has room for
MAX_ATTEMPTS: Final = 4
MOST_SENT: Final = {
    "hasty": 1.35,
    "silent": 1.6,
    "dead": 1.6,
    "quitting": 1.6,
    "wrong": MAX_ATTEMPTS,
}  # attempts for each call
RETRY_AFTER: Final = 2  # seconds, of a dead model
FAILED_TWICE: Final = 3  # healthy calls, at most, that fail again when they are retried: 2 % of 2 % are expected to
RETRY_SHARE, RETRY_EXTRA = 0.2, 10  # retries for each first attempt, and each minute besides (`RetryBudget`)
POISONED_RATE: Final = 1.2  # attempts a second of a caller: each takes ERROR_AFTER, and up to four end in a PAUSE


class UnreliableLimit(FixedLimit):
    """A limit of a user who made a mistake in it."""

    def __init__(self, n: int, rng: random.Random) -> None:
        super().__init__(n)
        self._rng = rng

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        super().observe(now, grant, outcome, slowdown=slowdown)
        if self._rng.random() < 0.2:
            raise RuntimeError


class BlameStorm:
    """Healthy callers, with or without bad ones.

    Attributes:
        happened: how often each thing happened.
        served: calls of healthy callers that were answered.
        outnumbered: half of the attempts may fail that the healthy callers share a breaker with, so it may open.
        served_again: of their last minute, if the bad callers had outnumbered them until they left.
    """

    def __init__(self, seed: int, *, bad: bool = True) -> None:
        self.seed = seed
        rng = random.Random(f"blame {seed}")
        kinds = KINDS[seed % len(KINDS)]
        self.kind = kinds[seed // len(KINDS) % len(kinds)]
        self.share = rng.choice((0.05, 0.1, 0.2, 0.4))
        self.bad = max(1, round(HEALTHY * self.share / (1 - self.share))) if bad else 0
        self.same_model = rng.random() < 0.5  # of bad callers, where it is not the model that is bad
        self.crowded = self.kind in CROWDED
        self.slots = HEALTHY if self.crowded else 100
        self.error = rng.choice((0.0, 0.02))
        self.output_tokens = rng.choice((40, 100, 150))
        self.seconds = TTFT + TPOT * self.output_tokens  # of a call
        if bad and self.kind == "hanging":
            self.bad, self.error = self.slots, 0.0  # their calls take all slots
        poisoned = POISONED_RATE * self.bad if self.kind == "poisoned" and self.same_model else 0.0
        self.outnumbered = poisoned >= HEALTHY / (self.seconds + PAUSE)
        opening = UPSTREAM_RULES.max_reset_timeout + 3 * (2 * self.seconds + PAUSE)  # at most, and two probes after it
        self.healthy_until = 60.0 * MINUTES + (opening + 60.0 if self.outnumbered else 0.0)
        self.unreliable_limit = self.kind == "cancelled" and self.same_model
        self.happened: Counter[str] = Counter()
        self.served = 0
        self.served_again = 0
        self.calls = 0  # of bad callers
        self.longest_wait = 0.0
        self.kept: list[Any] = []
        self.to_cancel: list[asyncio.Timeout] = []
        self.transport: SimulatedTransport

    async def main(self) -> None:
        """Let everybody call until the minutes are over, and check the upstream at rest."""
        config = ProviderConfig(
            slots=self.slots,
            ttft=TTFT,
            tpot=TPOT,
            noise=0.2,
            overcommit=1.0,
            busy_reason=BusyReason.CONCURRENCY,
            faults=Faults(error=self.error),
        )
        self.transport = SimulatedTransport(
            SimulatedProvider(config, seed=self.seed),
            dead=(OTHER_MODEL,) if self.kind in ("dead", "quitting") else (),
            silent=(OTHER_MODEL,) if self.kind in ("silent", "hanging") else (),
            dead_for=RETRY_AFTER if self.same_model else None,
        )
        limits: dict[str, Any] = {"max_concurrent": self.slots if self.crowded else None}
        if self.unreliable_limit:
            limits = {"limit": UnreliableLimit(self.slots, random.Random(self.seed))}
        upstream = Upstream(
            "llm",
            provider="openai",
            max_wait=MAX_WAIT,
            retry=Retry(max_attempts=MAX_ATTEMPTS, base_delay=0.2),
            **limits,
        )
        async with upstream.bind(httpx.AsyncClient(transport=self.transport, timeout=300.0)) as client:
            async with asyncio.TaskGroup() as group:
                for number in range(HEALTHY):
                    group.create_task(self._healthy(client, number))
                for number in range(self.bad):
                    group.create_task(self._bad(client, number))
            for response in self.kept:
                await response.aclose()
            gc.collect()  # streams that were dropped
            await asyncio.sleep(60.0)
        check_upstream(upstream)

    async def _healthy(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(f"{self.seed}/healthy/{number}")
        await asyncio.sleep(rng.uniform(0, 5))
        while (start := clock.now()) < self.healthy_until:
            request = chat(MODEL, "healthy Rivers?", output_tokens=self.output_tokens, max_tokens=200)
            try:
                response = await client.send(request)
                name = "served" if response.status_code == 200 else f"status {response.status_code}"
                self.served += name == "served"
                self.served_again += name == "served" and start >= self.healthy_until - 60.0
            except Overloaded:
                name = "rejected"
            except httpx.HTTPError as error:
                name = type(error).__name__
            if name == "rejected" or self.kind == "hanging":
                self.longest_wait = max(self.longest_wait, clock.now() - start)
            for timeout in self.to_cancel[:1]:  # in the turn of the event loop in which its permit may go to that call
                timeout.reschedule(0.0)
            self.happened[f"healthy {name}"] += 1
            await asyncio.sleep(rng.uniform(0.2, 1.0))

    async def _bad(self, client: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(f"{self.seed}/bad/{number}")
        await asyncio.sleep(rng.uniform(0, 5))
        while clock.now() < 60.0 * MINUTES:
            self.calls += 1
            try:
                name = await self._bad_call(client, rng)
            except Overloaded:
                name = "rejected"
            except (httpx.HTTPError, TimeoutError) as error:
                name = type(error).__name__
            self.happened[f"{self.kind} {name}"] += 1
            await asyncio.sleep(rng.uniform(0.2, 1.0))

    async def _bad_call(self, client: httpx.AsyncClient, rng: random.Random) -> str:
        other = self.kind in ("dead", "silent", "quitting", "hanging")
        request = chat(
            OTHER_MODEL if other or not self.same_model else MODEL,
            f"{TEXTS.get(self.kind, 'bad')}{self.calls} Rivers?",
            output_tokens=self.output_tokens,
            max_tokens=200,
            stream=self.kind in STREAMING,
        )
        if self.kind in ("hasty", "silent"):
            seconds = 0.4 * self.seconds if self.kind == "hasty" else rng.uniform(2, 10)
            request.extensions["timeout"] = httpx.Timeout(seconds).as_dict()
        if self.kind in ("cancelled", "quitting"):
            async with asyncio.timeout(rng.uniform(0, 3 if self.kind == "cancelled" else 2 * ERROR_AFTER)) as timeout:
                if self.kind == "cancelled":
                    self.to_cancel.append(timeout)
                try:
                    await client.send(request)
                finally:
                    if self.kind == "cancelled":
                        self.to_cancel.remove(timeout)
            return "served"
        if self.kind in STREAMING:
            response = await client.send(request, stream=True)
            chunks = response.aiter_raw()
            async for _ in chunks:
                break
            if self.kind == "keeping":
                self.kept.append(response)
            cycle: list[Any] = [response, chunks]
            cycle.append(cycle)  # as the streams of SDKs refer to themselves
            return "left"
        return f"status {(await client.send(request)).status_code}"

    def _share(self) -> float:
        """Return the share of the calls of the healthy callers that there is room for beside the bad ones.

        A stream that is not read holds a slot until it is taken back. If all wait equally long for a slot, the wait is
        as long as the slots suffice for the calls of all.
        """
        if self.kind == "hanging":
            return 0.0
        held = HELD.get(self.kind)
        if held is None:
            return 1.0

        def needed(wait: float) -> float:
            """Return the slots that are in use on average if each call waits so many seconds."""
            healthy = HEALTHY * self.seconds / (wait + self.seconds + PAUSE)
            return healthy + self.bad * held / (wait + TTFT + PAUSE)

        wait = next(tenths / 10 for tenths in itertools.count() if needed(tenths / 10) <= self.slots)
        return (self.seconds + PAUSE) / (wait + self.seconds + PAUSE)

    def check(self, alone: int) -> None:
        """Check that the healthy callers are served nearly as if they were alone."""
        served, least = self.served, LEAST * self._share() * alone
        if self.outnumbered:
            served, least = self.served_again, LEAST * alone / MINUTES
        if served < least:
            raise InvariantViolation(
                f"beside {self.bad} callers that are {self.kind} {served} calls are served, of {least:.0f}"
            )
        if self.longest_wait > LONGEST_WAIT + (2 * self.seconds if self.kind == "hanging" else 0):
            raise InvariantViolation(f"a call waited {self.longest_wait:.0f} s beside callers that are {self.kind}")
        attempts = Counter(call.text for call in self.transport.sent if not call.text.startswith("healthy"))
        if self.kind == "poisoned":
            self._check_retry_budget(attempts)
        else:
            sent = len(self.transport.sent) - self.happened.total()
            if sent > (MOST_SENT.get(self.kind, 1.2) - 1.0) * self.calls + 0.1 * self.happened.total() + 5:
                raise InvariantViolation(f"beside {self.kind} callers {sent} more attempts are made than calls")
        if self.crowded and self.transport.peak > self.slots:
            raise InvariantViolation(f"{self.transport.peak} calls were in flight of {self.slots}")
        if attempts and (most := max(attempts.values())) > MAX_ATTEMPTS:
            raise InvariantViolation(f"a call was sent {most} times, of {MAX_ATTEMPTS} at most")
        if self.kind == "dead" and self.same_model:
            self._check_retries()

    def _check_retry_budget(self, attempts: Counter[str]) -> None:
        """Check that poisoned calls have the retries of the budget, and leave first retries to healthy ones."""
        retries = attempts.total() - len(attempts)
        first = len(attempts) + (len(self.transport.sent) - attempts.total() if self.same_model else 0)  # at most
        windows = math.ceil(self.healthy_until / 60.0) + 1  # each counts those of the tenth of a window before it, too
        if retries > 1.1 * RETRY_SHARE * first + RETRY_EXTRA * windows:
            raise InvariantViolation(f"{len(attempts)} poisoned calls have {retries} retries, of {first} calls")
        needed, budget = 1.2 * len(attempts) / MINUTES, RETRY_EXTRA + RETRY_SHARE * first / MINUTES  # for first retries
        failed = self.happened["healthy status 500"]
        if needed < budget and failed > FAILED_TWICE and not self.outnumbered:
            raise InvariantViolation(f"{failed} healthy calls fail, though there are {budget:.0f} retries a minute")

    def _check_retries(self) -> None:
        """Check that no call is sent again earlier than the dead model says."""
        latest: dict[str, float] = {}
        for call in self.transport.sent:
            if call.model == OTHER_MODEL:
                pause = call.at - latest.get(call.text, -math.inf) - ERROR_AFTER
                if pause < RETRY_AFTER:
                    raise InvariantViolation(
                        f"a call was sent again {pause:.1f} s after a Retry-After of {RETRY_AFTER}"
                    )
                latest[call.text] = call.at


@functools.cache
def served_alone(slots: int, error: float, output_tokens: int) -> int:
    """Return how many calls of the healthy callers are served if there are no others."""
    storm = BlameStorm(0, bad=False)
    storm.slots, storm.error, storm.output_tokens = slots, error, output_tokens
    simulate(storm.main, seed=0, max_time=36_000.0)
    return storm.served


def run(seed: int) -> BlameStorm:
    """Run the storm of a seed; raise if an invariant is violated."""
    storm = BlameStorm(seed)
    with cheap_collections():
        simulate(storm.main, seed=seed, max_time=36_000.0)
        storm.check(served_alone(storm.slots, storm.error, storm.output_tokens))
    return storm


if __name__ == "__main__":
    import sys

    for argument in sys.argv[1:]:
        outcome = run(int(argument))
        print(argument, outcome.kind, outcome.happened, sep="\n")
