"""The target of EC2 instances and the worker of one, with a service that simulates AWS over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("botocore")

import botocore.session
from tests.support import moto_server
from tests.support.faulty_proxy import CUT, LOST, THROTTLING, UNAVAILABLE, FaultyProxy, faulty_proxy
from tests.support.metadata_server import metadata_server

from forebay import BackpressureSupervisor, Task
from forebay.errors import ScalingFailed
from forebay.scale import Autoscaler, Ec2Target, Replicas

pytestmark = [pytest.mark.slow, pytest.mark.blocks]

REGION = "eu-west-1"
_numbers = itertools.count()


class Group:
    """A group of a simulated service, and its address."""

    def __init__(self, endpoint: str, proxy: FaultyProxy) -> None:
        session = botocore.session.get_session()
        self.client = session.create_client("autoscaling", region_name=REGION, endpoint_url=endpoint)
        self.name = f"workers-{next(_numbers)}"
        self.proxy = proxy
        images = session.create_client("ec2", region_name=REGION, endpoint_url=endpoint).describe_images()["Images"]
        self.client.create_launch_configuration(
            LaunchConfigurationName=self.name, ImageId=images[0]["ImageId"], InstanceType="t3.micro"
        )
        self.client.create_auto_scaling_group(
            AutoScalingGroupName=self.name,
            LaunchConfigurationName=self.name,
            MinSize=1,
            MaxSize=6,
            DesiredCapacity=2,
            AvailabilityZones=[f"{REGION}a"],
        )

    def target(self, **settings: Any) -> Ec2Target:
        """Return the target, which reaches the service by the proxy."""
        return Ec2Target(self.name, region=REGION, endpoint=self.proxy.url, **settings)

    def read(self) -> Any:
        """Return its description."""
        return self.client.describe_auto_scaling_groups(AutoScalingGroupNames=[self.name])["AutoScalingGroups"][0]

    @property
    def instances(self) -> dict[str, bool]:
        """The ids of its instances, and whether each is protected."""
        return {each["InstanceId"]: each["ProtectedFromScaleIn"] for each in self.read()["Instances"]}

    def protect(self, *instances: str) -> None:
        """Protect instances, as their workers do."""
        self.client.set_instance_protection(
            AutoScalingGroupName=self.name, InstanceIds=list(instances), ProtectedFromScaleIn=True
        )


@pytest.fixture
def group() -> Iterator[Group]:
    """Return a group of two instances."""
    endpoint = moto_server.endpoint()
    with faulty_proxy(endpoint) as proxy:
        yield Group(endpoint, proxy)


async def test_a_group_grows_and_shrinks_by_what_runs_no_task(group: Group) -> None:
    target = group.target()
    await target.open()
    assert await target.replicas() == Replicas(current=2, ready=2)
    await target.scale(5)
    assert await target.replicas() == Replicas(current=5, ready=5)
    busy = sorted(group.instances)[1:4]
    group.protect(*busy)
    await target.scale(2)
    assert sorted(group.instances) == busy
    assert await target.replicas() == Replicas(current=2, ready=2)
    await target.close()


async def test_with_a_drain_hook_busy_instances_are_released(group: Group) -> None:
    group.client.put_lifecycle_hook(
        AutoScalingGroupName=group.name,
        LifecycleHookName="drain",
        LifecycleTransition="autoscaling:EC2_INSTANCE_TERMINATING",
    )
    group.protect(*group.instances)
    target = group.target(drain_hook="drain")
    await target.open()
    await target.scale(1)
    assert sorted(group.instances.values()) == [False, True]
    await target.close()


@pytest.mark.parametrize("fault", [THROTTLING, UNAVAILABLE, CUT, LOST])
@pytest.mark.parametrize("action", ["DescribeAutoScalingGroups", "SetDesiredCapacity"])
async def test_a_call_in_trouble_is_repeated(group: Group, action: str, fault: tuple[int, str]) -> None:
    target = group.target()
    await target.open()
    group.proxy.faults[action] = [fault, fault]
    await target.scale(3)
    assert group.read()["DesiredCapacity"] == 3
    assert group.proxy.actions.count(action) >= 3
    await target.close()


async def test_trouble_that_does_not_pass_is_an_error_and_the_next_call_succeeds(group: Group) -> None:
    target = group.target()
    await target.open()
    group.proxy.faults["SetDesiredCapacity"] = [THROTTLING] * 3
    with pytest.raises(ScalingFailed, match="SetDesiredCapacity was answered with Throttling: try later"):
        await target.scale(3)
    assert group.read()["DesiredCapacity"] == 2
    await target.scale(3)
    assert group.read()["DesiredCapacity"] == 3
    await target.close()


async def test_there_is_no_such_group(group: Group) -> None:
    with pytest.raises(ScalingFailed, match=f"no such group in the region \\({REGION}\\)"):
        await Ec2Target("others", region=REGION, endpoint=group.proxy.url).open()


async def test_an_autoscaler_outlives_trouble(group: Group, tmp_path: Path) -> None:
    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/s.db?fsync=no", max_queue_size=0) as supervisor:
        supervisor.register_worker("elsewhere", handler=_never, task_types=["work"])
        supervisor.pause("work")
        quick: dict[str, Any] = {"interval": 0.2, "window": 1.0, "panic_window": 0.4, "service": 1.0, "maximum": 9}
        async with Autoscaler(supervisor, group.target(), task_types=["work"], **quick) as scaler:
            group.proxy.faults["DescribeAutoScalingGroups"] = [UNAVAILABLE] * 3
            while not scaler.statistics().failures:  # noqa: ASYNC110 - of another thread, which sets no event
                await asyncio.sleep(0.02)
            for number in range(30):
                await supervisor.submit(Task("work", number))
            while len(group.instances) < 6:  # noqa: ASYNC110 - MaxSize
                await asyncio.sleep(0.05)
            assert scaler.statistics().wanted > 6


async def _never(_: Task) -> None:
    raise AssertionError


APP = """
import asyncio
from forebay import BackpressureSupervisor
from forebay.supervisor import worker_protection

worker_protection.WorkerProtection.__init__.__kwdefaults__["idle"] = 2.0
supervisor = BackpressureSupervisor(overflow="sqlite:///{folder}/spill.db?fsync=no", lease=5.0)

@supervisor.worker("work", max_concurrent=2)
async def work(task):
    await asyncio.sleep(task.payload)
"""


async def test_a_worker_protects_its_instance_and_drains_when_it_is_to_go(group: Group, tmp_path: Path) -> None:
    app = tmp_path / "ec2_app.py"
    app.write_text(textwrap.dedent(APP).format(folder=tmp_path))
    mine = min(group.instances)
    with metadata_server() as metadata:
        metadata.items |= {"instance-id": mine, "placement/region": REGION}
        environment = {
            **os.environ,
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url,
            "AWS_ENDPOINT_URL_AUTO_SCALING": group.proxy.url,
        }
        command = [sys.executable, "-m", "forebay.supervisor.worker_process", f"{app}:supervisor", "--protect", "ec2"]
        group.proxy.faults["SetInstanceProtection"] = [THROTTLING]
        process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=subprocess.PIPE)
        try:
            await _until(lambda: group.instances[mine])
            overflow = f"sqlite:///{tmp_path}/spill.db?fsync=no"
            async with BackpressureSupervisor(overflow=overflow, max_queue_size=0, lease=5.0) as supervisor:
                supervisor.register_worker("elsewhere", handler=_never, task_types=["work"])
                supervisor.pause("work")
                assert (await (await supervisor.submit(Task("work", 0.1)))).success
                await _until(lambda: not group.instances[mine])  # idle
                ticket = await supervisor.submit(Task("work", 3.0))
                await _until(lambda: group.instances[mine])
                metadata.items["autoscaling/target-lifecycle-state"] = "Terminated"
                assert (await ticket).success
            _, errors = await process.communicate()
            assert process.returncode == 0
            assert b"is to go: its worker drains" in errors
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)
                await process.wait()


async def _until(condition: Any) -> None:
    """Wait until something holds; the test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - of another process, which sets no event
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--protect", "ec2"], 1, "ec2:this instance cannot be used: there is no metadata service"),
        (["--drain-hook", "drain"], 2, "given with --protect ec2"),
        (["--protect", "gce"], 2, "ec2"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, options: list[str], status: int, words: str) -> None:
    app = tmp_path / "ec2_app.py"
    app.write_text(textwrap.dedent(APP).format(folder=tmp_path))
    command = [sys.executable, "-m", "forebay.cli", "worker", f"{app}:supervisor", *options]
    environment = {**os.environ, "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, words in ended.stderr) == (status, True), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
