"""A fleet of EC2 instances that an autoscaler scales, in virtual time: scale-in interrupts no task."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("botocore")

from tests.support.simulated_group import SimulatedGroup, SimulatedInstance

from forebay import BackpressureSupervisor, Task
from forebay.scale import Autoscaler, Ec2Target
from forebay.scale.ec2_client import AwsClient
from forebay.supervisor.worker_protection import WorkerProtection
from forebay.testing import now, virtual

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

START_UP = 60.0  # seconds until an instance takes tasks
SECONDS = 20.0  # of a task
SEATS = 4


class InstanceProtection:
    """The protection of one instance of the simulated group, by the calls of its API."""

    def __init__(self, group: SimulatedGroup, instance: SimulatedInstance) -> None:
        self.name = instance.instance_id
        self._group = group
        self._instance = instance

    async def open(self) -> None:
        """Do nothing."""

    async def wait_until_in_service(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    async def protect(self) -> bool:
        """Protect it, if it is in service."""
        if self._instance.state != "InService":
            return False
        self._set(on=True)
        return True

    async def unprotect(self) -> None:
        """Let it be chosen."""
        self._set(on=False)

    async def is_leaving(self) -> bool:
        """Ask its metadata."""
        return self._instance.target == "Terminated"

    async def keep_waiting(self) -> None:
        """Do nothing."""

    async def complete(self) -> None:
        """Complete the lifecycle action."""
        if self._group.hook is not None:
            self._group.complete_lifecycle_action(
                LifecycleActionResult="CONTINUE",
                AutoScalingGroupName="workers",
                LifecycleHookName=self._group.hook,
                InstanceId=self.name,
            )

    def _set(self, *, on: bool) -> None:
        self._group.set_instance_protection(
            AutoScalingGroupName="workers", InstanceIds=[self.name], ProtectedFromScaleIn=on
        )


class Fleet:
    """A group whose instances run a worker each, on one overflow."""

    def __init__(self, overflow: str, *, hook: str | None, protects: bool = True) -> None:
        self.group = SimulatedGroup(0, hook=hook)
        self.overflow = overflow
        self.protects = protects
        self.interrupted = 0  # tasks on instances that went
        self.runs = 0
        self.most = 0  # instances at a time
        self._running: dict[str, int] = {}  # by instance
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by instance: what it does

    async def run(self) -> None:
        """Let the group do its work until this is cancelled."""
        while True:
            self.group.settle()
            self.most = max(self.most, len(self.group.live))
            for each in self.group.instances:
                if each.instance_id not in self._tasks:
                    each.on_end.append(lambda each=each: self._end(each))  # type: ignore[misc]
                    self._tasks[each.instance_id] = asyncio.ensure_future(self._instance(each))
            await asyncio.sleep(1.0)

    def _end(self, each: SimulatedInstance) -> None:
        """Switch an instance off."""
        self.interrupted += self._running.get(each.instance_id, 0)
        self._tasks[each.instance_id].cancel()

    async def _instance(self, each: SimulatedInstance) -> None:
        await asyncio.sleep(START_UP)
        if each.state != "Pending":
            return
        each.state = "InService"
        supervisor = BackpressureSupervisor(overflow=self.overflow, lease=120.0)
        stop = asyncio.Event()

        async def work(_: Task) -> None:
            self.runs += 1
            self._running[each.instance_id] = self._running.get(each.instance_id, 0) + 1
            try:
                await asyncio.sleep(SECONDS)
            finally:
                self._running[each.instance_id] -= 1

        supervisor.register_worker("worker", handler=work, task_types=["work"], max_concurrent=SEATS)
        if not self.protects:
            async with supervisor:
                await stop.wait()
        protection = WorkerProtection(supervisor, InstanceProtection(self.group, each))
        if await protection.open():
            async with supervisor:
                guarding = asyncio.ensure_future(protection.run(stop.set))
                try:
                    await stop.wait()
                    protection.drain()
                    await supervisor.drain()
                finally:
                    guarding.cancel()
        await protection.close()


async def serve_two_surges(fleet: Fleet, **settings: Any) -> Autoscaler:
    """Store tasks in two surges and let the fleet do them; return its autoscaler at the end."""
    async with BackpressureSupervisor(overflow=fleet.overflow, max_queue_size=0, lease=120.0) as supervisor:
        supervisor.register_worker("elsewhere", handler=_never, task_types=["work"])
        supervisor.pause("work")
        group_at_work = asyncio.ensure_future(fleet.run())
        quick = {"seats": SEATS, "maximum": 8, "stabilization": 60.0, "service": SECONDS, **settings}
        target = Ec2Target("workers", drain_hook=fleet.group.hook)
        async with Autoscaler(supervisor, target, task_types=["work"], **quick) as scaler:
            tickets = []
            for surge in (150, 100):
                for number in range(surge):
                    tickets.append(await supervisor.submit(Task("work", number)))
                    await asyncio.sleep(1.0)
                trickle_until = now() + 500.0
                while now() < trickle_until:  # one at a time: the fleet shrinks while something runs
                    tickets.append(await supervisor.submit(Task("work", -1)))
                    await asyncio.sleep(7.0)
            results = [await ticket for ticket in tickets]
            await asyncio.sleep(300.0)
        group_at_work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await group_at_work
    assert all(result.success for result in results)
    fleet.runs -= len(results)
    return scaler


async def _never(_: Task) -> None:
    raise AssertionError


@pytest.fixture
def overflow(tmp_path: Path) -> str:
    """Return the URL of the overflow of a fleet."""
    return f"sqlite:///{tmp_path}/spill.db?fsync=no"


@pytest.mark.parametrize("hook", [None, "drain"])
def test_scale_in_interrupts_no_task(overflow: str, monkeypatch: pytest.MonkeyPatch, hook: str | None) -> None:
    @virtual
    async def run() -> None:
        fleet = Fleet(overflow, hook=hook)
        monkeypatch.setattr(AwsClient, "_connect", lambda _: fleet.group)
        scaler = await serve_two_surges(fleet)
        assert fleet.most > 4
        assert len(fleet.group.live) <= 2
        assert len(fleet.group.chosen) >= 5
        assert (fleet.interrupted, fleet.runs) == (0, 0)  # of what was stored, each ran once
        assert scaler.statistics().failures == 0

    run()


def test_without_protection_tasks_are_interrupted_and_run_again(overflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @virtual
    async def run() -> None:
        fleet = Fleet(overflow, hook=None, protects=False)
        monkeypatch.setattr(AwsClient, "_connect", lambda _: fleet.group)
        await serve_two_surges(fleet)
        assert fleet.interrupted > 0

    run()
