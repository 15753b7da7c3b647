"""The instance that a worker process runs on: which one it is, its protection, and its end."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("botocore")

from botocore.parsers import ResponseParserError
from tests.support.metadata_server import MetadataServer, metadata_server
from tests.support.simulated_group import SimulatedGroup, service_error

from forebay.errors import ScalingFailed
from forebay.scale import Ec2Target, ec2_protection, ec2_reports
from forebay.scale.ec2_client import AwsClient
from forebay.scale.ec2_protection import Ec2Protection


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    """Return the metadata service of this machine."""
    with metadata_server() as server:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
        yield server


@pytest.fixture
def group(metadata: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> SimulatedGroup:
    """Return the group whose first instance this machine is."""
    group = SimulatedGroup(3, hook="drain")
    metadata.items["instance-id"] = group.instances[0].instance_id
    monkeypatch.setattr(AwsClient, "_connect", lambda _: group)
    return group


async def opened(drain_hook: str | None = None) -> Ec2Protection:
    protection = Ec2Protection(drain_hook=drain_hook)
    try:
        await protection.open()
        await protection.wait_until_in_service()
    except BaseException:
        await protection.close()
        raise
    return protection


async def test_it_protects_its_own_instance(group: SimulatedGroup) -> None:
    protection = await opened()
    assert protection.name == f"ec2:{group.instances[0].instance_id}"
    assert await protection.protect()
    assert [each.protected for each in group.instances] == [True, False, False]
    await protection.unprotect()
    assert not group.instances[0].protected
    await protection.close()


@pytest.mark.parametrize("state", ["Pending:Wait", "Warmed:Running", "Warmed:Pending:Wait"])
async def test_it_waits_until_the_instance_is_in_service(
    group: SimulatedGroup, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(ec2_protection, "_PENDING_INTERVAL", 0.001)
    group.instances[0].state = state
    opening = asyncio.ensure_future(opened())
    while group.calls.count("DescribeAutoScalingInstances") < 3:  # noqa: ASYNC110 - of a thread, which sets no event
        await asyncio.sleep(0.001)
    assert not opening.done()
    group.instances[0].state = "InService"
    await (await opening).close()


async def test_an_instance_that_is_leaving_is_not_protected(group: SimulatedGroup) -> None:
    protection = await opened()
    for state in ("Terminating:Wait", "Terminating", "Detaching", "Warmed:Pending"):
        group.instances[0].state = state
        assert not await protection.protect()
    group.instances.pop(0)
    assert not await protection.protect()
    await protection.close()


@pytest.mark.parametrize("code", ["Throttling", "AccessDenied", "ServiceUnavailable", "ResourceContention"])
async def test_a_failure_of_a_call_does_not_mean_that_it_is_leaving(group: SimulatedGroup, code: str) -> None:
    protection = await opened()
    group.faults["SetInstanceProtection"] = [service_error(code)]
    with pytest.raises(ScalingFailed, match=f"ec2:{group.instances[0].instance_id} cannot be used"):
        await protection.protect()
    assert await protection.protect()
    await protection.close()


@pytest.mark.parametrize(
    ("target", "leaving"),
    [(None, False), ("InService", False), ("Standby", False), ("Terminated", True), ("Detached", True),
     ("Warmed:Stopped", True)],
)  # fmt: skip
async def test_its_metadata_says_whether_it_is_leaving(
    group: SimulatedGroup, metadata: MetadataServer, target: str | None, *, leaving: bool
) -> None:
    protection = await opened()
    calls = list(group.calls)
    if target is not None:
        metadata.items["autoscaling/target-lifecycle-state"] = target
    assert await protection.is_leaving() == leaving
    assert group.calls == calls  # of the API: none
    await protection.close()


async def test_an_expired_token_is_replaced(group: SimulatedGroup, metadata: MetadataServer) -> None:
    protection = await opened()
    metadata.token = "token-2"  # noqa: S105
    metadata.items["autoscaling/target-lifecycle-state"] = "Terminated"
    assert await protection.is_leaving()
    statuses = [each.rpartition(" ")[2] for each in metadata.requests[-3:]]
    assert statuses == ["401", "200", "200"]
    await protection.close()
    assert group.instances


async def test_metadata_that_cannot_be_read_mean_nothing_and_are_logged_once(
    group: SimulatedGroup, metadata: MetadataServer, caplog: pytest.LogCaptureFixture
) -> None:
    protection = await opened()
    metadata.shutdown()
    metadata.server_close()
    for _ in range(3):
        assert not await protection.is_leaving()
    assert len(caplog.records) == 1
    await protection.close()
    assert group.instances


@pytest.mark.parametrize("nonsense", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nTerm"])
async def test_metadata_that_are_none_mean_nothing(
    group: SimulatedGroup, metadata: MetadataServer, nonsense: bytes
) -> None:
    protection = await opened()
    metadata.nonsense = nonsense
    assert not await protection.is_leaving()
    await protection.close()
    assert group.instances


async def test_the_hook_keeps_the_instance_until_it_is_completed(
    group: SimulatedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    protection = await opened("drain")
    instance = group.instances[0]
    assert protection._heartbeat == 300
    monkeypatch.setattr(protection, "_heartbeat", 0.003)
    group.desired = 2
    group.settle()
    assert instance.state == "Terminating:Wait"
    waiting = asyncio.ensure_future(protection.keep_waiting())
    while instance.heartbeats < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    waiting.cancel()
    await asyncio.wait((waiting,))
    await protection.complete()
    assert instance not in group.instances
    await protection.close()


async def test_a_hook_that_has_ended_is_logged(group: SimulatedGroup, caplog: pytest.LogCaptureFixture) -> None:
    protection = await opened("drain")
    await protection.complete()
    assert "No active Lifecycle Action" in caplog.text
    await protection.close()
    assert group.instances


async def test_a_page_of_a_proxy_ends_no_worker(group: SimulatedGroup, caplog: pytest.LogCaptureFixture) -> None:
    protection = await opened("drain")
    group.faults["CompleteLifecycleAction"] = [ResponseParserError("a page")]
    await protection.complete()
    assert "is no service of AWS" in caplog.text
    group.faults["SetInstanceProtection"] = [ResponseParserError("a page")]
    with pytest.raises(ScalingFailed, match="is no service of AWS"):
        await protection.unprotect()
    await protection.close()


async def test_without_a_hook_nothing_is_told(group: SimulatedGroup) -> None:
    protection = await opened()
    await protection.keep_waiting()
    await protection.complete()
    assert group.calls == ["DescribeAutoScalingInstances"]
    await protection.close()


async def test_a_hook_that_the_group_does_not_have_is_rejected(group: SimulatedGroup) -> None:
    with pytest.raises(ScalingFailed, match="the group workers has no lifecycle hook 'other'"):
        await opened("other")
    assert group.instances


async def test_an_instance_without_a_group_is_rejected(group: SimulatedGroup, metadata: MetadataServer) -> None:
    metadata.items["instance-id"] = "i-other"
    with pytest.raises(
        ScalingFailed, match="ec2:i-other cannot be used: it is in no Auto Scaling group: leave --protect"
    ):
        await opened()
    assert group.instances


async def test_a_machine_without_metadata_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ScalingFailed, match=r"no metadata service .*hop limit must be 2\. Without an EC2 instance"):
        await opened()


async def test_one_process_of_an_instance_protects_it(group: SimulatedGroup) -> None:
    first = await opened()
    with pytest.raises(ScalingFailed, match="another worker process protects it already: run one, with more slots"):
        await opened()
    await first.close()
    await (await opened()).close()
    assert group.instances


async def test_it_is_used_between_open_and_close(group: SimulatedGroup) -> None:
    protection = await opened()
    await protection.close()
    with pytest.raises(ScalingFailed, match="not open"):
        await protection.unprotect()
    assert group.instances


# --- rights ---


def allowed_by_the_page() -> list[set[str]]:
    """Return the operations that the IAM policies on the page allow, in their order."""
    page = (Path(__file__).parents[3] / "docs" / "guide" / "autoscaling-ec2.md").read_text()
    policies = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    return [
        {action.rpartition(":")[2] for statement in policy["Statement"] for action in statement["Action"]}
        for policy in policies
    ]


async def test_the_policies_on_the_page_allow_what_is_called_and_no_more(
    group: SimulatedGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_autoscaler, of_instance = allowed_by_the_page()
    protection = await opened("drain")
    await protection.protect()
    group.desired = 2
    await protection.unprotect()
    group.settle()
    monkeypatch.setattr(protection, "_heartbeat", 0.003)
    waiting = asyncio.ensure_future(protection.keep_waiting())
    while not group.instances[0].heartbeats:  # noqa: ASYNC110 - of a thread, which sets no event
        await asyncio.sleep(0.001)
    waiting.cancel()
    await asyncio.wait((waiting,))
    await protection.complete()
    await protection.close()
    assert set(group.calls) == of_instance

    group.calls.clear()
    for each in group.instances:
        each.protected = True
    monkeypatch.setattr(ec2_reports, "_INTERVAL", 0.001)
    target = Ec2Target("workers", drain_hook="drain", report_port=9)
    await target.open()
    await target.replicas()
    while "DescribeInstances" not in group.calls:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await target.scale(1)
    await target.close()
    assert set(group.calls) == of_autoscaler
