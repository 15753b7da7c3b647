"""The APIs of EC2 and its Auto Scaling, with failures in words. It needs botocore, and is imported when it is used."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any, Final

from forebay._threads import DaemonThreadExecutor
from forebay.errors import ScalingFailed
from forebay.storage import aws

_READ_TIMEOUT: Final = 5  # seconds
_ATTEMPTS: Final = 3  # 24 s and the pauses between them: less than an autoscaler gives to a call
_DENIED: Final = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation")
_BAD_CREDENTIALS: Final = (
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
    "AuthFailure",
)


class _GivenUp(Exception):
    """Nobody waits for the answer to a call any more."""


class AwsClient:
    """The calls of one service, each of them in the order in which it was made.

    They block, and run in one thread: so a call that was given up, and that the service may yet carry out, is over
    before the next one begins. One that is throttled, or answered with a 5xx, is repeated twice; not once it was given
    up, as at the end of a lease: what it asks for may be out of date by then.

    Args:
        what: names whatever uses it, in errors.
        service: ``"autoscaling"`` or ``"ec2"``.
        region: None for that of the environment or the profile.
        endpoint: the address of the service; None for that of the region.
    """

    def __init__(self, what: str, service: str = "autoscaling", *, region: str | None, endpoint: str | None) -> None:
        self._what = what
        self._service = service
        self._region = region
        self._endpoint = endpoint
        self._executor: DaemonThreadExecutor | None = None
        self._client: Any = None
        self._given_up = threading.Event()  # of the call that the thread makes

    async def open(self) -> None:
        """Make the client. It does not connect yet.

        Raises:
            ScalingFailed: there is no region, or the configuration is invalid.
        """
        self._executor = DaemonThreadExecutor("forebay-ec2", max_threads=1)
        self._client = await self._run("", self._connect)

    def _connect(self) -> Any:
        client = aws.create_client(
            self._service,
            region=self._region,
            endpoint=self._endpoint,
            connections=1,
            read_timeout=_READ_TIMEOUT,
            attempts=_ATTEMPTS,
        )
        client.meta.events.register("before-send", self._check_wanted)  # it comes before each attempt
        return client

    def _check_wanted(self, **_: Any) -> None:
        if self._given_up.is_set():
            raise _GivenUp

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        client, self._client = self._client, None
        executor, self._executor = self._executor, None
        if client is not None:
            client.close()
        if executor is not None:
            executor.shutdown()

    async def call(self, operation: str, **parameters: Any) -> Any:
        """Return the answer of the service to an operation, such as ``"SetDesiredCapacity"``.

        Raises:
            ScalingFailed: it has not done it, or does not say; the message says why, such as the right that is missing.
        """
        if self._client is None:
            raise ScalingFailed(what=self._what, why="it is not open: use it between open() and close()")
        given_up = threading.Event()
        try:
            return await self._run(operation, partial(self._client_call, self._client, operation, parameters, given_up))
        finally:
            given_up.set()  # it matters if this was cancelled

    def _client_call(self, client: Any, operation: str, parameters: Any, given_up: threading.Event) -> Any:
        self._given_up = given_up
        self._check_wanted()
        name = "".join(f"_{each.lower()}" if each.isupper() else each for each in operation).removeprefix("_")
        return getattr(client, name)(**parameters)

    async def _run(self, operation: str, work: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except aws.FAILURES as error:
            raise ScalingFailed(what=self._what, why=self._why(operation, error)) from error

    def _why(self, operation: str, error: Exception) -> str:
        """Return why an operation failed, and what to do."""
        code = aws.error_code(error)
        if code is None:
            why, advice = aws.failure_in_words(error, setting="the target")
            return f"{why}. {advice}".removesuffix(".")
        if code in _DENIED:
            return f"its credentials may not call {self._service}:{operation}: allow it in their IAM policy"
        if code in _BAD_CREDENTIALS:
            return f"the service rejects its credentials ({code}): renew them, and check the clock of this machine"
        response: Any = getattr(error, "response", {})
        return f"{operation} was answered with {code}: {response.get('Error', {}).get('Message') or 'no reason given'}"
