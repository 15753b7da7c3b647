"""``forebay autoscale`` with real processes and real HTTP: a double of the API server, whose pods are workers.

Each replica that the double is asked for is a process of ``forebay worker``; one that is too many gets SIGTERM, as a
pod does. Their addresses are addresses of the loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from lightkube import KubeConfig
from tests.support.kubernetes_double import NAMESPACE, KubernetesDouble, serve

from forebay import BackpressureSupervisor, Task, Verdict
from forebay.scale import KubernetesTarget
from forebay.scale.kubernetes_api import KubernetesApi
from forebay.scale.kubernetes_client import KubernetesClient

pytestmark = [pytest.mark.slow, pytest.mark.blocks]

TOKEN = "a-token"  # noqa: S105 - of the double
APP = """
import asyncio, os
from forebay import BackpressureSupervisor

supervisor = BackpressureSupervisor(overflow="sqlite:///{folder}/spill.db?fsync=no", lease=5.0, max_queue_size=0)

@supervisor.worker("work", max_concurrent=4)
async def work(task):
    with open("{folder}/runs", "a") as runs:
        runs.write(f"{{task.payload}} {{os.getpid()}}\\n")
    await asyncio.sleep(0.3)
    return os.getpid()
"""
CONFIG = """
[autoscaler]
overflow = "sqlite:///{folder}/spill.db?fsync=no"
task_types = ["work"]
seats = 4
minimum = 0
maximum = 3
interval = 0.1
window = 2
panic_window = 0.3
stabilization = 2

[target.kubernetes]
workload = "deployment/workers"
report_port = {port}

[leader.kubernetes]
duration = 3
"""
KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: test
contexts: [{{name: test, context: {{cluster: test, user: test, namespace: {namespace}}}}}]
clusters: [{{name: test, cluster: {{server: "{url}"}}}}]
users: [{{name: test, user: {{token: {token}}}}}]
"""


class Pods:
    """Processes that follow the replicas of a Deployment, as a controller and a kubelet have it."""

    def __init__(self, double: KubernetesDouble, app: Path, port: int) -> None:
        self.double = double
        self.app = app
        self.port = port
        self.most = 0
        self.statuses: list[int] = []
        self._live: dict[str, asyncio.subprocess.Process] = {}
        self._going: set[asyncio.Task[None]] = set()
        self._made = 1

    async def follow(self) -> None:
        """Start and stop processes as the double is asked, until it is cancelled."""
        try:
            while True:
                wanted = self.double.replicas()
                while len(self._live) < wanted:
                    await self._start()
                while len(self._live) > wanted:
                    name, process = self._live.popitem()  # the youngest
                    self.double.remove(name, resource="pods")
                    process.terminate()
                    self._going.add(asyncio.ensure_future(self._end(process)))
                self.most = max(self.most, len(self._live))
                ready = [name for name, ip in self._addresses() if await self._ready(ip)]
                for name, ip in self._addresses():
                    self.double.pod(name, ip, ready=name in ready)
                if self.double.get("deployments", "workers")["status"].get("readyReplicas", 0) != len(ready):
                    self.double.set_ready("workers", len(ready))
                await asyncio.sleep(0.05)
        finally:
            for process in self._live.values():
                process.terminate()
                self._going.add(asyncio.ensure_future(self._end(process)))
            if self._going:
                await asyncio.wait(self._going)

    def _addresses(self) -> list[tuple[str, str]]:
        return [(name, f"127.0.0.{name.rpartition('-')[2]}") for name in self._live]

    async def _start(self) -> None:
        self._made += 1
        name = f"workers-{self._made}"
        self._live[name] = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "forebay.cli", "worker", f"{self.app}:supervisor",
            "--listen", f"127.0.0.{self._made}:{self.port}",
        )  # fmt: skip

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        self.statuses.append(await process.wait())

    async def _ready(self, ip: str) -> bool:
        """Probe a pod as a kubelet does."""
        try:
            reader, writer = await asyncio.open_connection(ip, self.port)
            writer.write(b"GET /readyz HTTP/1.1\r\n\r\n")
            answer = await reader.read()
            writer.close()
        except OSError:
            return False
        return answer.startswith(b"HTTP/1.1 200")


@contextlib.asynccontextmanager
async def cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replicas: int = 1
) -> AsyncIterator[KubernetesDouble]:
    double = KubernetesDouble()
    double.token = TOKEN
    double.workload(replicas=replicas)
    async with serve(double) as url:
        file = tmp_path / "kubeconfig"
        file.write_text(KUBECONFIG.format(namespace=NAMESPACE, url=url, token=TOKEN))
        monkeypatch.setenv("KUBECONFIG", str(file))
        yield double


@contextlib.asynccontextmanager
async def submitter(folder: Path) -> AsyncIterator[BackpressureSupervisor]:
    """Run a supervisor whose tasks all wait in the overflow, for other processes."""
    overflow = f"sqlite:///{folder}/spill.db?fsync=no"
    async with BackpressureSupervisor(overflow=overflow, lease=5.0, max_queue_size=0) as supervisor:
        supervisor.register_worker("elsewhere", handler=_never, task_types=["work"])
        supervisor.pause("work")
        yield supervisor


async def _never(_: Task) -> None:
    raise AssertionError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def until(condition: Any) -> None:
    """Wait until something holds; the test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - of other processes, which set no event
        await asyncio.sleep(0.02)


async def test_pods_come_with_a_surge_and_drain_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    app, config = tmp_path / "pods_app.py", tmp_path / "autoscale.toml"
    app.write_text(textwrap.dedent(APP).format(folder=tmp_path))
    config.write_text(CONFIG.format(folder=tmp_path, port=port))
    async with cluster(tmp_path, monkeypatch, replicas=0) as double, submitter(tmp_path) as supervisor:
        pods = Pods(double, app, port)
        following = asyncio.ensure_future(pods.follow())
        command = [sys.executable, "-m", "forebay.cli", "autoscale", "--config", str(config)]
        scalers = [await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE) for _ in range(2)]
        try:
            tickets = [await supervisor.submit(Task("work", number)) for number in range(120)]
            assert {ticket.verdict for ticket in tickets} == {Verdict.SPILLED}
            results = [await ticket for ticket in tickets]
            assert all(result.success for result in results)
            await until(lambda: double.replicas() == 0)
            for each in scalers:
                each.send_signal(signal.SIGTERM)
            outputs = [(await each.communicate())[0].decode() for each in scalers]
        finally:
            for each in scalers:
                if each.returncode is None:
                    each.kill()
                    await each.wait()
            following.cancel()
            await asyncio.wait((following,))
        assert [each.returncode for each in scalers] == [0, 0]
        assert sorted("kubernetes:deployment/workers: 0 -> " in output for output in outputs) == [False, True]
        assert pods.most == 3
        assert pods.statuses
        assert set(pods.statuses) == {0}
        runs = (tmp_path / "runs").read_text().split("\n")[:-1]
        assert sorted(int(line.split()[0]) for line in runs) == list(range(120))  # none lost, none twice
        assert double.count("list pods") > 1
        assert (
            "holderIdentity" not in double.get("leases", "forebay-autoscaler-deployment-workers")["spec"]
        )  # given back


async def test_a_leader_that_is_stopped_or_killed_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "autoscale.toml"
    config.write_text(CONFIG.format(folder=tmp_path, port=free_port()).replace("minimum = 0", "minimum = 2"))
    command = [sys.executable, "-m", "forebay.cli", "autoscale", "--config", str(config)]
    async with cluster(tmp_path, monkeypatch, replicas=2) as double:
        scalers = [await asyncio.create_subprocess_exec(*command) for _ in range(3)]

        def leader() -> asyncio.subprocess.Process | None:
            lease = double.find("leases", "forebay-autoscaler-deployment-workers")
            holder = "" if lease is None else lease["spec"].get("holderIdentity", "")
            return next((each for each in scalers if f"-{each.pid}-" in holder), None)

        async def acts(by: asyncio.subprocess.Process) -> None:
            """Wait until what somebody else has scaled is set right, by the leader alone."""
            double.set_replicas(1)
            await until(lambda: double.replicas() == 2)
            assert leader() is by

        try:
            await until(leader)
            first = leader()
            assert first is not None
            await acts(first)
            first.send_signal(signal.SIGSTOP)
            await until(lambda: leader() is not first)
            second = leader()
            assert second is not None
            await acts(second)
            first.send_signal(signal.SIGCONT)
            await acts(second)
            second.kill()
            await second.wait()
            await until(lambda: leader() not in (None, second))
            third = leader()
            assert third is not None
            await acts(third)
        finally:
            for each in scalers:
                if each.returncode is None:
                    each.send_signal(signal.SIGCONT)
                    each.send_signal(signal.SIGTERM)
                    await each.wait()
        assert sorted(each.returncode or 0 for each in scalers) == [-signal.SIGKILL, 0, 0]


async def test_over_http_a_watch_is_cut_and_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(tmp_path, monkeypatch, replicas=2) as double:
        target = KubernetesTarget("deployment/workers")
        await target.open()
        try:
            assert (await target.replicas()).ready == 2
            await until(lambda: double.watchers == 1)
            for ready in (1, 2, 0):
                double.end_watches(cut=True)
                double.set_ready("workers", ready)
                while (await target.replicas()).ready != ready:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            await target.scale(5)
            assert double.replicas() == 5
        finally:
            await target.close()
        await until(lambda: double.watchers == 0)


async def test_the_service_account_of_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token changes: it is read again."""
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("old")
    (account / "namespace").write_text(NAMESPACE)
    double = KubernetesDouble()
    double.token = "old"  # noqa: S105
    double.workload(replicas=2)
    async with serve(double) as url:
        host, _, port = url.rpartition("//")[2].partition(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        config = KubeConfig.from_service_account(str(account)).get()
        assert config is not None
        cluster = config.cluster
        config = config._replace(cluster=type(cluster)(server=url))  # the double has no certificate
        api = KubernetesApi(client=KubernetesClient(config))
        target = KubernetesTarget("deployment/workers", api=api)
        await target.open()
        try:
            assert api.namespace == NAMESPACE
            double.token = "new"  # noqa: S105
            (account / "token").write_text("new")
            assert (await target.replicas()).current == 2
        finally:
            await target.close()
            await api.close()
