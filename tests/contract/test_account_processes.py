"""The promises of an account to threads, event loops and processes, in real time. See `test_account`.

Quotas and budgets are those of a day, so that no refill matters; nothing waits but for an exchange.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import httpx2
import pytest
from tests.support.account_backends import AccountProcesses, OpenAccounts
from tests.support.task_plane import run_ready
from tests.support.upstream_checks import check_upstream
from tests.unit.upstream.httpx_binding.wire import REQUEST, URL, Reply, Script

from forebay import Overloaded, Upstream
from forebay.quota import Budget, Price, Quota
from forebay.retry import Retry

pytestmark = pytest.mark.blocks  # plain threads, and processes

PRICES = {"m": Price(input=0, output=1_000)}  # a tenth of a cent for each token
PATIENCE = 60.0  # seconds after which a thread hangs


def left(upstream: Upstream) -> tuple[int, int]:
    """Return the number of calls in flight and in the queue."""
    account = upstream.core.accounts.account("").account
    return account.in_flight, len(account.queue)


def run_threads(targets: Iterable[Callable[[], object]]) -> None:
    """Run functions in threads, and raise what they raise."""
    errors: list[BaseException] = []

    def run(target: Callable[[], object]) -> None:
        try:
            target()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]


class InFlight:
    """The calls that are under way, of any thread.

    Attributes:
        peak: the most at once.
        count: of all calls.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = self.peak = self.count = 0

    def __enter__(self) -> None:
        with self._lock:
            self._now += 1
            self.count += 1
            self.peak = max(self.peak, self._now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._now -= 1


# --- threads and loops ---


def test_threads_and_event_loops_of_all_processes_share_the_slots(processes: AccountProcesses) -> None:
    upstreams = processes.open(max_concurrent=3)
    in_flight = InFlight()

    def call_in_a_thread(upstream: Upstream) -> None:
        for _ in range(20):
            with upstream.call(), in_flight:
                pass

    async def call_in_a_loop(upstream: Upstream) -> None:
        async def call() -> None:
            async with upstream.call():
                with in_flight:
                    await asyncio.sleep(0)

        await asyncio.gather(*(call() for _ in range(20)))

    def run_a_loop(upstream: Upstream) -> None:
        asyncio.run(call_in_a_loop(upstream))

    ways = [partial(call_in_a_thread, upstream) for upstream in upstreams]
    ways += [partial(run_a_loop, upstream) for upstream in upstreams]
    run_threads(ways * 2)
    assert in_flight.count == 80 * processes.count
    assert in_flight.peak <= 3
    for upstream in upstreams:
        check_upstream(upstream)


def test_threads_of_all_processes_spend_one_budget(processes: AccountProcesses) -> None:
    upstreams = processes.open(budget=Budget(usd=1.0, per="day"), prices=PRICES)
    spent: list[int] = []

    def spend(upstream: Upstream) -> None:
        while True:
            try:
                with upstream.call("m", output_tokens=40) as call:
                    call.settle(input_tokens=0, output_tokens=30)
                    spent.append(30)
            except Overloaded:
                return

    run_threads([partial(spend, upstream) for upstream in upstreams] * 3)
    assert 1_000 - 6 * 40 <= sum(spent) <= 1_000


def test_a_plain_function_is_guarded_in_plain_threads(accounts: OpenAccounts) -> None:
    search = accounts.open(max_concurrent=2, retry=Retry(max_attempts=3, base_delay=0.001))
    in_flight, failures = InFlight(), {3: 2, 7: 1}
    lock = threading.Lock()
    meet = threading.Barrier(2)

    @search.guard
    def look_up(number: int) -> int:
        with in_flight:
            with lock:
                fails = failures.get(number, 0) > 0
                if fails:
                    failures[number] -= 1
            if number in (0, 1):
                meet.wait(PATIENCE)
        if fails:
            raise ConnectionError
        return number

    results: list[int] = []
    run_threads(partial(lambda number: results.append(look_up(number)), number) for number in range(10))
    assert sorted(results) == list(range(10))
    assert in_flight.peak == 2
    check_upstream(search)


def test_a_bound_client_calls_in_a_plain_thread(accounts: OpenAccounts) -> None:
    upstream = accounts.open(provider="openai", retry=Retry(base_delay=0.001))
    with Script(httpx2, Reply.error(500), Reply()).blocking_client(upstream) as client:
        assert client.post(URL, json=REQUEST, headers={"authorization": "Bearer sk"}).status_code == 200
    (account,) = upstream.statistics().accounts
    assert (account.sent, account.succeeded, account.failed) == (2, 1, 1)
    check_upstream(upstream)


@pytest.mark.parametrize("kept", [True, False])
def test_a_call_granted_to_a_task_of_a_closed_loop_comes_back(accounts: OpenAccounts, *, kept: bool) -> None:
    upstream = accounts.open(max_concurrent=1)

    async def call() -> None:
        async with upstream.call():
            pass

    holder = upstream.call()
    holder.__enter__()
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(call())]
    loop.run_until_complete(run_ready(5))
    assert left(upstream) == (1, 1)
    holder.__exit__(None, None, None)
    loop.close()
    if not kept:
        tasks.clear()
        gc.collect()
    with upstream.call():
        assert left(upstream) == (1, 0)
    assert left(upstream) == (0, 0)


@pytest.mark.parametrize("granted", [True, False])
async def test_a_coroutine_that_is_closed_while_it_waits_for_a_call_leaves_nothing_behind(
    accounts: OpenAccounts, *, granted: bool
) -> None:
    upstream = accounts.open(max_concurrent=1)

    async def call() -> None:
        async with upstream.call():
            pass

    holder = upstream.call()
    await holder.__aenter__()
    waiting = call()
    waiting.send(None)
    if granted:
        await holder.__aexit__(None, None, None)
    waiting.close()
    if not granted:
        await holder.__aexit__(None, None, None)
    async with upstream.call():
        assert left(upstream) == (1, 0)
    assert left(upstream) == (0, 0)


# --- processes ---


def test_what_was_used_and_spent_survives_all_processes(accounts: OpenAccounts) -> None:
    accounts.needs_sharing()
    settings: dict[str, Any] = {
        "quotas": [Quota(requests=10, per="day")],
        "budget": Budget(usd=1.0, per="day"),
        "prices": PRICES,
    }
    with accounts.open(**settings).call("m", output_tokens=900) as call:
        call.settle(input_tokens=0, output_tokens=900)
    accounts.close()
    upstream = accounts.open(**settings)
    for _ in range(2):
        with upstream.call("m", output_tokens=50):
            pass
    (level,) = upstream.statistics().accounts[0].quotas
    assert level.remaining == pytest.approx(7.0, abs=0.1)
    assert upstream.statistics().spent_usd == pytest.approx(1.0)
    with pytest.raises(Overloaded, match="overspent"), upstream.call("m", output_tokens=50):
        pass


def test_what_a_process_holds_is_free_for_others_as_soon_as_it_ends(accounts: OpenAccounts) -> None:
    accounts.needs_sharing()
    settings: dict[str, Any] = {
        "max_concurrent": 1,
        "quotas": [Quota(output_tokens=1_000, per="day", strict=True)],
        "budget": Budget(usd=1.0, per="day"),
        "prices": PRICES,
    }
    accounts.open(**settings).call("m", output_tokens=400).__enter__()  # it ends with a call in flight
    accounts.close()
    upstream = accounts.open(**settings)
    with upstream.call("m", output_tokens=500) as call:
        call.settle(input_tokens=0, output_tokens=500)
    assert upstream.statistics().spent_usd == pytest.approx(0.9)  # that call may have cost what was reserved


FORK = """
import os, sys, traceback, warnings
from forebay import Budget, Overloaded, Quota, Upstream
from forebay.quota import Price
warnings.simplefilter("ignore", DeprecationWarning)

def call():
    with upstream.call("m", output_tokens=100):
        pass

upstream = Upstream("llm", quotas=[Quota(requests=5, per="day")], max_concurrent=2, budget=Budget(usd=1),
                    prices={"m": Price(input=0, output=1_000)}, shared=sys.argv[1] or None)
call()
holder = upstream.call("m", output_tokens=100)
holder.__enter__()
child = os.fork()
if not child:
    try:
        assert upstream.statistics().accounts[0].in_flight == 0
        for _ in range(3):
            call()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
holder.__exit__(None, None, None)
try:
    call()
except Overloaded as error:
    print(error.limited_by)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_none_of_its_parents_calls_and_shares_its_limits(accounts: OpenAccounts) -> None:
    url = accounts.needs_sharing()
    if not url:
        pytest.skip("no other process can see what is in memory")
    command = [sys.executable, "-c", textwrap.dedent(FORK), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout == "upstream:llm:requests per day\n", done.stderr
