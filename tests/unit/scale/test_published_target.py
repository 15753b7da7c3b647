"""Replicas that something else sets, by the number that an autoscaler publishes."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

import pytest
from tests.unit.scale.test_autoscaler import ScriptedSupervisor

from forebay.interfaces import Demand
from forebay.scale import Autoscaler, PublishedTarget, Replicas
from forebay.testing import virtual

SYNC = 15.0  # seconds between two looks of a HorizontalPodAutoscaler


class Pods:
    """A workload, which only its HorizontalPodAutoscaler scales."""

    name = "pods"
    outside = True

    def __init__(self, current: int) -> None:
        self.current = current
        self.limited_by: str | None = None
        self.calls: list[str] = []

    async def open(self) -> None:
        self.calls.append("open")

    async def close(self) -> None:
        self.calls.append("close")

    async def replicas(self) -> Replicas:
        return Replicas(current=self.current, ready=self.current, limited_by=self.limited_by, service=30.0)

    async def scale(self, replicas: int) -> None:
        raise AssertionError(replicas)


async def follow(pods: Pods, scaler: Autoscaler) -> None:
    """Scale pods as a HorizontalPodAutoscaler does: an external metric, 1 for each pod, and a tolerance of a tenth."""
    while True:
        await asyncio.sleep(SYNC)
        metric = scaler.statistics().desired
        if abs(metric / pods.current - 1.0) > 0.1:
            pods.current = max(1, math.ceil(metric))


@contextlib.asynccontextmanager
async def published(pods: Pods, supervisor: ScriptedSupervisor) -> AsyncIterator[Autoscaler]:
    scaler = Autoscaler(supervisor, PublishedTarget(pods), task_types=["work"], seats=4, maximum=20)
    async with scaler:
        following = asyncio.ensure_future(follow(pods, scaler))
        try:
            yield scaler
        finally:
            following.cancel()


@virtual
async def test_pods_follow_the_number_up_and_down() -> None:
    pods, supervisor = Pods(1), ScriptedSupervisor(Demand(elsewhere=28))
    async with published(pods, supervisor) as scaler:
        await asyncio.sleep(60.0)
        assert (pods.current, scaler.statistics().desired) == (10, 10)
        supervisor.answer = Demand(elsewhere=2)
        await asyncio.sleep(300.0)
        assert pods.current == 10  # the stabilization is the autoscaler's
        await asyncio.sleep(400.0)
        assert pods.current == 1
        assert scaler.statistics().reversals <= 1
    assert pods.calls == ["open", "close"]


@virtual
async def test_no_pod_is_added_while_something_else_is_short() -> None:
    pods, supervisor = Pods(2), ScriptedSupervisor(Demand(elsewhere=28))
    pods.limited_by = "upstream:openai:requests per minute"
    async with published(pods, supervisor) as scaler:
        await asyncio.sleep(120.0)
        assert (pods.current, scaler.statistics().wanted) == (2, 10)


@virtual
@pytest.mark.parametrize("replicas", [1, 7])
async def test_it_is_the_target_but_for_scaling(replicas: int) -> None:
    pods = Pods(replicas)
    target = PublishedTarget(pods)
    assert (target.name, target.outside) == ("pods", True)
    await target.scale(3)
    assert (await target.replicas()).current == replicas
