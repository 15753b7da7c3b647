"""Pods as replicas, against a double of the API server: what is asked of it, and what it may answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from tests.support.kubernetes_double import (
    NAMESPACE,
    KubernetesDouble,
    KubernetesTransport,
    answer_lost,
    answers,
    cuts,
    hangs,
    meanwhile,
)
from tests.unit.scale.test_autoscaler import ScriptedSupervisor

from forebay.errors import InvalidSetting, ScalingFailed
from forebay.interfaces import Demand
from forebay.scale import Autoscaler, KubernetesTarget, ReplicaReport
from forebay.scale.kubernetes_api import KubernetesApi
from forebay.scale.kubernetes_client import client_of
from forebay.simulation.loop.virtual_loop import virtual_loop
from forebay.testing import now, virtual

GET, PUT, LIST, WATCH = "get deployments/scale", "update deployments/scale", "list deployments", "watch deployments"
SERVER_ERRORS = [500, 502, 503, 504]


def api_of(double: KubernetesDouble, transport: KubernetesTransport | None = None) -> KubernetesApi:
    transport = transport or KubernetesTransport(double)
    return KubernetesApi(client=client_of("http://kubernetes", namespace=NAMESPACE, transport=transport))


@contextlib.asynccontextmanager
async def target_of(
    double: KubernetesDouble,
    workload: str = "deployment/workers",
    *,
    transport: KubernetesTransport | None = None,
    **settings: Any,
) -> AsyncIterator[KubernetesTarget]:
    api = api_of(double, transport)
    target = KubernetesTarget(workload, api=api, **settings)
    await target.open()
    try:
        yield target
    finally:
        await target.close()
        await api.close()


# --- scaling ---


@virtual
@pytest.mark.parametrize("resource", ["deployment", "statefulset"])
async def test_it_reads_and_changes_the_scale_of_a_workload(resource: str) -> None:
    double = KubernetesDouble()
    double.workload(resource=f"{resource}s", replicas=2)
    async with target_of(double, f"{resource}/workers") as target:
        assert target.name == f"kubernetes:{resource}/workers"
        assert target.outside
        replicas = await target.replicas()
        assert (replicas.current, replicas.ready, replicas.limited_by, replicas.service) == (2, 2, None, None)
        await target.scale(5)
        assert double.replicas(resource=f"{resource}s") == 5
        await target.scale(5)
        assert double.count(f"update {resource}s/scale") == 1
        assert (await target.replicas()).current == 5


@virtual
async def test_zero_replicas_which_kubernetes_leaves_out() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        await target.scale(0)
        assert double.replicas() == 0
        replicas = await target.replicas()
        assert (replicas.current, replicas.ready) == (0, 0)
        await target.scale(3)
        assert double.replicas() == 3


@virtual
async def test_ready_replicas_are_watched() -> None:
    double = KubernetesDouble(start=60.0)
    double.workload(replicas=1)
    async with target_of(double) as target:
        await target.scale(4)
        await asyncio.sleep(59.0)
        assert (await target.replicas()).ready == 1
        await asyncio.sleep(2.0)
        assert (await target.replicas()).ready == 4
        assert double.count(LIST) == 1


@virtual
async def test_more_pods_than_replicas_as_in_a_rolling_update_are_no_more_ready_ones() -> None:
    double = KubernetesDouble()
    double.workload(replicas=2)
    async with target_of(double) as target:
        double.set_ready("workers", 3)
        await asyncio.sleep(0.1)
        assert (await target.replicas()).ready == 2


# --- conflicts ---


@virtual
async def test_a_conflict_with_a_change_of_the_status_is_written_again() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        double.fail(PUT, meanwhile(double.touch), times=3)
        await target.scale(4)
        assert (double.replicas(), double.count(PUT)) == (4, 4)


@virtual
async def test_what_somebody_else_has_scaled_meanwhile_is_decided_again() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        await target.replicas()
        double.set_replicas(7)
        with pytest.raises(ScalingFailed, match=r"somebody else has changed its replicas from 1 to 7 meanwhile"):
            await target.scale(4)
        assert double.replicas() == 7
        assert (await target.replicas()).current == 7
        await target.scale(4)
        assert double.replicas() == 4


@virtual
async def test_a_workload_that_changes_all_the_time_is_given_up() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        double.fail(PUT, meanwhile(double.touch), times=100)
        with pytest.raises(ScalingFailed, match="has changed 5 times"):
            await target.scale(4)
        assert double.replicas() == 1


@virtual
async def test_a_change_whose_answer_was_lost_is_made_once() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        double.fail(PUT, answer_lost)
        await target.scale(4)
        assert double.replicas() == 4
        changes = [each for each in double.requests if str(each) == PUT]
        assert len({each.body["metadata"]["resourceVersion"] for each in changes}) == 1  # the second met a conflict


# --- failures ---


@virtual
@pytest.mark.parametrize("status", [429, *SERVER_ERRORS])
async def test_a_server_that_is_busy_is_asked_again(status: int) -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        double.fail(PUT, answers(status), times=3)
        await target.scale(4)
        assert double.replicas() == 4
        double.fail(GET, answers(status), times=4)
        with pytest.raises(ScalingFailed, match=f"has answered {status}"):
            await target.replicas()
        assert (await target.replicas()).current == 4


@virtual
async def test_a_retry_after_is_kept() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        double.fail(GET, answers(429, retry_after=5))
        began = now()
        await target.replicas()
        assert 5.0 <= now() - began <= 5.5


@virtual
@pytest.mark.parametrize("seconds", [86_400, int("9" * 400)])
async def test_a_retry_after_holds_for_a_minute_at_most(seconds: int) -> None:
    double = KubernetesDouble()
    double.workload(replicas=2)
    async with target_of(double) as target:
        double.fail(GET, answers(503, retry_after=seconds))
        with pytest.raises(ScalingFailed, match=r"has asked for a pause of 6[0-9] s more"):
            await target.replicas()
        await asyncio.sleep(66.0)
        assert (await target.replicas()).current == 2


@virtual
async def test_a_long_retry_after_is_left_to_the_autoscaler() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        await asyncio.sleep(0.1)
        double.fail(GET, answers(503, retry_after=60))
        requests = len(double.requests)
        for _ in range(3):
            with pytest.raises(ScalingFailed, match="has asked for a pause of 60 s more"):
                await target.replicas()
        assert len(double.requests) == requests + 1
        await asyncio.sleep(61.0)
        assert (await target.replicas()).current == 1


@virtual
async def test_a_request_has_a_time_limit() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        double.fail(GET, hangs)
        began = now()
        assert (await target.replicas()).current == 1
        assert 10.0 <= now() - began <= 11.0
        double.fail(GET, hangs, times=4)
        with pytest.raises(ScalingFailed, match=r"did not answer within 10 s"):
            await target.replicas()


@virtual
async def test_a_connection_that_breaks_is_made_again() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        double.fail(GET, cuts, times=3)
        assert (await target.replicas()).current == 1
        double.fail(GET, cuts, times=4)
        with pytest.raises(ScalingFailed, match="cannot be reached"):
            await target.replicas()


@virtual
@pytest.mark.parametrize("body", [b"<html>", b"", b"[]", b"{}", b'{"metadata": 3}', b"null"])
async def test_an_answer_that_is_none_is_an_error_in_words(body: bytes) -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    async with target_of(double) as target:
        double.fail(GET, answers(200, body=body), times=4)
        with pytest.raises(ScalingFailed, match="something that is not"):
            await target.replicas()
        double.recover()
        double.fail(GET, answers(502, body=body), times=4)  # a proxy before it
        with pytest.raises(ScalingFailed, match="has answered 502: Bad Gateway"):
            await target.replicas()


# --- rights and objects ---


@virtual
async def test_an_object_that_is_missing_is_named() -> None:
    double = KubernetesDouble()
    with pytest.raises(
        ScalingFailed, match=r"^deployments/scale/workers in namespace 'agents' cannot be used: there is no such object"
    ):
        async with target_of(double):
            pass
    double.workload(replicas=1)
    async with target_of(double) as target:
        double.remove()
        with pytest.raises(ScalingFailed, match=r'there is no such object \(404: deployments.apps "workers" not found'):
            await target.replicas()
        double.workload(replicas=3)
        await asyncio.sleep(0.1)
        assert (await target.replicas()).ready == 3


RULES = [
    {"apiGroups": ["apps"], "resources": ["deployments"], "resourceNames": ["workers"], "verbs": ["list", "watch"]},
    {
        "apiGroups": ["apps"],
        "resources": ["deployments/scale"],
        "resourceNames": ["workers"],
        "verbs": ["get", "update"],
    },
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
]


def rules_without(verb: str, resource: str) -> list[dict[str, Any]]:
    return [
        {**rule, "verbs": [each for each in rule["verbs"] if (each, rule["resources"][0]) != (verb, resource)]}
        for rule in RULES
    ]


@virtual
@pytest.mark.parametrize(
    ("verb", "resource"),
    [("list", "deployments"), ("get", "deployments/scale"), ("update", "deployments/scale")],
)
async def test_a_right_that_is_missing_is_named(verb: str, resource: str) -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    double.rules = rules_without(verb, resource)
    with pytest.raises(ScalingFailed, match=f"the verb '{verb}' on '{resource}'.*403.*is forbidden"):
        async with target_of(double) as target:
            await target.scale(2)


@virtual
async def test_a_watch_that_is_not_allowed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    double.rules = rules_without("watch", "deployments")
    async with target_of(double) as target:
        await asyncio.sleep(300.0)
        assert "403" in caplog.text
        assert len(caplog.records) == 1
        double.set_ready("workers", 0)
        await asyncio.sleep(40.0)  # the list still says it
        assert (await target.replicas()).ready == 0


@virtual
async def test_credentials_that_are_not_accepted() -> None:
    double = KubernetesDouble()
    double.workload(replicas=1)
    double.token = "another"  # noqa: S105
    with pytest.raises(ScalingFailed, match=r"does not accept the credentials \(401: Unauthorized\)"):
        async with target_of(double):
            pass


# --- the watch ---


@virtual
async def test_a_watch_that_ends_goes_on_where_it_was() -> None:
    double = KubernetesDouble()
    double.workload(replicas=4)
    async with target_of(double) as target:
        await asyncio.sleep(3600.0)
        assert (double.count(LIST), double.watchers) == (1, 1)
        assert double.count(WATCH) in (30, 31)
        for ready in (3, 2):
            double.end_watches()
            await asyncio.sleep(0.1)
            double.set_ready("workers", ready)
            await asyncio.sleep(2.0)
            assert (await target.replicas()).ready == ready
        assert double.count(LIST) == 1


@virtual
async def test_a_watch_that_is_cancelled_by_itself_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    double = KubernetesDouble()
    double.workload(replicas=4)
    async with target_of(double) as target:
        follow = target._follow

        async def cancelled(_: str) -> str:
            monkeypatch.setattr(target, "_follow", follow)
            raise asyncio.CancelledError

        monkeypatch.setattr(target, "_follow", cancelled)
        await asyncio.sleep(0)
        double.end_watches()
        await asyncio.sleep(10.0)
        double.set_ready("workers", 2)
        await asyncio.sleep(10.0)
        assert (await target.replicas()).ready == 2


@virtual
async def test_a_watch_that_ends_at_once_is_not_begun_again_at_once() -> None:
    double = KubernetesDouble()
    double.workload(replicas=4)
    double.fail(WATCH, answers(200, body=b""), times=1000)
    async with target_of(double):
        await asyncio.sleep(60.0)
        assert 50 <= double.count(WATCH) <= 61


@virtual
@pytest.mark.parametrize("gone", ["cut", "forgotten", "forgotten by status"])
async def test_a_lost_watch_is_begun_again_from_a_list(gone: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    double = KubernetesDouble()
    double.workload(replicas=4)
    async with target_of(double) as target:
        await asyncio.sleep(0.1)
        if gone == "cut":
            double.end_watches(cut=True)
        elif gone == "forgotten by status":
            double.fail(WATCH, answers(410))
            double.end_watches()
        else:
            double.set_ready("workers", 3)
            double.end_watches()
            double.forget()
        await asyncio.sleep(2.0)
        double.set_ready("workers", 1)
        await asyncio.sleep(2.0)
        assert (await target.replicas()).ready == 1
        assert double.count(LIST) >= 2
        assert double.watchers == 1
        assert len(caplog.records) == (gone == "cut")


@virtual
async def test_a_watch_that_says_nothing_is_taken_for_dead() -> None:
    double = KubernetesDouble()
    double.workload(replicas=4)
    async with target_of(double) as target:
        await asyncio.sleep(0.1)
        double.end_watches()
        double.fail(WATCH, hangs)  # from now on
        await asyncio.sleep(5.0)
        double.set_ready("workers", 1)
        await asyncio.sleep(150.0)
        assert (await target.replicas()).ready == 1


@virtual
async def test_a_watch_of_a_server_that_is_away_waits_longer_and_longer() -> None:
    double = KubernetesDouble()
    double.workload(replicas=4)
    async with target_of(double) as target:
        await asyncio.sleep(0.1)
        requests = len(double.requests)
        double.fail(LIST, cuts, times=1000)
        double.end_watches(cut=True)
        await asyncio.sleep(600.0)
        assert len(double.requests) - requests < 300
        assert (await target.replicas()).ready == 4  # the last that is known


@virtual
@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"type": "ERROR", "object": {}}', b'{"type": "MODIFIED", "object": {}}']
)
async def test_a_watch_that_cannot_be_read_is_begun_again(line: bytes) -> None:
    double = KubernetesDouble()
    double.workload(replicas=4)
    double.fail(WATCH, answers(200, body=line))
    async with target_of(double) as target:
        await asyncio.sleep(3.0)
        double.set_ready("workers", 1)
        await asyncio.sleep(0.1)
        assert (await target.replicas()).ready == 1


# --- reports ---


def report(**fields: Any) -> bytes:
    return msgspec.json.encode(ReplicaReport(**fields))


@virtual
async def test_the_pods_that_take_tasks_are_asked_what_they_are_short_of() -> None:
    double = KubernetesDouble()
    double.rules = RULES
    double.workload(replicas=4)
    for number in range(4):
        double.pod(f"workers-{number}", f"10.0.0.{number}", ready=number != 2, going=number == 3)
    double.pod("another", "10.0.0.9", app="another")
    double.pod("six", "fd00::1")
    transport = KubernetesTransport(double)
    transport.plain = {
        "http://10.0.0.0:9000/report": report(service=2.0, limited_by="upstream:openai:rpm"),
        "http://10.0.0.1:9000/report": report(service=4.0),
        "http://10.0.0.2:9000/report": report(service=400.0),
        "http://10.0.0.3:9000/report": report(service=400.0),
        "http://10.0.0.9:9000/report": report(service=400.0),
        "http://[fd00::1]:9000/report": b"<html>",
    }
    async with target_of(double, transport=transport, report_port=9000) as target:
        await asyncio.sleep(1.0)
        replicas = await target.replicas()
        assert (replicas.current, replicas.ready) == (4, 4)
        assert (replicas.limited_by, replicas.service) == ("upstream:openai:rpm", 3.0)
        assert not any("authorization" in each.headers for each in transport.asked)
        del transport.plain["http://10.0.0.0:9000/report"]
        await asyncio.sleep(5.0)
        replicas = await target.replicas()
        assert (replicas.limited_by, replicas.service) == (None, 4.0)
        transport.plain.clear()
        await asyncio.sleep(5.0)
        assert (await target.replicas()).service == 4.0  # as they said last
        await asyncio.sleep(60.0)
        assert 11 <= double.count("list pods") <= 15


@virtual
async def test_without_the_right_to_list_pods_there_are_no_reports(caplog: pytest.LogCaptureFixture) -> None:
    double = KubernetesDouble()
    double.rules = RULES[:2]
    double.workload(replicas=1)
    async with target_of(double, report_port=9000) as target:
        await asyncio.sleep(60.0)
        assert (await target.replicas()).service is None
    assert len(caplog.records) == 1
    assert "the verb 'list' on 'pods'" in caplog.text


# --- with an autoscaler ---


@virtual
async def test_an_autoscaler_scales_pods_through_trouble() -> None:
    double = KubernetesDouble(start=30.0)
    double.workload(replicas=1)
    supervisor = ScriptedSupervisor(Demand(elsewhere=8, service=1.0))
    transport = KubernetesTransport(double)
    double.fail(PUT, answers(500), times=2)
    double.fail(PUT, meanwhile(double.touch))
    async with contextlib.AsyncExitStack() as stack:
        api = api_of(double, transport)
        stack.push_async_callback(api.close)
        target = KubernetesTarget("deployment/workers", api=api)
        scaler = await stack.enter_async_context(
            Autoscaler(supervisor, target, task_types=["work"], seats=1, load=0.5, maximum=20, stabilization=30.0)
        )
        double.fail(GET, hangs)
        double.fail(GET, answers(429, retry_after=20))
        await asyncio.sleep(120.0)
        assert double.replicas() == 16
        assert scaler.statistics().ready == 16
        supervisor.answer = Demand(elsewhere=1, service=1.0)
        await asyncio.sleep(300.0)
        assert double.replicas() == 2
    assert double.watchers == 0


@pytest.mark.parametrize("seed", range(8))
def test_an_autoscaler_comes_to_the_right_number_whatever_the_server_does(seed: int) -> None:
    """Answers fail, come late, are lost or conflict; watches break and are forgotten; somebody else scales, too."""
    virtual(seed=seed)(scale_through_trouble)()


async def scale_through_trouble() -> None:
    draw = virtual_loop().random
    double = KubernetesDouble(start=20.0)
    double.workload(replicas=1)
    faults = [
        *(answers(status) for status in (429, 500, 503)), answers(503, retry_after=2), answers(429, retry_after=40),
        answers(200, body=b"<html>"), cuts, hangs, answer_lost, meanwhile(double.touch),
        meanwhile(lambda: double.set_replicas(draw.randint(1, 20))),
    ]  # fmt: skip
    troubles: list[Callable[[], object]] = [
        lambda: double.fail(draw.choice([GET, PUT, LIST, WATCH]), draw.choice(faults), times=draw.randint(1, 5)),
        lambda: double.end_watches(cut=draw.random() < 0.5),
        double.forget,
        double.recover,
        lambda: double.set_replicas(draw.randint(1, 20)),
    ]
    supervisor = ScriptedSupervisor(Demand(elsewhere=1, service=1.0))
    async with contextlib.AsyncExitStack() as stack:
        api = api_of(double)
        stack.push_async_callback(api.close)
        target = KubernetesTarget("deployment/workers", api=api)
        scaler = Autoscaler(supervisor, target, task_types=["work"], load=0.5, maximum=20, stabilization=20.0)
        async with scaler:
            for _ in range(200):
                draw.choice(troubles)()
                supervisor.answer = Demand(elsewhere=draw.randint(0, 12), service=1.0)
                await asyncio.sleep(draw.uniform(0.0, 15.0))
                assert 1 <= double.replicas() <= 20
            double.recover()
            supervisor.answer = Demand(elsewhere=6, service=1.0)
            await asyncio.sleep(200.0)
            assert 11 <= double.replicas() <= 13  # a tenth is tolerated
            assert scaler.statistics().ready == double.replicas()
            assert double.watchers == 1


# --- settings ---


@pytest.mark.parametrize(
    "workload", ["workers", "daemonset/workers", "deployment/", "deployment/a/b", "deployment/A", 3]
)
def test_a_workload_that_is_none(workload: Any) -> None:
    with pytest.raises(InvalidSetting, match="workload"):
        KubernetesTarget(workload)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("namespace", "a/b"),
        ("namespace", ""),
        ("context", ""),
        ("timeout", 0),
        ("report_port", 0),
        ("report_port", 70_000),
    ],
)
def test_a_setting_that_is_none(name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting, match=name):
        KubernetesTarget("deployment/workers", **{name: value})
