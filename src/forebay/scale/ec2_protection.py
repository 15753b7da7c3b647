"""The protection of the EC2 instance that a worker process runs on, and the end of that instance."""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import sys
import urllib.error
import urllib.request
from functools import partial
from http import HTTPStatus
from typing import Any, Final

from forebay._threads import DaemonThreadExecutor
from forebay.errors import ScalingFailed
from forebay.events import log
from forebay.scale.ec2 import find_hook
from forebay.scale.ec2_client import AwsClient

_METADATA: Final = "http://169.254.169.254"
_METADATA_VARIABLE: Final = "AWS_EC2_METADATA_SERVICE_ENDPOINT"  # that of the AWS SDKs
_METADATA_TIMEOUT: Final = 2.0  # seconds
_TOKEN_SECONDS: Final = 21600
_PENDING_INTERVAL: Final = 15.0  # seconds between two looks at an instance that is not in service yet
_NOT_YET: Final = ("Pending", "Warmed:")  # what the states begin with of one that may come into service
_LEAVING_TARGETS: Final = ("Terminated", "Detached", "Warmed:")  # what the states begin with that it is brought to
_LEAVING_STATES: Final = ("Terminat", "Detach", "Warmed:")  # what the states begin with that it is in


class InstanceMetadata:
    """The metadata service of this EC2 instance (IMDSv2): local, and not billed or throttled with the API."""

    def __init__(self) -> None:
        self._base = (os.environ.get(_METADATA_VARIABLE) or _METADATA).rstrip("/")
        self._token: str | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read(self, item: str) -> str | None:
        """Return an item, such as ``"instance-id"``; None if the instance has none. Blocks.

        Raises:
            OSError: the service cannot be reached.
        """
        for last in (False, True):
            if self._token is None:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
                self._token = self._send("PUT", "/latest/api/token", headers)
            try:
                return self._send("GET", f"/latest/meta-data/{item}", {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == HTTPStatus.NOT_FOUND:
                    return None
                if last or error.code != HTTPStatus.UNAUTHORIZED:
                    raise
                self._token = None  # it has expired
        raise AssertionError  # the last pass returns or raises

    def _send(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(self._base + path, method=method, headers=headers)  # noqa: S310 - see _METADATA
        try:
            with self._opener.open(request, timeout=_METADATA_TIMEOUT) as answer:
                text: bytes = answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"the answer breaks off or is none ({type(error).__name__})") from error
        return text.decode(errors="replace").strip()


class Ec2Protection:
    """The protection from scale-in of the EC2 instance that this process runs on.

    Only one process of an instance may have it: it is a property of the instance, and one that is idle would take it
    away from one that is not. The credentials are those of the instance's role, or of the environment.

    Args:
        drain_hook: name of a lifecycle hook of the group for instances that terminate, which keeps this one running
            until its worker has drained; None if there is none.
        endpoint: address of the API; None for that of the region.

    Raises:
        ModuleNotFoundError: `botocore` is not installed (when this module is imported).
    """

    def __init__(self, *, drain_hook: str | None = None, endpoint: str | None = None) -> None:
        self._drain_hook = drain_hook
        self._endpoint = endpoint
        self._metadata = InstanceMetadata()
        self._executor = DaemonThreadExecutor("forebay-metadata", max_threads=1)
        self._client: AwsClient | None = None
        self._lock: socket.socket | None = None
        self._instance_id = self._group = ""
        self._heartbeat = 3600.0  # seconds that the hook waits for a sign of life
        self._knows_nothing = False

    @property
    def name(self) -> str:
        """``"ec2:"`` and the instance."""
        return f"ec2:{self._instance_id or 'this instance'}"

    async def open(self) -> None:
        """Learn which instance this is, and take the right to protect it.

        Raises:
            ScalingFailed: it is none, or another process protects it; the message says why.
        """
        try:
            self._instance_id = await self._read_metadata("instance-id") or ""
            region = await self._read_metadata("placement/region")
        except OSError as error:
            why = f"there is no metadata service ({type(error).__name__}); in a container its hop limit must be 2"
            raise ScalingFailed(what=self.name, why=f"{why}. Without an EC2 instance, leave --protect out") from error
        self._lock = _lock(self.name)
        self._client = AwsClient(self.name, region=region, endpoint=self._endpoint)
        await self._client.open()

    async def wait_until_in_service(self) -> None:
        """Return when the instance is in service, or leaves. One in a warm pool waits until it is wanted.

        Raises:
            ScalingFailed: it is in no group, the group lacks the hook, or that cannot be read; the message says why.
        """
        client = self._opened()
        state = await self._state()
        while state is not None and state.startswith(_NOT_YET):
            await asyncio.sleep(_PENDING_INTERVAL)
            state = await self._state()
        if state is None:
            raise ScalingFailed(what=self.name, why="it is in no Auto Scaling group: leave --protect out")
        if self._drain_hook is not None:
            self._heartbeat = await find_hook(client, self.name, self._group, self._drain_hook)

    async def close(self) -> None:
        """Disconnect; the protection stays as it is."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()
        self._executor.shutdown()

    async def protect(self) -> bool:
        """Protect the instance. Return False if it is leaving the group: then nothing keeps it.

        Raises:
            ScalingFailed: the service rejects it, or does not say. It may have done it, or do it yet.
        """
        try:
            await self._set_protection(on=True)
        except ScalingFailed:
            if _is_leaving(await self._state()):
                return False
            raise
        return True

    async def unprotect(self) -> None:
        """Let the group choose this instance when it removes instances.

        Raises:
            ScalingFailed: the service rejects it, or does not say. It may have done it, or do it yet.
        """
        await self._set_protection(on=False)

    async def is_leaving(self) -> bool:
        """Return whether the instance is to leave the group, as far as its metadata says. This calls no API."""
        try:
            target = await self._read_metadata("autoscaling/target-lifecycle-state")
        except OSError as error:
            if not self._knows_nothing:
                log.warning("%s: its metadata cannot be read (%s)", self.name, type(error).__name__)
            self._knows_nothing = True
            return False
        self._knows_nothing = False
        return target is not None and target.startswith(_LEAVING_TARGETS)

    async def keep_waiting(self) -> None:
        """Have the lifecycle hook keep the instance, until this is cancelled: for 100 of its time-outs at most."""
        while self._drain_hook is not None:
            await asyncio.sleep(self._heartbeat / 3)
            await self._tell_hook("RecordLifecycleActionHeartbeat")

    async def complete(self) -> None:
        """Let an instance that is leaving go on: the worker has drained."""
        if self._drain_hook is not None:
            await self._tell_hook("CompleteLifecycleAction", LifecycleActionResult="CONTINUE")

    # --- calls ---

    async def _set_protection(self, *, on: bool) -> None:
        await self._call("SetInstanceProtection", InstanceIds=[self._instance_id], ProtectedFromScaleIn=on)

    async def _tell_hook(self, operation: str, **parameters: Any) -> None:
        """Tell the lifecycle hook something. A failure is logged: the hook has a time limit of its own."""
        try:
            await self._call(operation, LifecycleHookName=self._drain_hook, InstanceId=self._instance_id, **parameters)
        except ScalingFailed as error:
            log.warning("%s", error)

    async def _call(self, operation: str, **parameters: Any) -> Any:
        return await self._opened().call(operation, AutoScalingGroupName=self._group, **parameters)

    async def _state(self) -> str | None:
        """Return the state of the instance in its group; None if it is in none."""
        answer = await self._opened().call("DescribeAutoScalingInstances", InstanceIds=[self._instance_id])
        for each in answer.get("AutoScalingInstances", ()):
            self._group = str(each["AutoScalingGroupName"])
            return str(each["LifecycleState"])
        return None

    def _opened(self) -> AwsClient:
        if self._client is None:
            raise ScalingFailed(what=self.name, why="it is not open: use it between open() and close()")
        return self._client

    async def _read_metadata(self, item: str) -> str | None:
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(self._metadata.read, item))


def _is_leaving(state: str | None) -> bool:
    return state is None or state.startswith(_LEAVING_STATES)


def _lock(name: str) -> socket.socket | None:
    """Take the right to protect an instance for this process, until it ends. Only Linux has names for that."""
    if sys.platform != "linux":
        return None
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(f"\0forebay-protect-{name}")
    except OSError as error:
        lock.close()
        why = "another worker process protects it already: run one, with more slots, or the others without --protect"
        raise ScalingFailed(what=name, why=why) from error
    return lock
