"""Reports of the workers of EC2 instances, over HTTP in their private network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from forebay import clock
from forebay._cancellation import raise_own_cancellation
from forebay.events import log
from forebay.scale.ec2_client import AwsClient
from forebay.scale.target import ReplicaReport

_INTERVAL: Final = 5.0  # seconds between two rounds
_TIMEOUT: Final = 2.0  # seconds that an instance may take to report
_MOST_ASKED: Final = 50  # instances in a round; of more, these are drawn
_MAX_ANSWER: Final = 8 * 1024  # bytes


class InstanceReports:
    """The reports of some instances, which are asked in the background.

    An instance is looked up once, for its private address.

    Args:
        what: names whatever uses them, in messages.
        port: of ``forebay worker --listen``.
        region: None for that of the environment or the profile.
        endpoint: the address of the API of EC2; None for that of the region.
    """

    def __init__(self, what: str, *, port: int, region: str | None, endpoint: str | None) -> None:
        self._what = what
        self._port = port
        self._client = AwsClient(what, "ec2", region=region, endpoint=endpoint)
        self._instances: Sequence[str] = ()
        self._addresses: dict[str, str] = {}
        self._asking: asyncio.Task[None] | None = None
        self.last: Sequence[ReplicaReport] = ()

    async def open(self) -> None:
        """Begin to ask.

        Raises:
            ScalingFailed: there is no region, or the configuration is invalid.
        """
        await self._client.open()
        self._asking = asyncio.ensure_future(self._ask())

    async def close(self) -> None:
        """Ask no more."""
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.wait((asking,))
        await self._client.close()

    def follow(self, instances: Sequence[str]) -> None:
        """Ask these instances from now on."""
        self._instances = instances

    async def _ask(self) -> None:
        failing = False
        while True:
            try:
                await self._round()
                failing = False
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the next round may succeed
                raise_own_cancellation(error)
                self.last = ()
                if not failing:
                    log.warning("%s: its instances cannot be asked for reports (%s)", self._what, error)
                failing = True
            await asyncio.sleep(_INTERVAL)

    async def _round(self) -> None:
        instances = sorted(self._instances, key=lambda _: clock.draw())[:_MOST_ASKED]
        if unknown := sorted(set(instances).difference(self._addresses)):
            await self._look_up(unknown)
        self._addresses = {each: self._addresses[each] for each in self._instances if each in self._addresses}
        asked = [fetch_report(self._addresses[each], self._port) for each in instances if each in self._addresses]
        self.last = [report for report in await asyncio.gather(*asked) if report is not None]

    async def _look_up(self, instances: Sequence[str]) -> None:
        """Learn the private addresses of instances. One that there is no more has none."""
        filters = [{"Name": "instance-id", "Values": list(instances)}]
        answer: Any = await self._client.call("DescribeInstances", Filters=filters)
        for reservation in answer.get("Reservations", ()):
            for each in reservation.get("Instances", ()):
                if address := each.get("PrivateIpAddress") or each.get("Ipv6Address"):
                    self._addresses[each["InstanceId"]] = address


async def fetch_report(host: str, port: int) -> ReplicaReport | None:
    """Return the report of a worker; None if it gives none, as while it starts or drains."""
    with contextlib.suppress(
        OSError, TimeoutError, ValueError, EOFError, asyncio.LimitOverrunError, msgspec.DecodeError
    ):
        async with asyncio.timeout(_TIMEOUT):
            reader, writer = await asyncio.open_connection(host, port, limit=_MAX_ANSWER)
            try:
                shown = f"[{host}]" if ":" in host else host
                writer.write(f"GET /report HTTP/1.1\r\nHost: {shown}:{port}\r\nConnection: close\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(min(_content_length(head), _MAX_ANSWER))
            finally:
                writer.close()
        if head.split(b" ", 2)[1:2] == [b"200"]:
            return msgspec.json.decode(body, type=ReplicaReport)
    return None


def _content_length(head: bytes) -> int:
    """Return the length of the body that a head names; 0 if it names none."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0
