"""`forebay gateway --workers 2`: real processes on one address, with limits that are one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.support.issued_keys import IssuedKeys
from tests.support.redis_servers import runs, until

from forebay import clock

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")]
PATIENCE = 60.0  # seconds on a slow machine
IMPATIENT = {"x-stainless-read-timeout": "1"}  # seconds, so that what has to wait longer is rejected at once
ANSWER = json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()


class Provider(BaseHTTPRequestHandler):
    """A provider that answers each call at once."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def provider() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


class RunningGateway:
    """A gateway with two workers.

    Attributes:
        process: the parent.
        url: of its target.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.said = process.stdout.readline()
        port = re.search(r":(\d+)$", self.said.strip())
        self.url = f"http://127.0.0.1:{port[1]}/openai/v1/chat/completions" if port else ""

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def call(self, key: str = "key") -> int:
        """Make a call, on a connection of its own; return the status of its answer."""
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}", **IMPATIENT}
        request = urllib.request.Request(self.url, body, headers)  # noqa: S310 - http
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
                status: int = answer.status
                return status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    def says(self, line: str) -> bool:
        """Return whether it says this line before it ends."""
        assert self.process.stdout is not None
        return any(each.strip() == line for each in self.process.stdout)

    def counted(self, name: str) -> float:
        """Return the sum of the samples of this name, as any worker shows it, on a connection of its own."""
        with urllib.request.urlopen(f"{self.url.partition('/openai/')[0]}/metrics", timeout=PATIENCE) as page:  # noqa: S310
            lines = page.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[ {{]", line))


@contextmanager
def gateway(provider: str, directory: Path, *options: str) -> Iterator[RunningGateway]:
    command = [sys.executable, "-m", "forebay.cli", "gateway", "--target", f"openai={provider}"]
    environment = {**os.environ, "XDG_STATE_HOME": str(directory), "XDG_RUNTIME_DIR": str(directory)}
    arguments = [*command, "--listen", "127.0.0.1:0", "--workers", "2", "--access-log", "off", *options]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield RunningGateway(process)
        finally:
            process.kill()


def test_a_worker_that_is_killed_is_replaced_and_calls_are_served_meanwhile(provider: str, tmp_path: Path) -> None:
    with gateway(provider, tmp_path) as running:
        killed, other = running.workers()
        os.kill(killed, signal.SIGKILL)
        assert [running.call() for _ in range(10)] == [200] * 10
        until(lambda: len(set(running.workers()) - {killed, other}) == 1, "another worker", within=PATIENCE)
        assert other in running.workers()


def test_whichever_worker_is_scraped_it_shows_the_calls_of_all_and_a_killed_one_takes_none_back(
    provider: str, tmp_path: Path
) -> None:
    name = "forebay_gateway_requests_total"
    with gateway(provider, tmp_path) as running:
        assert [running.call() for _ in range(12)] == [200] * 12
        assert {running.counted(name) for _ in range(8)} == {12.0}
        killed, _ = running.workers()
        os.kill(killed, signal.SIGKILL)
        assert running.counted(name) == 12.0
        until(lambda: running.counted("forebay_gateway_worker_restarts_total") == 1.0, "a new one", within=PATIENCE)
        assert {running.counted(name) for _ in range(8)} == {12.0}
        assert [running.call() for _ in range(6)] == [200] * 6
        assert {running.counted(name) for _ in range(8)} == {18.0}


def test_sigterm_ends_all_workers_and_removes_what_they_shared(provider: str, tmp_path: Path) -> None:
    with gateway(provider, tmp_path) as running:
        assert running.call() == 200
        workers = running.workers()
        assert list(tmp_path.glob("forebay-gateway-*"))
        running.process.terminate()
        assert running.process.wait(PATIENCE) == 0
        assert not any(runs(pid) for pid in workers)
        assert not list(tmp_path.glob("forebay-gateway-*"))


def test_workers_end_with_their_parent(provider: str, tmp_path: Path) -> None:
    with gateway(provider, tmp_path) as running:
        workers = running.workers()
        running.process.kill()
        until(lambda: not any(runs(pid) for pid in workers), "the workers end", within=PATIENCE)
        assert not list(tmp_path.glob("forebay-workers-*"))


def test_workers_share_one_budget(provider: str, tmp_path: Path) -> None:
    """Each call costs a dollar: the budget of eight pays eight, whichever worker serves them."""
    file = tmp_path / "forebay.toml"
    file.write_text(
        f"[targets.openai]\nurl = '{provider}'\nmax_wait = 1\nbudget_usd = 8\nshare_keys = true\n"
        "[targets.openai.prices.m]\ninput = 0\noutput = 1000000\n"
    )
    command = ["--config", str(file), "--shared", f"sqlite:///{tmp_path}/account.db", "--spend-log", "none"]
    with gateway(provider, tmp_path, *command) as running:
        served = [running.call() for _ in range(20)].count(200)
    assert served == 8


def served_in_all(running: RunningGateway, key: str, calls: int) -> tuple[int, float]:
    """Make calls with a key; return how many were served, and the seconds that they took in all."""
    began = clock.monotonic()
    return [running.call(key) for _ in range(calls)].count(200), clock.monotonic() - began


def test_a_rate_of_a_key_is_one_for_all_workers(provider: str, tmp_path: Path) -> None:
    keys = f"sqlite:///{tmp_path}/keys.db"
    key = asyncio.run(IssuedKeys(tmp_path / "keys.db").create("writer", rpm=30))
    with gateway(provider, tmp_path, "--keys", keys, "--share-keys", "--spend-log", "none") as running:
        served, seconds = served_in_all(running, key, 80)
    assert 30 <= served <= 31 + seconds / 2


def test_a_rate_of_a_tenant_is_one_for_all_workers(provider: str, tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text(f"[targets.openai]\nurl = '{provider}'\nshare_keys = true\n[tenants.default]\nrpm = 30\n")
    with gateway(provider, tmp_path, "--config", str(file)) as running:
        served, seconds = served_in_all(running, "any", 80)
    assert 30 <= served <= 31 + seconds / 2


def test_a_budget_of_a_key_is_one_for_all_workers_and_is_not_refilled_by_a_restart(
    provider: str, tmp_path: Path
) -> None:
    file = tmp_path / "forebay.toml"
    file.write_text(
        f"[targets.openai]\nurl = '{provider}'\nshare_keys = true\n"
        "[targets.openai.prices.m]\ninput = 0\noutput = 1000000\n"
    )
    key = asyncio.run(IssuedKeys(tmp_path / "keys.db").create("writer", budget_usd=8.0))
    options = ["--keys", f"sqlite:///{tmp_path}/keys.db", "--shared", f"sqlite:///{tmp_path}/account.db"]
    for expected in (8, 0):
        with gateway(provider, tmp_path, "--config", str(file), *options) as running:
            assert served_in_all(running, key, 20)[0] == expected
            running.process.terminate()
            assert running.process.wait(PATIENCE) == 0


def write_configuration(file: Path, provider: str, *, rpm: int = 1_000, more: str = "") -> None:
    target = f"[targets.openai]\nurl = '{provider}'\nshare_keys = true\nrpm = {rpm}\n{more}\n"
    file.write_text(f"{target}[targets.openai.prices.m]\ninput = 1\noutput = 1\n")


def test_one_hang_up_reloads_all_workers_and_the_one_that_replaces_a_dead_one(provider: str, tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    write_configuration(file, provider)
    with gateway(provider, tmp_path, "--config", str(file)) as running:
        assert [running.call() for _ in range(8)] == [200] * 8
        write_configuration(file, provider, rpm=2_000, more="budget_usd = 7")
        running.process.send_signal(signal.SIGHUP)
        assert running.says(f"reloaded {file}")
        assert {running.counted("forebay_budget_limit_usd") for _ in range(8)} == {7.0}
        assert [running.call() for _ in range(8)] == [200] * 8
        killed = running.workers()
        write_configuration(file, provider, more="nonsense = true")  # what a worker that starts must not read
        os.kill(killed[0], signal.SIGKILL)
        os.kill(killed[1], signal.SIGKILL)
        until(lambda: len(set(running.workers()) - set(killed)) == 2, "other workers", within=PATIENCE)
        until(lambda: running.counted("forebay_gateway_workers") == 2.0, "both answer", within=PATIENCE)
        assert {running.counted("forebay_budget_limit_usd") for _ in range(8)} == {7.0}
        until(lambda: running.call() == 200, "the leases of the killed ones have ended", within=PATIENCE)


def test_hang_ups_in_a_row_reload_one_after_the_other(provider: str, tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    write_configuration(file, provider)
    with gateway(provider, tmp_path, "--config", str(file)) as running:
        for usd in (5, 6, 7):
            write_configuration(file, provider, more=f"budget_usd = {usd}")
            running.process.send_signal(signal.SIGHUP)
        assert running.says(f"reloaded {file}")
        until(lambda: running.counted("forebay_budget_limit_usd") == 7.0, "the last one holds", within=PATIENCE)
        assert [running.call() for _ in range(8)] == [200] * 8


def test_a_gateway_whose_workers_cannot_start_says_why_once_and_fails(provider: str, tmp_path: Path) -> None:
    with gateway(provider, tmp_path, "--keys", f"sqlite:///{tmp_path}/missing.db") as running:
        assert running.said == ""
        assert running.process.wait(PATIENCE) == 1
