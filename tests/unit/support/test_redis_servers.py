"""The Redis servers of tests start, fail over and end as they are told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.support import redis_servers
from tests.support.redis_servers import (
    RedisSetup,
    redis_cluster,
    redis_replicated,
    redis_sentinels,
    redis_server,
    until,
)

KINDS: list[Callable[..., AbstractContextManager[RedisSetup]]] = [redis_replicated, redis_sentinels, redis_cluster]
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("proxied", [False, True], ids=["bare", "proxied"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_replica_takes_over_from_a_master_that_lives_and_from_one_that_was_killed(
    kind: Callable[..., AbstractContextManager[RedisSetup]],
    proxied: bool,  # noqa: FBT001
) -> None:
    with kind(proxied=proxied) as setup:
        first = setup.master()
        with first.client() as client:
            client.set("{forebay}", "value")
            assert client.wait(1, 10_000) >= 1
        assert setup.replicas()
        second = setup.promote()
        assert second is setup.master() is not first
        until(lambda: first in setup.replicas(), "the old master follows the new one")
        assert setup.kill_master() is second
        third = setup.promote()
        assert third is setup.master() is not second
        assert third.ask("GET", "{forebay}") == "value"


def test_a_server_that_was_killed_has_what_is_on_disk() -> None:
    with redis_server(appendonly="yes", appendfsync="always", requirepass="a secret") as setup:
        [server] = setup.servers
        server.ask("SET", "key", "value")
        assert setup.kill_master() is server
        assert not server.running
        server.start()
        assert server.ask("GET", "key") == "value"
        assert setup.url == f"redis://:a secret@127.0.0.1:{server.port}/0"


def test_servers_end_with_a_process_that_is_killed() -> None:
    if (reason := redis_servers.missing()) is not None:
        pytest.skip(reason)
    program = """
import sys, time
from tests.support.redis_servers import redis_server, shared
server = shared(redis_server).servers[0]
server.stop()  # not even a stopped one is left
print(server.pid, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        assert redis_servers.runs(pid)
        os.kill(child.pid, signal.SIGKILL)
    until(lambda: not redis_servers.runs(pid), "the server has ended")


def test_without_redis_a_test_is_skipped_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="apt-get install redis-server"), redis_server():
        pass
