"""What the workers of EC2 instances say of themselves: asked of each, and worth nothing if they do not answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

pytest.importorskip("botocore")

from tests.support.simulated_group import SimulatedGroup, service_error

from forebay.errors import InvalidSetting
from forebay.scale import Ec2Target, ReplicaReport, Replicas, ec2_reports
from forebay.scale.ec2_client import AwsClient
from forebay.scale.ec2_reports import fetch_report
from forebay.supervisor.report_server import ReportServer


class Instances:
    """The workers of all instances, at one address: those of a double have that of this machine."""

    def __init__(self) -> None:
        self.report = ReplicaReport(running=3, service=2.0, limited_by="upstream:openai:breaker")
        self.ready = True
        self.asked = 0

    async def answer(self) -> ReplicaReport:
        """Return the report."""
        self.asked += 1
        return self.report


@pytest.fixture
def instances() -> Instances:
    return Instances()


@pytest.fixture
async def port(instances: Instances) -> AsyncIterator[int]:
    """Return the port on which they report."""
    server = ReportServer("127.0.0.1", 0, ready=lambda: instances.ready, report=instances.answer)
    await server.open()
    yield server.port
    await server.close()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> SimulatedGroup:
    """Return a group in the place of the service."""
    group = SimulatedGroup(3)
    monkeypatch.setattr(AwsClient, "_connect", lambda _: group)
    monkeypatch.setattr(ec2_reports, "_INTERVAL", 0.01)
    return group


@contextlib.asynccontextmanager
async def target(port: int) -> AsyncIterator[Ec2Target]:
    made = Ec2Target("workers", report_port=port)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def until(target: Ec2Target, condition: Callable[[Replicas], Any]) -> Replicas:
    """Read until something holds; the test's timeout bounds it."""
    while not condition(replicas := await target.replicas()):  # noqa: ASYNC110 - of a task that sets no event
        await asyncio.sleep(0.005)
    return replicas


async def test_the_reports_of_instances_are_summed_up(group: SimulatedGroup, instances: Instances, port: int) -> None:
    group.instances[2].state = "Pending"
    async with target(port) as made:
        replicas = await until(made, lambda replicas: replicas.service)
        assert replicas == Replicas(current=3, ready=2, service=2.0, limited_by="upstream:openai:breaker")
        instances.report = ReplicaReport(running=1, service=4.0)
        assert (await until(made, lambda replicas: replicas.service == 4.0)).limited_by is None


async def test_an_instance_is_looked_up_once(group: SimulatedGroup, instances: Instances, port: int) -> None:
    async with target(port) as made:
        await until(made, lambda _: instances.asked > 9)
        assert group.calls.count("DescribeInstances") == 1
        group.desired = 4
        group.settle()
        group.launch_all()
        asked = instances.asked
        await until(made, lambda _: instances.asked > asked + 12)
        assert group.calls.count("DescribeInstances") == 2


async def test_those_that_do_not_answer_say_nothing(group: SimulatedGroup, instances: Instances, port: int) -> None:
    async with target(port) as made:
        await until(made, lambda replicas: replicas.service)
        instances.ready = False
        assert await until(made, lambda replicas: not replicas.service) == Replicas(current=3, ready=3)
    assert group.live


async def test_without_the_right_to_look_up_it_says_so_once_and_goes_on(
    group: SimulatedGroup, instances: Instances, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    group.faults["DescribeInstances"] = [service_error("UnauthorizedOperation")] * 3
    async with target(port) as made:
        assert await made.replicas() == Replicas(current=3, ready=3)
        await until(made, lambda replicas: replicas.service)
    assert instances.asked
    assert len(caplog.records) == 1
    assert "its credentials may not call ec2:DescribeInstances" in caplog.text


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b'HTTP/1.1 503 No\r\nContent-Length: 13\r\n\r\n{"running": 1}',
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    ],
)
async def test_an_answer_that_is_no_report_says_nothing(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        assert await fetch_report("127.0.0.1", server.sockets[0].getsockname()[1]) is None


async def test_one_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ec2_reports, "_TIMEOUT", 0.05)
    hung: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: hung.append(writer), "127.0.0.1", 0)
    async with server:
        assert await fetch_report("127.0.0.1", server.sockets[0].getsockname()[1]) is None
        hung[0].close()


@pytest.mark.parametrize("port", [0, -1, 65_536, "9000"])
def test_a_port_that_is_none_is_rejected(port: Any) -> None:
    with pytest.raises(InvalidSetting, match="Ec2Target was given report_port="):
        Ec2Target("workers", report_port=port)


@pytest.mark.parametrize(
    "wrong",
    [b'{"service": -1e6}', b'{"service": 1e308}', b'{"service": 1e400}', b'{"service": NaN}', b'{"running": -1}',
     b'{"limited_by": "' + b"a" * 501 + b'"}', b'{"service": "1"}', b"[]"],
)  # fmt: skip
def test_a_report_with_a_number_that_cannot_be_is_none(wrong: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(wrong, type=ReplicaReport)
