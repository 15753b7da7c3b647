"""Children made by fork: they have none of their parent's calls, threads and locks, and say so instead of hanging."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from forebay.spend_log import SpendQuery, read_spend

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")

PREAMBLE = """
import asyncio, os, sys, threading, traceback, warnings
from forebay import BackpressureSupervisor, Budget, Overloaded, Quota, Task, Upstream
from forebay.quota import Price
warnings.simplefilter("ignore", DeprecationWarning)

def in_child(check):
    \"\"\"Run a check in a forked child, and wait for it.\"\"\"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, status
"""


def run(script: str, *arguments: Path) -> None:
    """Run a script in a process of its own: forking pytest would fork its threads' locks, too."""
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_child_has_none_of_the_calls_of_its_parent() -> None:
    run("""
    llm = Upstream("llm", max_concurrent=2, budget=Budget(usd=10), prices={"m": Price(input=1e6, output=0)})
    calls = [llm.call("m", input_tokens=4), llm.call("m", input_tokens=4)]
    for call in calls:
        call.__enter__()
    waiting = threading.Thread(target=lambda: llm.call("m").__enter__(), daemon=True)
    waiting.start()
    while not llm.statistics().accounts[0].queued:
        pass

    def check():
        account = llm.statistics().accounts[0]
        assert (account.in_flight, account.queued) == (0, 0), account
        with llm.call("m", input_tokens=9), llm.call("m", input_tokens=1):  # no dollars are held
            assert llm.statistics().accounts[0].in_flight == 2
        calls[0].__exit__(None, None, None)  # its permit is the parent's
        assert llm.statistics().accounts[0].in_flight == 0
        assert llm.statistics().spent_usd == 10, llm.statistics()

    in_child(check)
    assert llm.statistics().accounts[0].in_flight == 2
    """)


def test_locks_that_other_threads_hold_do_not_stop_a_child() -> None:
    run("""
    llm = Upstream("llm", tenant_budget=Budget(usd=10), task_budget=Budget(usd=1), unmetered="allow")
    guarded = llm.guard(lambda: "answer")
    declared = llm.declared("m")
    with llm.call("m"):
        pass
    core, account = llm.core, llm.core.accounts.account("m")
    locks = [core._lock, core.accounts._accounts._lock, core.budgets._tenants._lock, account._lock, declared._lock,
             account.retries._lock, core.background._lock, llm._declared._lock]
    held = threading.Event()

    def hold():
        for lock in locks:
            lock.acquire()
        held.set()
        threading.Event().wait()

    threading.Thread(target=hold, daemon=True).start()
    held.wait()

    def check():
        assert guarded() == "answer"
        with llm.call("m"):
            llm.statistics()
        llm.declared("m").load()

    in_child(check)
    """)


def test_what_was_spent_is_not_given_back_to_a_child() -> None:
    run("""
    llm = Upstream("llm", budget=Budget(usd=10), quotas=[Quota(requests=1, per="day")],
                   prices={"m": Price(input=1e6, output=0)})
    with llm.call("m", input_tokens=4) as call:
        call.settle(input_tokens=4, output_tokens=0)

    def check():
        assert llm.statistics().spent_usd == 4
        try:
            with llm.call("m"):
                raise SystemExit("it was let through")
        except Overloaded as error:
            assert error.limited_by.endswith("requests per day"), error

    in_child(check)
    """)


def test_a_call_of_a_child_inside_a_task_is_not_reported_to_the_parents_supervisor() -> None:
    run("""
    llm = Upstream("llm")

    def handler(task):
        def check():
            from forebay import context
            assert context.running_task().task.tenant == "acme"
            assert context.call_observer() is None
            with llm.call("m"):
                pass
        in_child(check)
        return "done"

    async def main():
        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker("w", handler=handler, task_types=["t"])
            assert await supervisor.run(Task("t", tenant="acme")) == "done"

    asyncio.run(main())
    """)


def test_a_supervisor_of_the_parent_refuses_a_child_with_words() -> None:
    run("""
    from forebay.errors import ForkedProcess
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("w", handler=lambda task: "done", task_types=["t"])

    def check():
        for use in (lambda: portal.run(Task("t")), lambda: portal.submit(Task("t")), lambda: asyncio.run(submit())):
            try:
                use()
            except ForkedProcess as error:
                assert str(os.getppid()) in str(error) and "spawn" in str(error), error
            else:
                raise SystemExit("no error")

    async def submit():
        await supervisor.submit(Task("t"))

    with supervisor.portal() as portal:
        assert portal.run(Task("t")) == "done"
        in_child(check)
        assert portal.run(Task("t")) == "done"
    """)


def test_a_store_of_the_parent_refuses_a_child_with_words(tmp_path: Path) -> None:
    run(
        """
    from forebay.errors import StoreUnavailable
    from forebay.overflow import open_task_store

    async def main():
        store = open_task_store("sqlite:///" + sys.argv[1])
        await store.open()

        def check():
            try:
                store._writer.run_now(lambda connection: None)
            except StoreUnavailable as error:
                assert "forked" in str(error), error
            else:
                raise SystemExit("no error")

        in_child(check)
        await store.close()

    asyncio.run(main())
    """,
        tmp_path / "tasks.db",
    )


def test_what_parent_and_child_spend_is_each_once_in_the_spend_log(tmp_path: Path) -> None:
    run(
        """
    from forebay.spend_log import SpendLog, SpendQuery, read_spend
    spend_log = SpendLog("sqlite:///" + sys.argv[1])
    llm = Upstream("llm", budget=Budget(usd=10), prices={"m": Price(input=1e6, output=0)}, spend_log=spend_log)

    def call(usd):
        with llm.call("m", input_tokens=usd):
            pass

    def check():
        call(2)
        assert llm.statistics().spent_usd == 3.0
        assert spend_log.flush()

    call(1)
    in_child(check)
    call(4)
    spend_log.close()
    (group,) = read_spend(spend_log.path, SpendQuery(by=()))
    assert (group.amounts.calls, group.amounts.usd) == (3, 7.0), group
    assert llm.statistics().spent_usd == 5.0, "each process has its own budget"
    """,
        tmp_path / "spend.db",
    )


def test_a_child_that_outlives_its_parent_keeps_what_it_spends(tmp_path: Path) -> None:
    run(
        """
    os.chdir(sys.argv[1])
    from forebay.spend_log import SpendQuery, read_spend
    from pathlib import Path

    def call(llm):
        with llm.call("m", input_tokens=1):
            pass
        llm.spend_log.flush()

    def upstream():
        prices, files = {"m": Price(input=1e6, output=0)}, ("sqlite:///spend.db", "sqlite:///account.db")
        return Upstream("llm", budget=Budget(usd=10), prices=prices, spend_log=files[0], shared=files[1])

    parent_ends, child = os.pipe()
    parent = os.fork()
    if parent == 0:  # a program that makes its upstream, calls, and becomes a daemon
        os.close(parent_ends)
        llm = upstream()
        call(llm)
        ended, end = os.pipe()
        if os.fork():
            os.close(ended)
            sys.exit()  # in order: SQLite removes its log with the last process that is known to have the file open
        os.close(end)
        os.read(ended, 1)
        for _ in range(5):
            call(llm)
        llm.spend_log.close()
        sys.exit()
    os.close(child)
    os.waitpid(parent, 0)
    os.read(parent_ends, 1)  # the daemon has ended
    (group,) = read_spend(Path("spend.db"), SpendQuery(by=()))
    assert (group.amounts.calls, group.amounts.usd) == (6, 6.0), group
    llm = upstream()
    call(llm)
    assert llm.statistics().spent_usd >= 6.0, llm.statistics()
    """,
        tmp_path,
    )


def test_a_child_that_is_forked_while_a_thread_writes_can_write_too(tmp_path: Path) -> None:
    run(
        """
    import sqlite3
    from forebay.spend_log import SpendAmounts, SpendLabels, SpendLog
    from forebay.spend_log.spend_file import SpendFile
    spend_log = SpendLog("sqlite:///" + sys.argv[1])
    spend_log.open()
    write, writing, forked = SpendFile.write, threading.Event(), threading.Event()
    os.register_at_fork(after_in_parent=forked.set)

    def write_long(file, batch):
        file._connection.execute("BEGIN IMMEDIATE")
        writing.set()
        forked.wait(1)  # a fork that waits for the write comes after that
        file._connection.execute("ROLLBACK")
        write(file, batch)

    def record():
        spend_log.record(SpendLabels(3600, "openai", "acme", "m", ""), SpendAmounts(1, 1, 1, 1.0))

    def check():
        SpendFile.write = write
        record()
        assert spend_log.flush()

    SpendFile.write = write_long
    record()
    assert writing.wait(60)
    in_child(check)
    """,
        tmp_path / "spend.db",
    )


def test_a_program_that_ends_writes_its_spend(tmp_path: Path) -> None:
    run(
        """
    llm = Upstream("llm", prices={"m": Price(input=1e6, output=0)}, spend_log="sqlite:///" + sys.argv[1])
    with llm.call("m", input_tokens=1):
        pass
    """,
        tmp_path / "spend.db",
    )
    (group,) = read_spend(tmp_path / "spend.db", SpendQuery(by=()))
    assert group.amounts.usd == 1.0
