"""The target of EC2 instances: its counts, its bounds, which instances go, and its failures in words."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("botocore")

from botocore.exceptions import ConnectTimeoutError, NoCredentialsError
from tests.support.faulty_proxy import HTML, THROTTLING, UNAVAILABLE, XHTML, faulty_proxy
from tests.support.simulated_group import SimulatedGroup, service_error

from forebay.errors import InvalidSetting, ScalingFailed, StoreNotInstalled
from forebay.scale import Ec2Target, Replicas, ec2_client
from forebay.scale.ec2_client import AwsClient

Connect = Callable[[SimulatedGroup], None]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Return a function that puts a group in the place of the service."""

    def connect(group: SimulatedGroup) -> None:
        monkeypatch.setattr(AwsClient, "_connect", lambda _: group)

    return connect


async def opened(group: SimulatedGroup, connect: Connect, **settings: Any) -> Ec2Target:
    connect(group)
    target = Ec2Target("workers", **settings)
    await target.open()
    return target


# --- counts ---


async def test_those_that_start_are_asked_for_and_not_ready(connect: Connect) -> None:
    group = SimulatedGroup(2)
    target = await opened(group, connect)
    assert await target.replicas() == Replicas(current=2, ready=2)
    await target.scale(5)
    group.settle()
    assert await target.replicas() == Replicas(current=5, ready=2)
    group.launch_all()
    assert await target.replicas() == Replicas(current=5, ready=5)


@pytest.mark.parametrize(
    "state",
    ["Pending", "Pending:Wait", "Pending:Proceed", "Quarantined", "Terminating", "Terminating:Wait",
     "Terminating:Proceed", "Terminated", "Detaching", "EnteringStandby", "Standby", "Warmed:Stopped",
     "Warmed:Running"],
)  # fmt: skip
async def test_only_what_is_in_service_is_ready(connect: Connect, state: str) -> None:
    group = SimulatedGroup(3)
    group.instances[1].state = state
    assert await (await opened(group, connect)).replicas() == Replicas(current=3, ready=2)


async def test_an_unhealthy_instance_is_not_ready(connect: Connect) -> None:
    group = SimulatedGroup(3)
    group.instances[0].health = "Unhealthy"
    assert (await (await opened(group, connect)).replicas()).ready == 2


async def test_one_that_is_to_go_and_still_in_service_is_not_ready(connect: Connect) -> None:
    group = SimulatedGroup(3)
    for each in group.instances:
        each.protected = True
    target = await opened(group, connect)
    await target.scale(2)
    group.settle()
    assert len(group.live) == 3
    assert await target.replicas() == Replicas(current=2, ready=2)


async def test_with_weights_a_replica_is_a_unit_of_capacity(connect: Connect) -> None:
    group = SimulatedGroup(2)
    group.instances[0].weight, group.instances[1].weight = 4, 2
    group.desired = 6
    assert await (await opened(group, connect)).replicas() == Replicas(current=6, ready=6)


# --- which ones go ---


async def test_the_group_chooses_among_those_without_a_task(connect: Connect) -> None:
    group = SimulatedGroup(3)
    busy = group.instances[::2]
    for each in busy:
        each.protected = True
    target = await opened(group, connect)
    await target.scale(1)
    group.settle()
    assert group.instances == busy  # one too many, and not interrupted
    busy[0].protected = False
    group.settle()
    assert group.instances == busy[1:]


async def test_with_a_drain_hook_as_many_busy_ones_as_are_too_many_are_released(connect: Connect) -> None:
    group = SimulatedGroup(5, hook="drain")
    for each in group.instances[1:]:
        each.protected = True
    target = await opened(group, connect, drain_hook="drain")
    await target.scale(2)
    assert [each.protected for each in group.instances] == [False, False, False, True, True]
    group.settle()
    assert [state for state, _ in group.states] == ["Terminating:Wait"] * 3 + ["InService"] * 2
    assert await target.replicas() == Replicas(current=2, ready=2)
    assert group.calls.count("SetInstanceProtection") == 1


async def test_those_that_are_being_launched_go_before_busy_ones(connect: Connect) -> None:
    group = SimulatedGroup(2, hook="drain")
    for each in group.instances:
        each.protected = True
    group.desired = 4
    group.settle()
    target = await opened(group, connect, drain_hook="drain")
    await target.scale(2)
    group.settle()
    assert group.live == group.instances[:2]
    assert all(each.protected for each in group.live)


async def test_one_that_protects_itself_in_between_is_released_at_the_next_reading(connect: Connect) -> None:
    group = SimulatedGroup(2, hook="drain")
    group.instances[0].protected = True
    target = await opened(group, connect, drain_hook="drain")
    await target.scale(1)
    group.instances[1].protected = True
    group.settle()
    assert len(group.live) == 2
    await target.replicas()
    group.settle()
    assert len(group.live) == 1


async def test_more_than_fifty_are_released_in_several_calls(connect: Connect) -> None:
    group = SimulatedGroup(120, maximum=200, hook="drain")
    for each in group.instances:
        each.protected = True
    target = await opened(group, connect, drain_hook="drain")
    await target.scale(10)
    assert sum(not each.protected for each in group.instances) == 110
    assert group.calls.count("SetInstanceProtection") == 3


async def test_one_that_cannot_be_released_keeps_nothing_from_being_read_and_scaled(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    group = SimulatedGroup(3, hook="drain")
    for each in group.instances:
        each.protected = True
    target = await opened(group, connect, drain_hook="drain")
    group.faults["SetInstanceProtection"] = [service_error("AccessDenied")] * 3
    await target.scale(2)
    await target.replicas()
    await target.replicas()
    assert len(caplog.records) == 1
    assert "stay protected" in caplog.text
    assert "autoscaling:SetInstanceProtection" in caplog.text
    await target.replicas()
    assert sum(each.protected for each in group.instances) == 2


async def test_the_same_number_again_changes_nothing(connect: Connect) -> None:
    group = SimulatedGroup(3)
    target = await opened(group, connect)
    await target.scale(3)
    assert "SetDesiredCapacity" not in group.calls


# --- bounds of the group ---


@pytest.mark.parametrize(("asked", "found", "words"), [(9, 4, "MaxSize of the group is 4"), (0, 1, "MinSize")])
async def test_the_bounds_of_the_group_hold_and_are_named_once(
    connect: Connect, caplog: pytest.LogCaptureFixture, asked: int, found: int, words: str
) -> None:
    group = SimulatedGroup(2, minimum=1, maximum=4)
    target = await opened(group, connect)
    for _ in range(3):
        await target.scale(asked)
        assert group.desired == found
    assert [words in record.getMessage() for record in caplog.records] == [True]
    await target.scale(2)
    await target.scale(asked)
    assert len(caplog.records) == 2  # it was within them in between


async def test_a_suspended_process_is_named(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    group = SimulatedGroup(2)
    group.suspended = ["Launch"]
    target = await opened(group, connect)
    await target.scale(1)
    assert caplog.records == []
    await target.scale(3)
    assert "the process Launch of the group is suspended" in caplog.text


# --- failures ---


async def test_there_is_no_such_group(connect: Connect) -> None:
    connect(SimulatedGroup(1))
    with pytest.raises(ScalingFailed, match=r"^ec2:others cannot be used: there is no such group in the region \(eu\)"):
        await Ec2Target("others", region="eu").open()


async def test_a_group_that_is_being_deleted_is_not_scaled(connect: Connect) -> None:
    group = SimulatedGroup(1)
    target = await opened(group, connect)
    group.status = "Delete in progress"
    with pytest.raises(ScalingFailed, match="being deleted"):
        await target.scale(2)


@pytest.mark.parametrize("hook", ["other", "launching"])
async def test_the_drain_hook_must_be_one_for_instances_that_terminate(connect: Connect, hook: str) -> None:
    connect(SimulatedGroup(1, hook="drain"))
    with pytest.raises(
        ScalingFailed, match=rf"has no lifecycle hook '{hook}' for autoscaling:EC2_INSTANCE_TERMINATING"
    ):
        await Ec2Target("workers", drain_hook=hook).open()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (service_error("AccessDenied"), "its credentials may not call autoscaling:SetDesiredCapacity: allow it in"),
        (service_error("ExpiredToken"), r"rejects its credentials \(ExpiredToken\): renew them"),
        (service_error("Throttling", message="Rate exceeded"), "was answered with Throttling: Rate exceeded"),
        (NoCredentialsError(), "there are no credentials. Set AWS_ACCESS_KEY_ID"),
        (
            ConnectTimeoutError(endpoint_url="http://x"),
            r"it does not answer \(ConnectTimeoutError\). Check the endpoint",
        ),
    ],
)
async def test_a_failure_says_what_to_do(connect: Connect, error: Exception, words: str) -> None:
    group = SimulatedGroup(1)
    target = await opened(group, connect)
    group.faults["SetDesiredCapacity"] = [error]
    with pytest.raises(ScalingFailed, match=f"^ec2:workers cannot be used: .*{words}"):
        await target.scale(2)
    await target.scale(2)
    assert group.desired == 2


async def test_a_call_that_is_throttled_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with faulty_proxy("http://127.0.0.1:9") as proxy:
        proxy.faults["DescribeAutoScalingGroups"] = [THROTTLING, UNAVAILABLE, (400, "ValidationError")]
        target = Ec2Target("workers", region="eu-west-1", endpoint=proxy.url)
        with pytest.raises(ScalingFailed, match="was answered with ValidationError: try later"):
            await target.open()
        await target.close()


@pytest.mark.parametrize("page", [HTML, XHTML, *((status, HTML[1]) for status in (403, 404, 407, 503))])
async def test_a_page_of_a_proxy_is_a_failure_in_words(monkeypatch: pytest.MonkeyPatch, page: tuple[int, str]) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setattr(ec2_client, "_ATTEMPTS", 1)
    with faulty_proxy("http://127.0.0.1:9") as proxy:
        proxy.faults["DescribeAutoScalingGroups"] = [page]
        target = Ec2Target("workers", region="eu-west-1", endpoint=proxy.url)
        with pytest.raises(ScalingFailed, match=r"^ec2:workers cannot be used: "):
            await target.open()
        await target.close()


async def test_without_a_region_it_says_where_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(
        ScalingFailed, match=r"there is no region\. Add region= to the target, or set AWS_DEFAULT_REGION"
    ):
        await Ec2Target("workers").open()


async def test_without_its_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "forebay.scale.ec2_client", raising=False)
    monkeypatch.delitem(sys.modules, "forebay.storage.aws", raising=False)
    monkeypatch.delattr("forebay.storage.aws", raising=False)
    monkeypatch.setitem(sys.modules, "botocore", None)
    monkeypatch.setitem(sys.modules, "botocore.exceptions", None)
    with pytest.raises(StoreNotInstalled, match=r"Ec2Target needs the library botocore.*'forebay\[ec2\]'"):
        await Ec2Target("workers").open()


@pytest.mark.parametrize("settings", [{"group": ""}, {"group": 3}, {"region": ""}, {"drain_hook": ""}, {"endpoint": 1}])
def test_a_setting_that_is_no_name_is_rejected(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=f"Ec2Target was given {next(iter(settings))}="):
        Ec2Target(**{"group": "workers", **settings})


async def test_it_is_used_between_open_and_close(connect: Connect) -> None:
    target = await opened(SimulatedGroup(1), connect)
    await target.close()
    await target.close()
    for use in (target.replicas, lambda: target.scale(1)):
        with pytest.raises(ScalingFailed, match="not open"):
            await use()


async def test_a_call_that_was_given_up_is_over_before_the_next_one(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, go, order = SimulatedGroup(1), threading.Event(), []
    target = await opened(group, connect)
    change = group.set_desired_capacity

    def slow(**parameters: Any) -> Any:
        if parameters["DesiredCapacity"] == 9:
            go.wait()
        order.append(parameters["DesiredCapacity"])
        return change(**parameters)

    monkeypatch.setattr(group, "set_desired_capacity", slow)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await target.scale(9)
    later = asyncio.ensure_future(target.scale(2))
    done, _ = await asyncio.wait((later,), timeout=0.5)  # it cannot end, however long this waits
    assert not done
    go.set()
    await later
    assert (order, group.desired) == ([9, 2], 2)


async def test_a_call_that_was_given_up_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    go, came = threading.Event(), threading.Event()
    with faulty_proxy("http://127.0.0.1:9") as proxy:

        def answer_later() -> None:
            came.set()
            go.wait(10.0)

        proxy.before_answer = answer_later
        proxy.faults["SetDesiredCapacity"] = [UNAVAILABLE] * 9
        proxy.faults["DescribeAutoScalingGroups"] = [(400, "ValidationError")]
        client = AwsClient("ec2:workers", region="eu-west-1", endpoint=proxy.url)
        await client.open()
        asked = asyncio.ensure_future(client.call("SetDesiredCapacity", AutoScalingGroupName="g", DesiredCapacity=9))
        await asyncio.get_running_loop().run_in_executor(None, came.wait, 10.0)
        asked.cancel()
        await asyncio.wait((asked,))
        go.set()
        with pytest.raises(ScalingFailed, match="ValidationError"):  # the next one, which is sent after it has ended
            await client.call("DescribeAutoScalingGroups", AutoScalingGroupNames=["g"])
        await client.close()
        assert proxy.actions == ["SetDesiredCapacity", "DescribeAutoScalingGroups"]


def test_its_name() -> None:
    target = Ec2Target("workers")
    assert (target.name, target.outside) == ("ec2:workers", True)
