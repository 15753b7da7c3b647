"""Real Redis servers for tests, on free ports of the loopback: one, a master with its replicas, Sentinels, a cluster.

``with redis_server() as redis:`` has one of its own; ``shared(redis_server)`` returns the one of this test process,
which starts when the first test asks for it. Tests on the shared one use keys of their own (``?name=``) and do not
kill it. Nothing waits by time: each function returns when the servers report that they have got there.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
import redis
from redis.crc import key_slot
from tests.support.cutting_proxy import CuttingProxy

T = TypeVar("T")

HOST: Final = "127.0.0.1"
SERVICE: Final = "service"  # the name by which Sentinels know their master
START: Final = 30.0  # seconds within which servers must have started, or taken over, on a busy machine
PORTS: Final = range(11_000, 31_000)  # none of those that the system gives to outgoing connections
BASE_OPTIONS: Final = {
    "bind": HOST,
    "save": "",
    "appendonly": "no",
    "protected-mode": "no",
    "enable-debug-command": "yes",
    "repl-diskless-sync-delay": "0",  # a fresh replica is copied at once
    "repl-ping-replica-period": "1",
}

# The server is the child of a shell that kills it when this process has gone, whichever way: its standard input ends.
# Until the shell has ended too, the process id is not used again.
_END_WITH_PARENT: Final = '"$@" & echo $!; read -r _; kill -9 $!; wait'


def missing() -> str | None:
    """Return what must be installed, or None."""
    if shutil.which("redis-server") is None:
        return "redis-server is missing: `make packages`, or `apt-get install redis-server` as root"
    return None


def until(condition: Callable[[], T | None], what: str, *, within: float = START) -> T:
    """Return the first true value of `condition`, which is asked again and again.

    Args:
        condition: a function that may raise an error of Redis while it is not true yet.
        what: the condition in words, for the error.
        within: seconds.
    """
    limit = time.monotonic() + within
    last: Exception | None = None
    while time.monotonic() < limit:
        try:
            if value := condition():
                return value
        except redis.RedisError as error:
            last = error
        time.sleep(0.01)
    raise TimeoutError(f"not within {within:.0f} s: {what}; the last error: {last!r}")


class RedisServer:
    """One redis-server process, with its port and its directory, which outlive it.

    Attributes:
        port: on which it listens.
        announced: the port by which others know it: its own, or that of the proxy before it.
        pid: of the running process.
    """

    def __init__(self, directory: Path, options: dict[str, str], *, sentinel: bool = False) -> None:
        directory.mkdir()
        self.port = free_port()
        self.announced = self.port
        self.pid = 0
        self.directory = directory
        self.options = {**({} if sentinel else BASE_OPTIONS), **options}
        self._sentinel = sentinel
        self._shell: subprocess.Popen[str] | None = None
        self._stopped = False

    def __str__(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """Return what the server has logged."""
        path = self.directory / "log"
        return path.read_text() if path.exists() else ""

    def spawn(self) -> None:
        """Start the process, with the data of the one before; `wait` for it before it is used."""
        configuration = self.directory / "redis.conf"
        options = {"port": str(self.port), "dir": str(self.directory), "logfile": str(self.directory / "log")}
        options |= self.options
        if not configuration.exists():  # Sentinels keep in it what they know
            lines = [f'{key} "{value}"' for key, value in options.items()]
            configuration.write_text("\n".join(lines) + "\n")
        command = ["redis-server", str(configuration), *(["--sentinel"] if self._sentinel else [])]
        self._shell = subprocess.Popen(
            ["sh", "-c", _END_WITH_PARENT, "sh", *command],  # noqa: S607
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._shell.stdout is not None
        self.pid = int(self._shell.stdout.readline())

    def wait(self) -> None:
        """Return when the server answers, with its data loaded."""
        until(self._answers, f"{self} answers PING; its log:\n{self.log}")

    def _answers(self) -> bool:
        if not runs(self.pid):
            raise RuntimeError(f"redis-server did not start on {self}:\n{self.log}")
        with self.client() as client:
            return bool(client.ping())

    def start(self) -> None:
        """Start the process again, with the data on disk, and wait until it answers."""
        self.spawn()
        self.wait()

    def client(self, **options: Any) -> Any:
        """Return a client of this server, past any proxy. It decodes answers."""
        options = {"password": self.options.get("requirepass"), "socket_timeout": 10.0, **options}
        return redis.Redis(HOST, self.port, decode_responses=True, **options)

    def ask(self, *command: object) -> Any:
        """Return the answer to one command, on a connection of its own."""
        with self.client() as client:
            return client.execute_command(*command)

    def info(self, section: str) -> dict[str, Any]:
        """Return a section of INFO."""
        with self.client() as client:
            info: dict[str, Any] = client.info(section)
            return info

    def kill(self) -> None:
        """End the process by SIGKILL, and wait for it: its port is free, and its data is what is on disk."""
        if self._shell is not None:
            self._signal(signal.SIGKILL)
            self._shell.communicate()  # ends its standard input
            self._shell = None
            self._stopped = False

    def stop(self) -> None:
        """Let the process do nothing, with its connections open, until `go_on`."""
        self._signal(signal.SIGSTOP)
        self._stopped = True
        until(lambda: _state(self.pid) == "T", f"{self} is stopped")

    def go_on(self) -> None:
        """Let the stopped process go on."""
        self._signal(signal.SIGCONT)
        self._stopped = False

    def _signal(self, number: signal.Signals) -> None:
        assert self._shell is not None, f"{self} does not run"
        os.kill(self.pid, number)  # the shell has not waited for it, so the id is its own

    @property
    def running(self) -> bool:
        """Return whether the process has been started, and been neither killed nor stopped."""
        return self._shell is not None and not self._stopped


def _state(pid: int) -> str:
    """Return the state of a process as one letter, "Z" if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def runs(pid: int) -> bool:
    """Return whether a process has not ended."""
    return _state(pid) != "Z"


_given: Final[set[int]] = set()


def free_port() -> int:
    """Return a port on which nothing listens, and that this process has not been given before."""
    draw = random.Random(f"{os.getpid()} {len(_given)}")
    while True:
        port = draw.choice(PORTS)
        with socket.socket() as listener:
            try:
                listener.bind((HOST, port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port


class RedisSetup:
    """Servers that have started, as a test sees them.

    Attributes:
        url: what Forebay connects to, without options.
        servers: those that hold data, the first master first.
        proxies: one before each server, in their order, if the setup was asked for them.
    """

    def __init__(self, directory: Path, stack: ExitStack, *, proxied: bool) -> None:
        self.servers: list[RedisServer] = []
        self.proxies: list[CuttingProxy] = []
        self.url = ""
        self._directory = directory
        self._stack = stack
        self._proxied = proxied

    def _add(self, options: dict[str, str], *, sentinel: bool = False) -> RedisServer:
        """Return a new server, not started, which ends with the setup."""
        server = RedisServer(self._directory / f"{len(list(self._directory.iterdir()))}", options, sentinel=sentinel)
        self._stack.callback(server.kill)
        if not sentinel:
            self.servers.append(server)
            if self._proxied:
                self.proxies.append(self._stack.enter_context(CuttingProxy(server.port)))
                server.announced = self.proxies[-1].port
        return server

    def proxy(self, server: RedisServer) -> CuttingProxy:
        """Return the proxy before `server`."""
        return self.proxies[self.servers.index(server)]

    def master(self, name: str = "forebay") -> RedisServer:  # noqa: ARG002 - one master has all names
        """Return the running server that has the keys of the overflow `name` and takes writes."""
        [master] = [server for server in self._running() if server.info("replication")["role"] == "master"]
        return master

    def replicas(self, name: str = "forebay") -> list[RedisServer]:  # noqa: ARG002
        """Return the running replicas of that master."""
        return [server for server in self._running() if server.info("replication")["role"] == "slave"]

    def promote(self, name: str = "forebay") -> RedisServer:
        """Let a replica of `name` take the place of the master, alive or dead, and return it when it takes writes."""
        raise NotImplementedError

    def kill_master(self, name: str = "forebay") -> RedisServer:
        """End the master by SIGKILL and return it. What its proxy has not passed on is lost, as with its machine."""
        master = self.master(name)
        if self._proxied:
            self.proxy(master).refuse()  # else the proxy would pass on what was sent before the end
        master.kill()
        if self._proxied:
            self.proxy(master).accept()
        return master

    def wait_for_replicas(self, name: str = "forebay") -> None:
        """Return when each replica has all that the master of `name` has now."""
        master, replicas = self.master(name), self.replicas(name)
        offset = master.info("replication")["master_repl_offset"]
        for replica in replicas:
            until(lambda replica=replica: _has(replica, offset), f"{replica} has what {master} has")  # type: ignore[misc]

    def _running(self) -> list[RedisServer]:
        return [server for server in self.servers if server.running]

    def _wait_for_links(self) -> None:
        """Return when each replica has the data of its master and follows it."""
        for server in self._running():
            until(lambda server=server: _is_linked(server), f"{server} follows its master")  # type: ignore[misc]


def _has(replica: RedisServer, offset: int) -> bool:
    return bool(replica.info("replication")["slave_repl_offset"] >= offset)


def _is_linked(server: RedisServer) -> bool:
    replication = server.info("replication")
    return bool(replication["role"] == "master" or replication["master_link_status"] == "up")


class StandaloneRedis(RedisSetup):
    """One server, or a master with replicas that only a test promotes."""

    def start(self, replicas: int, options: dict[str, str]) -> None:
        """Start the master, then the replicas."""
        master = self._add(options)
        master.start()
        for _ in range(replicas):
            self._add({**options, "replicaof": f"{HOST} {master.announced}"}).spawn()
        self._wait_for_links()
        password = f":{options['requirepass']}@" if "requirepass" in options else ""
        self.url = f"redis://{password}{HOST}:{master.announced}/0"

    def promote(self, name: str = "forebay") -> RedisServer:  # noqa: ARG002 - one master has all names
        promoted = self.replicas()[0]
        promoted.ask("REPLICAOF", "NO", "ONE")
        for server in self._running():
            if server is not promoted:
                server.ask("REPLICAOF", HOST, promoted.announced)
        return promoted


class SentinelRedis(RedisSetup):
    """A master and two replicas, watched by three Sentinels.

    Attributes:
        sentinels: the three.
    """

    def start(self, down_after: float, options: dict[str, str]) -> None:
        """Start the servers, then the Sentinels, and wait until these know each other and both replicas."""
        for _ in range(3):
            server = self._add(options)
            server.options |= {"replica-announce-ip": HOST, "replica-announce-port": str(server.announced)}
        master = self.servers[0]
        for server in self.servers:
            if server is not master:
                server.options["replicaof"] = f"{HOST} {master.announced}"
            server.spawn()
        for server in self.servers:
            server.wait()
        self._wait_for_links()
        self.sentinels = [self._add({"bind": HOST}, sentinel=True) for _ in range(3)]
        for sentinel in self.sentinels:
            sentinel.spawn()
        for sentinel in self.sentinels:
            sentinel.wait()
            # In milliseconds. A promotion is noticed after up to 1000, and reverted after 4 publish periods; a replica
            # is promoted only if it has answered a PING within 5 periods, and INFO within 3.
            sentinel.ask(
                *("SENTINEL", "DEBUG", "INFO-PERIOD", 300, "PUBLISH-PERIOD", 500, "PING-PERIOD", 400),
                *("ASK-PERIOD", 100, "ELECTION-TIMEOUT", 1000, "SLAVE-RECONF-TIMEOUT", 1000),
            )
            # The first finds the master down before the others, so that they do not stand against it.
            silence = down_after + 2.0 * self.sentinels.index(sentinel)
            sentinel.ask("SENTINEL", "MONITOR", SERVICE, HOST, master.announced, 1)
            sentinel.ask("SENTINEL", "SET", SERVICE, "DOWN-AFTER-MILLISECONDS", round(1000 * silence))
            sentinel.ask("SENTINEL", "SET", SERVICE, "FAILOVER-TIMEOUT", 2000)  # a second try waits for two of them
        for sentinel in self.sentinels:
            until(lambda sentinel=sentinel: self._knows_all(sentinel), "the Sentinels know each other")  # type: ignore[misc]
        self.url = "redis+sentinel://" + ",".join(map(str, self.sentinels)) + f"/{SERVICE}/0"

    @staticmethod
    def _knows_all(sentinel: RedisServer) -> bool:
        with sentinel.client() as client:
            state = client.sentinel_master(SERVICE)
            return bool(state["num-slaves"] == 2 and state["num-other-sentinels"] == 2)

    def _address(self) -> int:
        """Return the port of the master that the Sentinels agree on, 0 while they do not."""
        ports = {
            int(sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
            for sentinel in self.sentinels
            if sentinel.running
        }
        return ports.pop() if len(ports) == 1 else 0

    def master(self, name: str = "forebay") -> RedisServer:  # noqa: ARG002 - one master has all names
        port = until(self._address, "the Sentinels agree on a master")
        return next(server for server in self.servers if server.announced == port)

    def promote(self, name: str = "forebay") -> RedisServer:
        before = self.master(name)
        if before.running:
            self.sentinels[0].ask("SENTINEL", "FAILOVER", SERVICE)
        until(lambda: self._address() not in {0, before.announced}, "the Sentinels have another master")
        master = self.master(name)
        until(lambda: master.info("replication")["role"] == "master", f"{master} takes writes")
        replicas = {server.announced for server in self._running()} - {master.announced}
        for sentinel in self.sentinels:  # else they would not promote one of them if the new master died at once
            until(lambda sentinel=sentinel: self._followers(sentinel) == replicas, "the replicas follow the new master")  # type: ignore[misc]
        return master

    @staticmethod
    def _followers(sentinel: RedisServer) -> set[int]:
        """Return the replicas that a Sentinel would promote."""
        with sentinel.client() as client:
            known = client.sentinel_slaves(SERVICE)
        return {each["port"] for each in known if each["flags"] == "slave" and each["master-link-status"] == "ok"}


class ClusterRedis(RedisSetup):
    """A cluster of three masters, with one replica each."""

    def start(self, node_timeout: float, options: dict[str, str]) -> None:
        """Start the nodes, and wait until each of them knows the same cluster, which is whole."""
        for _ in range(6):
            server = self._add(options)
            server.options |= {
                "cluster-enabled": "yes",
                "cluster-port": str(free_port()),
                "cluster-node-timeout": str(round(1000 * node_timeout)),
                "cluster-announce-ip": HOST,
                "cluster-announce-port": str(server.announced),
            }
            server.spawn()
        masters, replicas = self.servers[:3], self.servers[3:]
        for server in self.servers:
            server.wait()
        bounds = [0, 5461, 10923, 16384]
        for number, master in enumerate(masters):
            master.ask("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
            master.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server in self.servers[1:]:
            for other in self.servers[: self.servers.index(server)]:
                server.ask("CLUSTER", "MEET", HOST, other.announced, other.options["cluster-port"])
        for master, replica in zip(masters, replicas, strict=True):
            node = master.ask("CLUSTER", "MYID")
            until(lambda node=node, replica=replica: _knows(replica, node), f"{replica} knows {master}")  # type: ignore[misc]
            replica.ask("CLUSTER", "REPLICATE", node)
        self._wait_for_links()
        for server in self.servers:
            until(lambda server=server: _is_whole(server), f"{server} knows the whole cluster")  # type: ignore[misc]
        self.url = "redis+cluster://" + ",".join(f"{HOST}:{server.announced}" for server in self.servers[:3])

    def _owner(self, name: str) -> RedisServer | None:
        """Return the running master that says that it has the slot of `name`; None if there is none now."""
        slot = key_slot(f"{{{name}}}".encode())
        for server in self._running():
            [known] = [each for each in server.ask("CLUSTER NODES").values() if "myself" in each["flags"]]
            if any(int(bounds[0]) <= slot <= int(bounds[-1]) for bounds in known["slots"]):
                return server
        return None

    def master(self, name: str = "forebay") -> RedisServer:
        return until(lambda: self._owner(name), f"a master has the slot of {name!r}")

    def replicas(self, name: str = "forebay") -> list[RedisServer]:
        port = self.master(name).announced
        found = []
        for server in self._running():
            replication = server.info("replication")
            if replication["role"] == "slave" and replication["master_port"] == port:
                found.append(server)
        return found

    def promote(self, name: str = "forebay") -> RedisServer:
        before = self._owner(name)
        if before is not None:
            until(lambda: self.replicas(name), f"{before} has a replica")[0].ask("CLUSTER", "FAILOVER")

        def successor() -> RedisServer | None:
            owner = self._owner(name)
            return None if owner is before else owner

        master = until(successor, f"another master has the slot of {name!r}")
        for server in self._running():
            until(lambda server=server: _is_whole(server), f"{server} knows the whole cluster")  # type: ignore[misc]
        return master


def _knows(server: RedisServer, node: str) -> bool:
    known = server.ask("CLUSTER NODES")
    return any(each["node_id"] == node and "handshake" not in each["flags"] for each in known.values())


def _is_whole(server: RedisServer) -> bool:
    state = server.ask("CLUSTER INFO")
    return bool(state["cluster_state"] == "ok" and state["cluster_known_nodes"] == "6" and state["cluster_size"] == "3")


Setup = TypeVar("Setup", bound=RedisSetup)


@contextlib.contextmanager
def _started(kind: type[Setup], start: Callable[[Setup], None], *, proxied: bool) -> Iterator[Setup]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="redis-", ignore_cleanup_errors=True) as directory, ExitStack() as stack:
        setup = kind(Path(directory), stack, proxied=proxied)
        start(setup)
        yield setup


def _settings(options: dict[str, str]) -> dict[str, str]:
    return {key.replace("_", "-"): value for key, value in options.items()}


def redis_server(*, proxied: bool = False, **options: str) -> AbstractContextManager[StandaloneRedis]:
    """Run one server, with options as in its configuration: ``redis_server(maxmemory="5mb", appendonly="yes")``."""
    return _started(StandaloneRedis, lambda setup: setup.start(0, _settings(options)), proxied=proxied)


def redis_replicated(
    *, replicas: int = 1, proxied: bool = False, **options: str
) -> AbstractContextManager[StandaloneRedis]:
    """Run a master, and replicas that follow it; a proxy before the master also has their connections to it."""
    return _started(StandaloneRedis, lambda setup: setup.start(replicas, _settings(options)), proxied=proxied)


def redis_sentinels(
    *, down_after: float = 0.5, proxied: bool = False, **options: str
) -> AbstractContextManager[SentinelRedis]:
    """Run a master, two replicas and three Sentinels, which replace a master after `down_after` seconds of silence."""
    return _started(SentinelRedis, lambda setup: setup.start(down_after, _settings(options)), proxied=proxied)


def redis_cluster(
    *, node_timeout: float = 0.5, proxied: bool = False, **options: str
) -> AbstractContextManager[ClusterRedis]:
    """Run a cluster of three masters and three replicas, which replaces a master after `node_timeout` of silence."""
    return _started(ClusterRedis, lambda setup: setup.start(node_timeout, _settings(options)), proxied=proxied)


_shared: Final[dict[tuple[int, Any], Any]] = {}


def shared(start: Callable[[], AbstractContextManager[Setup]]) -> Setup:
    """Return the setup that all tests of this process share: ``shared(redis_cluster).url``."""
    key = (os.getpid(), start)  # a fork has none of its parent's
    if key not in _shared:
        context = start()
        setup = context.__enter__()
        _shared[key] = setup

        def end() -> None:
            if os.getpid() == key[0]:
                context.__exit__(None, None, None)

        atexit.register(end)
    found: Setup = _shared[key]
    return found
