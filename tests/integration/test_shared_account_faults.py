"""Processes that share one account: one is killed, one is paused, and the store goes away for a while.

A provider in the process of the test counts. What it counts is never more than the ledger has granted, however slow the
machine is: calls arrive later than they are granted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest
from tests.support.account_caller import BUDGET, CENTS, PRICES, QUOTA, THOUSANDS, call_for_nothing, shared_upstream
from tests.support.counting_provider import CountingProvider, counting_provider
from tests.support.redis_servers import missing, redis_server, until

from forebay import Overloaded, clock
from forebay.upstream.shared.ledger.messages import LEASE

ROOT: Final = Path(__file__).parents[2]
CALLERS: Final = 8
AMOUNT, RATE = QUOTA.amount, QUOTA.amount / QUOTA.seconds
OVERSHOOT: Final = 0.001  # at most, as a share of what was granted
PATIENCE: Final = 60.0  # seconds for anything on a slow machine


class SqliteAccount:
    """A shared account in a SQLite file, which another process locks for a while."""

    is_kept = True  # what was granted, once the store is back

    def __init__(self, directory: Path) -> None:
        self._path = directory / "account.db"
        self.url = f"sqlite:///{self._path}"

    @contextmanager
    def away(self) -> Iterator[None]:
        """Be away."""
        connection = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
        connection.close()

    def close(self) -> None:
        """Release what it needs."""


class RedisAccount:
    """A shared account on a Redis server, which is killed and started again, with its data or without it."""

    def __init__(self, *, is_kept: bool) -> None:
        self.is_kept = is_kept
        self._stack = ExitStack()
        options = {"appendonly": "yes" if is_kept else "no", "appendfsync": "always"}
        self._server = self._stack.enter_context(redis_server(proxied=False, **options)).servers[0]
        self.url = f"redis://127.0.0.1:{self._server.port}/0?name=account"

    @contextmanager
    def away(self) -> Iterator[None]:
        """Be away."""
        self._server.kill()
        yield
        self._server.start()

    def close(self) -> None:
        """Release what it needs."""
        self._stack.close()


Account = SqliteAccount | RedisAccount
ACCOUNTS: Final[dict[str, Callable[[Path], Account]]] = {
    "sqlite": SqliteAccount,
    "redis": lambda _: RedisAccount(is_kept=True),
    "redis-without-its-data": lambda _: RedisAccount(is_kept=False),
}
needs_redis = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class Fleet:
    """Four processes that call one provider as often as their account lets them. The first one bills cents."""

    def __init__(self, url: str, provider: CountingProvider, stack: ExitStack) -> None:
        self.provider = provider
        self.models = [CENTS, *(THOUSANDS.replace("*", str(number)) for number in range(1, 4))]
        self.processes = [self._start(url, model, stack) for model in self.models]
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        self.started = clock.monotonic()
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()

    def _start(self, url: str, model: str, stack: ExitStack) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.support.account_caller", url, str(self.provider.port), model]
        process = subprocess.Popen([*command, str(CALLERS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        stack.enter_context(process)
        stack.callback(process.kill)
        stack.callback(process.send_signal, signal.SIGCONT)
        return process

    def granted(self, since: float = 0.0) -> float:
        """Return what the quota has granted since the start, or since a later time."""
        return (0.0 if since else AMOUNT) + RATE * (clock.monotonic() - (since or self.started))

    def calls_since(self, since: float) -> int:
        """Return the calls that have arrived since then."""
        times = self.provider.arrivals
        return len(times) - bisect_right(times, since)

    def wait_for_calls(self, number: int, calls: int) -> None:
        """Return when a process has sent so many calls more."""
        model = self.models[number]
        goal = self.provider.count(model) + calls
        until(lambda: self.provider.count(model) >= goal, f"{calls} calls of process {number}", within=PATIENCE)

    def wait_until_leases_are_over(self) -> None:
        """Return when calls have arrived which no lease of now can have let through."""
        since = clock.monotonic() + LEASE
        until(lambda: self.calls_since(since) >= 20, "calls after the leases", within=PATIENCE)

    def wait_for_use(self, share: float, since: float = 0.0) -> None:
        """Return when that share of what was granted has been used."""
        try:
            until(lambda: self.use(since) >= share, "use", within=PATIENCE)
        except TimeoutError:
            raise AssertionError(f"{self.use(since):.1%} of what was granted is used, not {share:.1%}") from None

    def use(self, since: float = 0.0) -> float:
        """Return the share of what was granted that was used."""
        return self.calls_since(since) / self.granted(since)

    def end(self) -> None:
        """Let the processes that live end their calls, and end."""
        for process in self.processes[1:]:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes[1:]:
            assert process.wait(PATIENCE) == 0

    def overshoot(self) -> float:
        """Return by what share more calls than granted have arrived, at most, up to any moment."""
        sent = enumerate(self.provider.arrivals, 1)
        return max(count / (AMOUNT + RATE * (arrived - self.started)) - 1.0 for count, arrived in sent)

    def bill(self, model: str, until_: float = float("inf")) -> float:
        """Return the dollars that the calls of a process have cost that arrived by then."""
        calls = zip(self.provider.times[model], self.provider.tokens[model], strict=True)
        tokens = sum(tokens for arrived, tokens in calls if arrived <= until_)
        return round(PRICES[CENTS if model == CENTS else THOUSANDS].output * tokens / 1e6, 2)


async def spent_by_ledger(url: str, goal: Callable[[float], bool]) -> float:
    """Return the dollars that the ledger has counted, once they are what they should be, or do not change any more."""
    upstream, limit, spent = shared_upstream(url), clock.monotonic() + PATIENCE, 0.0
    while not goal(spent) and clock.monotonic() < limit:
        with suppress(Overloaded):
            await call_for_nothing(upstream)
        spent = round(upstream.statistics().spent_usd or 0.0, 2)
    return spent


@pytest.mark.slow
@pytest.mark.skipif("FOREBAY_FAULTS" not in os.environ, reason="it measures shares in real time: `make faults`")
@pytest.mark.parametrize("kind", ["sqlite", *(pytest.param(kind, marks=needs_redis) for kind in list(ACCOUNTS)[1:])])
def test_four_processes_share_an_account_whatever_happens_to_one_of_them_or_to_the_store(
    kind: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        account = ACCOUNTS[kind](tmp_path)
        stack.callback(account.close)
        provider = stack.enter_context(counting_provider())
        fleet = Fleet(account.url, provider, stack)
        for number in range(4):
            fleet.wait_for_calls(number, 20)
        fleet.wait_for_use(0.99)

        with account.away():  # each keeps its fair share
            fleet.wait_until_leases_are_over()
        for number in range(4):
            fleet.wait_for_calls(number, 20)
        back = clock.monotonic()

        fleet.processes[1].send_signal(signal.SIGSTOP)
        fleet.wait_until_leases_are_over()
        fleet.processes[1].send_signal(signal.SIGCONT)
        fleet.wait_for_calls(1, 20)

        killed_at = clock.monotonic()
        fleet.processes[0].kill()
        fleet.processes[0].wait()
        fleet.wait_until_leases_are_over()
        fleet.wait_for_use(0.98, 0.0 if account.is_kept else back)
        fleet.end()

        assert fleet.overshoot() <= OVERSHOOT
        bills = sum(fleet.bill(model) for model in fleet.models[1:])
        spent = asyncio.run(spent_by_ledger(account.url, lambda spent: spent // 1_000 * 1_000 == bills))
        of_killed = round(spent % 1_000, 2)
        assert round(spent - of_killed, 2) == bills  # to the cent
        assert fleet.bill(CENTS, killed_at - LEASE) <= of_killed <= fleet.bill(CENTS)
        assert spent <= BUDGET.usd
