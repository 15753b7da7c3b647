"""What every target of an autoscaler promises. Add a row to `TARGETS` for a new one."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final
from unittest import mock

import pytest
from tests.support.kubernetes_double import KubernetesDouble
from tests.unit.scale.test_kubernetes import api_of

from forebay import BackpressureSupervisor, Task
from forebay.errors import InvalidSetting
from forebay.scale import Ec2Target, KubernetesTarget, ProcessTarget, Target, WorkerTarget

# A worker process that reports once, and ends when it is told to.
PROCESS: Final = """
import signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
end = socket.socket(fileno=int(sys.argv[sys.argv.index("--report-to") + 1]))
end.sendall(b'{"running": 0}\\n')
end.recv(1)
"""


@contextlib.asynccontextmanager
async def worker() -> AsyncIterator[Target]:
    async with BackpressureSupervisor() as supervisor:
        yield WorkerTarget(supervisor.register_worker("worker", handler=_work, task_types=["work"]))


async def _work(_: Task) -> None:
    raise AssertionError


@contextlib.asynccontextmanager
async def processes() -> AsyncIterator[Target]:
    yield ProcessTarget("app:supervisor", command=[sys.executable, "-S", "-c", PROCESS])


def pods(workload: str) -> Callable[[], AbstractAsyncContextManager[Target]]:
    @contextlib.asynccontextmanager
    async def made() -> AsyncIterator[Target]:
        double = KubernetesDouble()
        double.workload(resource=f"{workload}s", replicas=1)
        api = api_of(double)
        yield KubernetesTarget(f"{workload}/workers", api=api)
        await api.close()

    return made


@contextlib.asynccontextmanager
async def instances() -> AsyncIterator[Target]:
    pytest.importorskip("botocore")
    from tests.support.simulated_group import SimulatedGroup  # noqa: PLC0415

    from forebay.scale.ec2_client import AwsClient  # noqa: PLC0415 - as above

    group = SimulatedGroup(1, quick=True)
    with mock.patch.object(AwsClient, "_connect", return_value=group):
        yield Ec2Target("workers")


TARGETS: Final[dict[str, Callable[[], AbstractAsyncContextManager[Target]]]] = {
    "worker": worker,
    "processes": processes,
    "deployment": pods("deployment"),
    "statefulset": pods("statefulset"),
    "instances": instances,
}

pytestmark = [pytest.mark.parametrize("made", TARGETS.values(), ids=TARGETS), pytest.mark.blocks]


@contextlib.asynccontextmanager
async def opened(made: Callable[[], AbstractAsyncContextManager[Target]]) -> AsyncIterator[Target]:
    async with made() as target:
        await target.open()
        try:
            yield target
        finally:
            await target.close()


async def ready(target: Target, replicas: int) -> None:
    """Wait until so many replicas are ready; the test's timeout bounds it."""
    while (await target.replicas()).ready != replicas:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_it_has_a_name_before_it_is_opened(made: Any) -> None:
    async with made() as target:
        assert target.name
        assert isinstance(target.outside, bool)


async def test_what_it_is_asked_for_counts_at_once_and_is_ready_later(made: Any) -> None:
    async with opened(made) as target:
        for replicas in (3, 1, 2):
            await target.scale(replicas)
            assert (await target.replicas()).current == replicas
            await ready(target, replicas)


async def test_the_same_number_again_changes_nothing(made: Any) -> None:
    async with opened(made) as target:
        await target.scale(2)
        await ready(target, 2)
        before = await target.replicas()
        for _ in range(3):
            await target.scale(2)
        assert await target.replicas() == before


async def test_targets_of_other_processes_go_to_zero(made: Any) -> None:
    async with opened(made) as target:
        if target.outside:
            await target.scale(1)
            await ready(target, 1)
            await target.scale(0)
            assert (await target.replicas()).current == 0
            await ready(target, 0)


async def test_a_number_that_is_none_is_refused(made: Any) -> None:
    async with opened(made) as target:
        for replicas in (-1, 1.5, None, "2"):
            with pytest.raises(InvalidSetting, match="replicas"):
                await target.scale(replicas)  # type: ignore[arg-type]


async def test_it_may_be_closed_twice_and_opened_again(made: Any) -> None:
    async with made() as target:
        await target.close()  # though it was never open
        for _ in range(2):
            await target.open()
            await target.scale(2)
            await ready(target, 2)
            await target.close()
            await target.close()
