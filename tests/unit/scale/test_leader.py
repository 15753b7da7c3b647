"""Leader election: one autoscaler of several acts, whatever happens to it, and another follows it soon."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import pytest
from tests.support.kubernetes_double import (
    NAMESPACE,
    KubernetesDouble,
    KubernetesTransport,
    after,
    answer_lost,
    answers,
    cuts,
)
from tests.unit.scale.test_autoscaler import ScriptedSupervisor, ScriptedTarget

from forebay.errors import InvalidSetting, ScalingFailed, ShardUnavailable
from forebay.interfaces import Demand
from forebay.scale import Autoscaler, KubernetesLease, KubernetesTarget, LeaderLease, LeaseStore, StateLease
from forebay.scale.kubernetes_api import KubernetesApi
from forebay.scale.kubernetes_client import client_of
from forebay.simulation.loop.virtual_loop import virtual_loop
from forebay.state import ShardedState
from forebay.testing import now, virtual

T = TypeVar("T")

UPDATE = "update leases"


class Cluster:
    """A double, with a connection for each process that may be cut off alone."""

    def __init__(self) -> None:
        self.double = KubernetesDouble()
        self.double.workload(replicas=1)
        self.transports: list[KubernetesTransport] = []
        self.apis: list[KubernetesApi] = []

    def api(self) -> KubernetesApi:
        transport = KubernetesTransport(self.double)
        self.transports.append(transport)
        api = KubernetesApi(
            timeout=3.0, client=client_of("http://kubernetes", namespace=NAMESPACE, transport=transport)
        )
        self.apis.append(api)
        return api

    def lease(self) -> KubernetesLease:
        return KubernetesLease("autoscaler", api=self.api())


@contextlib.asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    try:
        yield made
    finally:
        for api in made.apis:
            await api.close()


@contextlib.asynccontextmanager
async def stores(kind: str) -> AsyncIterator[Callable[[], LeaseStore]]:
    """Yield a function that returns one more view of the same lease."""
    if kind == "kubernetes":
        async with cluster() as made:
            yield made.lease
    else:
        state = await ShardedState.connect("memory://")
        try:
            yield lambda: StateLease(state.namespace("leader"))
        finally:
            await state.close()


class Watchman:
    """Sees to it that no two lead at a time, at each step of the loop's time that matters."""

    def __init__(self, leases: list[LeaderLease]) -> None:
        self.leases = leases
        self.without = 0.0  # the longest time without a leader
        self._since: float | None = None

    async def watch(self, seconds: float, step: float = 0.05) -> None:
        end = now() + seconds
        while now() < end:
            leaders = [each for each in self.leases if each.leads_until > now()]
            assert len(leaders) <= 1, "two lead"
            if leaders:
                self._since = None
            elif self._since is None:
                self._since = now()
            else:
                self.without = max(self.without, now() - self._since)
            await asyncio.sleep(step)

    @property
    def leader(self) -> LeaderLease | None:
        return next((each for each in self.leases if each.leads_until > now()), None)


KINDS = pytest.mark.parametrize("kind", ["kubernetes", "state"])


@KINDS
@virtual
async def test_one_leads_and_goes_on_leading(kind: str) -> None:
    async with stores(kind) as store, LeaderLease(store()) as first, LeaderLease(store()) as second:
        watchman = Watchman([first, second])
        await watchman.watch(600.0, 0.5)
        assert watchman.leader is first
        assert watchman.without == 0.0


@KINDS
@virtual
async def test_a_leader_that_leaves_is_followed_at_once(kind: str) -> None:
    async with stores(kind) as store, LeaderLease(store()) as first, LeaderLease(store()) as second:
        assert second.leads_until < now() < first.leads_until
        await first.close()
        assert first.leads_until < now()
        began = now()
        await second.wait()
        assert now() - began <= 3.0


@KINDS
@virtual
async def test_a_leader_that_is_gone_is_followed_after_its_lease(kind: str) -> None:
    async with stores(kind) as store:
        first = LeaderLease(store())
        await first.open()
        assert first.leads_until > now()
        async with LeaderLease(store()) as second:
            await asyncio.sleep(30.0)
            assert second.leads_until < now()
            assert first._renewing is not None
            first._renewing.cancel()  # it is killed
            began = now()
            await second.wait()
            assert first.leads_until < now()
            assert 10.0 <= now() - began <= 15.0 + 3.0
            await asyncio.sleep(60.0)
            assert second.leads_until > now()


@KINDS
@virtual(seed=3)
async def test_of_many_one_leads_though_each_may_be_gone(kind: str) -> None:
    async with stores(kind) as store:
        leases = [LeaderLease(store()) for _ in range(5)]
        for each in leases:
            await each.open()
        watchman = Watchman(leases)
        for _ in range(4):
            await watchman.watch(40.0)
            leader = watchman.leader
            assert leader is not None
            assert leader._renewing is not None
            leader._renewing.cancel()
            leases.remove(leader)
        assert 5.0 <= watchman.without <= 18.0
        await leases[0].close()


# --- with the API server ---


@virtual
async def test_a_leader_that_is_cut_off_stops_before_another_begins() -> None:
    async with cluster() as made, LeaderLease(made.lease()) as first, LeaderLease(made.lease()) as second:
        watchman = Watchman([first, second])
        await watchman.watch(20.0)
        made.transports[0].cut_off = True
        await watchman.watch(40.0)
        assert watchman.leader is second
        assert watchman.without <= 10.0
        made.transports[0].cut_off = False
        await watchman.watch(60.0)
        assert watchman.leader is second


@KINDS
@virtual
async def test_a_call_of_the_store_that_is_cancelled_by_itself_does_not_end_the_renewing(kind: str) -> None:
    async with stores(kind) as store:
        cancelled = store()
        read = cancelled.read

        async def fail() -> None:
            raise asyncio.CancelledError

        async with LeaderLease(cancelled) as lease:
            cancelled.read = fail  # type: ignore[method-assign]
            await asyncio.sleep(20.0)
            assert lease.leads_until < now()
            cancelled.read = read  # type: ignore[method-assign]
            await asyncio.sleep(5.0)
            assert lease.leads_until > now()


@virtual
async def test_a_renewal_that_arrives_late_does_not_take_the_lease_back() -> None:
    arrives = asyncio.Event()
    async with cluster() as made, LeaderLease(made.lease()) as first, LeaderLease(made.lease()) as second:
        made.double.fail(UPDATE, after(arrives))  # of the first: the second one does not write
        watchman = Watchman([first, second])
        made.transports[0].cut_off = False
        await watchman.watch(4.0)
        made.transports[0].cut_off = True
        await watchman.watch(30.0)
        assert watchman.leader is second
        arrives.set()
        await watchman.watch(30.0)
        assert watchman.leader is second
        assert made.double.get("leases", "autoscaler")["spec"]["holderIdentity"] == second.holder


@virtual
async def test_an_answer_that_is_lost_loses_no_lease() -> None:
    async with cluster() as made, LeaderLease(made.lease()) as first, LeaderLease(made.lease()) as second:
        watchman = Watchman([first, second])
        for _ in range(20):
            made.double.fail(UPDATE, answer_lost)
            await watchman.watch(5.0)
        assert watchman.leader is first


@virtual
async def test_a_server_that_fails_for_less_than_the_lease_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster() as made, LeaderLease(made.lease()) as first, LeaderLease(made.lease()) as second:
        watchman = Watchman([first, second])
        for kind in ("get leases", UPDATE):
            made.double.fail(kind, answers(500), times=1000)
        await watchman.watch(5.0)
        made.double.recover()
        await watchman.watch(60.0)
        assert watchman.leader is first
        assert watchman.without == 0.0
        made.double.fail("get leases", cuts, times=100_000)
        await watchman.watch(60.0)
        assert watchman.leader is None
        made.double.recover()
        await watchman.watch(20.0)
        assert watchman.leader is not None
    assert "lease/autoscaler cannot be renewed" in caplog.text
    assert len(caplog.records) <= 4


@virtual
async def test_two_that_begin_together_make_one_lease() -> None:
    async with cluster() as made:
        leases = [LeaderLease(made.lease()) for _ in range(8)]
        await asyncio.gather(*(each.open() for each in leases))
        assert sum(each.leads_until > now() for each in leases) == 1
        for each in leases:
            await each.close()


@virtual
async def test_who_waits_says_once_for_whom(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with cluster() as made:
        first, second = LeaderLease(made.lease()), LeaderLease(made.lease())
        async with first, second:
            await asyncio.sleep(60.0)
            assert f"is held by {first.holder}: this process waits ({second.holder})" in caplog.text
            assert caplog.text.count("this process waits") == 1


@virtual
async def test_two_of_one_name_are_two() -> None:
    async with cluster() as made:
        leases = [LeaderLease(made.lease(), holder="me") for _ in range(2)]
        async with leases[0], leases[1]:
            await Watchman(leases).watch(30.0)


class Trouble:
    """Draws what happens to three processes and their server."""

    def __init__(self, made: Cluster) -> None:
        self.made = made
        self.loop = virtual_loop()
        self.draw = self.loop.random
        self.late = asyncio.Event()

    def happen(self) -> None:
        self.draw.choice([self.cut_off, self.connect, self.delay, self.fail, self.stall, self.arrive])()

    def cut_off(self) -> None:
        self.draw.choice(self.made.transports).cut_off = True

    def connect(self) -> None:
        self.draw.choice(self.made.transports).cut_off = False

    def delay(self) -> None:
        self.made.double.fail(UPDATE, after(self.late))

    def fail(self) -> None:
        self.made.double.fail(UPDATE, self.draw.choice([answer_lost, cuts, answers(500), answers(429, retry_after=3)]))

    def stall(self) -> None:
        self.loop.stall(self.draw.choice([1.0, 9.0, 12.0, 20.0]))

    def arrive(self) -> None:
        self.late.set()
        self.late = asyncio.Event()

    def end(self) -> None:
        self.late.set()
        self.made.double.recover()
        for transport in self.made.transports:
            transport.cut_off = False


@pytest.mark.parametrize("seed", range(12))
def test_at_most_one_leads_whatever_happens(seed: int) -> None:
    """Processes are cut off, their requests come late or fail, and the loop stands still."""
    virtual(seed=seed)(lead_through_trouble)()


async def lead_through_trouble() -> None:
    async with cluster() as made:
        leases = [LeaderLease(made.lease()) for _ in range(3)]
        for each in leases:
            await each.open()
        watchman, trouble = Watchman(leases), Trouble(made)
        for _ in range(60):
            trouble.happen()
            await watchman.watch(trouble.draw.uniform(0.0, 12.0), step=0.1)
        trouble.end()
        await watchman.watch(40.0)
        assert watchman.leader is not None
        for each in leases:
            await each.close()


@virtual
async def test_the_lease_is_as_other_tools_expect_it() -> None:
    async with cluster() as made:
        async with LeaderLease(made.lease(), holder="me", duration=14.5) as leader:
            lease = made.double.get("leases", "autoscaler")
            spec = lease["spec"]
            assert (lease["apiVersion"], lease["kind"]) == ("coordination.k8s.io/v1", "Lease")
            assert (spec["holderIdentity"], spec["leaseDurationSeconds"]) == (leader.holder, 15)
            assert leader.holder.startswith("me-")
            assert spec["renewTime"].endswith("Z")
            assert len(spec["renewTime"]) == len("2026-01-01T00:00:00.000000Z")
        assert "holderIdentity" not in made.double.get("leases", "autoscaler")["spec"]


@virtual
async def test_what_others_have_set_in_the_lease_stays() -> None:
    async with cluster() as made:
        async with LeaderLease(made.lease()):
            found = made.double.get("leases", "autoscaler")
            found["metadata"]["labels"] = {"owner": "us"}
            found["spec"]["leaseTransitions"] = 7
            await asyncio.sleep(10.0)
            assert made.double.get("leases", "autoscaler")["spec"]["renewTime"] != found["spec"]["renewTime"]
        lease = made.double.get("leases", "autoscaler")
        assert (lease["metadata"]["labels"], lease["spec"]["leaseTransitions"]) == ({"owner": "us"}, 7)


@virtual
async def test_a_right_to_the_lease_that_is_missing_is_named() -> None:
    async with cluster() as made:
        for verb in ("get", "create"):
            made.double.rules = [
                {
                    "apiGroups": ["coordination.k8s.io"],
                    "resources": ["leases"],
                    "verbs": list({"get", "create"} - {verb}),
                }
            ]
            with pytest.raises(ScalingFailed, match=f"the verb '{verb}' on 'leases'"):
                await LeaderLease(made.lease()).open()


# --- with autoscalers ---


def after_20_seconds(call: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    async def late(*arguments: Any) -> T:
        await asyncio.sleep(20.0)
        return await call(*arguments)

    return late


class SlowTarget(ScriptedTarget):
    """A target that takes 20 seconds for one of its calls."""

    def __init__(self, slow: str) -> None:
        super().__init__(2)
        if slow == "reading":
            vars(self)["replicas"] = after_20_seconds(self.replicas)
        elif slow == "scaling":
            vars(self)["scale"] = after_20_seconds(self.scale)


def scaler(supervisor: ScriptedSupervisor, target: Any, lease: LeaderLease, **settings: Any) -> Autoscaler:
    return Autoscaler(supervisor, target, task_types=["work"], load=0.5, maximum=20, leader=lease, **settings)


@virtual
async def test_of_two_autoscalers_one_acts() -> None:
    supervisor = ScriptedSupervisor(Demand(elsewhere=4, service=1.0))
    async with cluster() as made:
        targets = [KubernetesTarget("deployment/workers", api=made.api()) for _ in range(2)]
        scalers = [scaler(supervisor, target, LeaderLease(made.lease())) for target in targets]
        async with scalers[0], scalers[1]:
            await asyncio.sleep(60.0)
            assert made.double.replicas() == 8
            assert [each.statistics().leads for each in scalers] == [True, False]
            assert len(supervisor.scaled) == 1
            made.transports[2].cut_off = made.transports[0].cut_off = True  # the first one's lease and target
            supervisor.answer = Demand(elsewhere=8, service=1.0)
            await asyncio.sleep(60.0)
            assert made.double.replicas() == 16
            assert [each.statistics().leads for each in scalers] == [False, True]
            assert supervisor.scaled == [(1, 8), (8, 16)]
            made.transports[2].cut_off = made.transports[0].cut_off = False


@virtual
async def test_a_paused_leader_does_not_act_after_its_lease() -> None:
    """Its request is under way when it is paused, and arrives when another one leads."""
    arrives = asyncio.Event()
    supervisor = ScriptedSupervisor(Demand(elsewhere=4, service=1.0))
    async with cluster() as made:
        paused = KubernetesTarget("deployment/workers", api=made.api())
        following = KubernetesTarget("deployment/workers", api=made.api())
        made.double.fail("update deployments/scale", after(arrives))
        first, second = LeaderLease(made.lease()), LeaderLease(made.lease())
        async with scaler(supervisor, paused, first), scaler(supervisor, following, second):
            await asyncio.sleep(0.1)
            made.transports[0].cut_off = made.transports[2].cut_off = True
            supervisor.answer = Demand(elsewhere=8, service=1.0)
            await asyncio.sleep(60.0)
            assert second.leads_until > now() > first.leads_until
            assert made.double.replicas() == 16
            arrives.set()  # it asks for 8, of a workload that has changed
            await asyncio.sleep(0.5)
            assert made.double.replicas() == 16
            made.transports[0].cut_off = made.transports[2].cut_off = False


@virtual
async def test_a_call_that_is_under_way_ends_with_the_lease(caplog: pytest.LogCaptureFixture) -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=4, service=1.0)), ScriptedTarget()
    target.hangs = True
    async with cluster() as made:
        lease = LeaderLease(made.lease())
        async with scaler(supervisor, target, lease) as only:
            await asyncio.sleep(1.0)
            made.transports[0].cut_off = True
            ends = lease.leads_until
            await asyncio.sleep(ends - now() + 0.1)
            assert only.statistics().failures == 1
            assert "did not answer by the end of the lease" in caplog.text
            await asyncio.sleep(60.0)
            assert len(target.asked) == 1
            assert not only.statistics().leads
            made.transports[0].cut_off = False


@virtual
@pytest.mark.parametrize("slow", ["reading", "demand", "scaling"])
async def test_a_call_that_takes_longer_than_a_renewal_lasts_is_over_before_the_lease(slow: str) -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=8, service=1.0)), SlowTarget(slow)
    if slow == "demand":
        vars(supervisor)["demand"] = after_20_seconds(supervisor.demand)
    async with cluster() as made, scaler(supervisor, target, LeaderLease(made.lease())) as only:
        await asyncio.sleep(60.0)
        assert target.current == 16
        assert only.statistics().failures == 0


@virtual
async def test_a_reading_that_is_over_after_the_lease_changes_nothing() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=8, service=1.0)), SlowTarget("reading")
    async with cluster() as made, scaler(supervisor, target, LeaderLease(made.lease())) as only:
        made.transports[0].cut_off = True
        await asyncio.sleep(60.0)
        assert (target.asked, only.statistics().leads, only.statistics().failures) == ([], False, 0)
        made.transports[0].cut_off = False


@virtual
async def test_a_loop_that_was_blocked_past_the_lease_does_not_act() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=1, service=1.0)), ScriptedTarget(2)
    async with cluster() as made:
        lease = LeaderLease(made.lease())
        async with scaler(supervisor, target, lease):
            await asyncio.sleep(60.0)
            supervisor.answer = Demand(elsewhere=8, service=1.0)
            made.transports[0].cut_off = True
            virtual_loop().stall(30.0)  # as in a process that is stopped
            await asyncio.sleep(30.0)
            assert target.asked == []
            made.transports[0].cut_off = False
            await asyncio.sleep(30.0)
            assert target.asked == [16]


@virtual
async def test_who_follows_does_not_shrink_the_fleet_before_it_has_seen_it_for_a_while() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=0, service=1.0)), ScriptedTarget(8)
    async with cluster() as made:
        first = LeaderLease(made.lease())
        await first.open()
        async with scaler(supervisor, target, LeaderLease(made.lease()), stabilization=100.0):
            await asyncio.sleep(400.0)
            await first.close()
            await asyncio.sleep(90.0)
            assert target.asked == []
            await asyncio.sleep(30.0)
            assert target.current == 1


@virtual
async def test_a_lease_that_cannot_be_opened_leaves_no_target_open() -> None:
    supervisor, target = ScriptedSupervisor(Demand(elsewhere=0)), ScriptedTarget()
    async with cluster() as made:
        made.double.fail("get leases", cuts, times=100)
        with pytest.raises(ScalingFailed, match="cannot be reached"):
            async with scaler(supervisor, target, LeaderLease(made.lease())):
                pass
        assert not target.is_open


# --- state ---


class Unavailable:
    """State whose shard is down."""

    async def get(self, _: str) -> Any:
        raise ShardUnavailable(where="redis://there", why="it is down", advice="")

    async def put(self, *_: Any, **__: Any) -> int:
        raise AssertionError


@virtual
async def test_state_that_is_down_is_an_error() -> None:
    with pytest.raises(ShardUnavailable):
        await LeaderLease(StateLease(Unavailable())).open()


@pytest.mark.parametrize("settings", [{"duration": 0}, {"duration": -1.0}, {"holder": ""}])
def test_settings_that_are_invalid(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(settings))):
        LeaderLease(StateLease(Unavailable()), **settings)


@pytest.mark.parametrize("name", ["", "A", "a/b", 3])
def test_a_lease_has_a_name_of_kubernetes(name: Any) -> None:
    with pytest.raises(InvalidSetting, match="name"):
        KubernetesLease(name)
