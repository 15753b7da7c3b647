"""Processes that share an account in a SQLite file, while one is killed, or paused for longer than its lease."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forebay.upstream.shared.ledger.messages import BudgetRequest, BudgetTerms, ExchangeRequest, LedgerTerms, ledger_key
from forebay.upstream.shared.stores.sqlite_store import SqliteLedgerStore

LIMIT = 4
CALLERS = 4  # of each process
COST = 0.01  # dollars of a call, which are reserved for it as well

PROGRAM = """
import asyncio, os, sys
from forebay import Budget, Overloaded, Price, Upstream

folder, name, usd = sys.argv[1:]
events = os.open(f"{folder}/events", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
openai = Upstream(
    "openai", max_concurrent=4, budget=Budget(usd=float(usd)), prices={"m": Price(input=0, output=1000)},
    shared=f"sqlite:///{folder}/account.db",
)

async def caller():
    while True:
        try:
            async with openai.call("m", output_tokens=10) as call:
                os.write(events, f"{name} begins\\n".encode())
                await asyncio.sleep(0.02)
                os.write(events, f"{name} ends\\n".encode())  # one write, which a kill leaves whole or undone
                call.settle(input_tokens=0, output_tokens=10)
            print("called", flush=True)
        except Overloaded:
            if openai.statistics().spent_usd > float(usd) - 0.01:
                return
            await asyncio.sleep(0.1)

async def main():
    await asyncio.gather(*(caller() for _ in range(4)))

asyncio.run(main())
"""


@contextmanager
def process(folder: Path, name: str, usd: float) -> Iterator[subprocess.Popen[str]]:
    """Run a process that spends the budget, and kill it at the end of the block if it has not ended."""
    command = [sys.executable, "-c", PROGRAM, str(folder), name, str(usd)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        assert started.stdout is not None
        started.stdout.close()


def wait_for_calls(process: subprocess.Popen[str], count: int) -> None:
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline() == "called\n"


def events(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "events").read_text().splitlines()]


def most_in_flight(lines: list[list[str]], *, without: str = "") -> int:
    """Return how many calls were in flight at most, by the order of the events, without those of one process."""
    in_flight = most = 0
    for name, what in lines:
        if name != without:
            in_flight += 1 if what == "begins" else -1
            most = max(most, in_flight)
    return most


def in_flight_after(lines: list[list[str]], start: int, *names: str) -> int:
    """Return how many calls of some processes were in flight at most, from some event on."""
    count = Counter(what for name, what in lines[:start] if name in names)
    before = [[names[0], "begins"]] * (count["begins"] - count["ends"])
    return most_in_flight(before + [line for line in lines[start:] if line[0] in names])


def spent(folder: Path, usd: float) -> float:
    """Return the dollars that the ledger has counted."""
    store = SqliteLedgerStore(folder / "account.db")
    request = ExchangeRequest(
        ledger=ledger_key("budget", "openai"),
        member="the test",
        sequence=1,
        terms=LedgerTerms(budget=BudgetTerms(usd)),
        budget=BudgetRequest(),
    )
    (reply,) = store.exchange([request])
    store.close()
    assert reply.budget is not None
    return reply.budget.spent


@pytest.mark.slow
def test_what_a_killed_process_held_is_spent_by_the_others_and_no_more(tmp_path: Path) -> None:
    usd = 5.0
    with (
        process(tmp_path, "victim", usd) as victim,
        process(tmp_path, "one", usd) as one,
        process(tmp_path, "two", usd) as two,
    ):
        for each in (victim, one, two):
            wait_for_calls(each, 20)
        victim.send_signal(signal.SIGKILL)
        for each in (one, two):
            each.communicate()
            assert each.returncode == 0
    lines = events(tmp_path)
    calls = Counter(name for name, what in lines if what == "ends")
    assert most_in_flight(lines, without="victim") <= LIMIT
    counted = spent(tmp_path, usd)
    assert usd - COST < counted <= usd + 1e-9
    # All that the survivors have spent is counted, and of the killed one what it had reported.
    by_survivors = COST * (calls["one"] + calls["two"])
    assert by_survivors - 1e-9 <= counted <= by_survivors + COST * calls["victim"] + 1e-9


@pytest.mark.slow
def test_a_process_that_was_paused_for_longer_than_its_lease_passes_no_limit_when_it_goes_on(tmp_path: Path) -> None:
    usd = 1_000.0
    with process(tmp_path, "sleeper", usd) as sleeper, process(tmp_path, "other", usd) as other:
        for each in (sleeper, other):
            wait_for_calls(each, 20)
        sleeper.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        paused_at = len(events(tmp_path))
        while in_flight_after(events(tmp_path), paused_at, "other") < LIMIT:  # until its lease is over
            wait_for_calls(other, 10)
        sleeper.send_signal(signal.SIGCONT)
        wait_for_calls(sleeper, 60)
        wait_for_calls(other, 60)
    lines = events(tmp_path)
    # Calls for which it had permits when it was paused begin or end later: each of its callers has one at most.
    woken = [number for number, (name, _) in enumerate(lines) if name == "sleeper" and number >= paused_at]
    assert in_flight_after(lines, woken[4 * CALLERS], "sleeper", "other") <= LIMIT


FAILING = """
import asyncio, sys
from forebay import Overloaded, Upstream
from forebay.breaker import BreakerRules, consecutive_faults

rules = BreakerRules(triggers=(consecutive_faults(3),), reset_timeout=600.0, max_reset_timeout=600.0)
llm = Upstream("llm", max_concurrent=4, breaker=rules, shared=sys.argv[1])

async def main():
    try:
        for _ in range(int(sys.argv[2])):
            try:
                async with llm.call():
                    print("called", flush=True)
                    raise ConnectionError
            except ConnectionError:
                pass
    except Overloaded as error:
        print(error.limited_by, flush=True)

asyncio.run(main())
"""


def test_a_breaker_that_a_process_has_opened_is_open_in_the_next_one(tmp_path: Path) -> None:
    def run(calls: int) -> list[str]:
        command = [sys.executable, "-c", FAILING, f"sqlite:///{tmp_path}/account.db", str(calls)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    assert run(3) == ["called"] * 3
    assert run(1) == ["upstream:llm:breaker"]
