"""Requests to a Kubernetes API server, with time limits and retries, and with errors in words."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from forebay import clock
from forebay._validate import check_name, check_positive, reject
from forebay.errors import ScalingFailed, StoreNotInstalled
from forebay.retry import Retry

if TYPE_CHECKING:
    from forebay.scale.kubernetes_client import KubernetesClient, Response

_ATTEMPTS: Final = 4
_BACKOFF: Final = Retry(base_delay=0.25, max_delay=4.0)
_MAX_PAUSE: Final = 8.0  # seconds that a request waits for a Retry-After; a longer one is left to the caller
_MAX_RETRY_AFTER: Final = 60.0  # seconds for which no request is sent at all; then the server is asked how it is
WATCH: Final = 120  # seconds after which the server ends a watch; one that lasts longer is dead
_SHORT_WATCH: Final = 1.0  # seconds; after a watch that has ended sooner there is a pause
_PASSING: Final = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})  # and 500 to 599
_NAME: Final = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_MAX_SHOWN: Final = 300  # characters of a message of the server


def check_object_name(owner: str, name: str, value: object) -> None:
    """Check that `value` may be the name of an object or a namespace.

    Raises:
        InvalidSetting: it may not.
    """
    if not (isinstance(value, str) and _NAME.fullmatch(value)):
        reject(owner, name, value, "a name of Kubernetes: a-z, 0-9, - and ., up to 253 of them")


class Access(NamedTuple):
    """A right that a request needs, and the object that it is about."""

    verb: str
    resource: str  # such as "deployments/scale"
    name: str = ""


class Rejected(Exception):
    """The server has rejected a request for good."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Passing(Exception):
    """A request has failed as it need not fail the next time."""

    def __init__(self, why: str, retry_after: float | None = None) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class KubernetesApi:
    """The API server of a cluster, for the objects of one namespace.

    Args:
        owner: the class or command that has the settings, for errors.
        context: a context of the kubeconfig; None for its current one.
        namespace: of all objects; None for that of the context, or of the pod.
        timeout: seconds that one request may take.
        client: a client of the server, which is closed with this; None for that of the environment.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    def __init__(
        self,
        owner: str = "KubernetesApi",
        *,
        context: str | None = None,
        namespace: str | None = None,
        timeout: float = 10.0,
        client: KubernetesClient | None = None,
    ) -> None:
        if context is not None:
            check_name(owner, "context", context)
        if namespace is not None:
            check_object_name(owner, "namespace", namespace)
        check_positive(owner, "timeout", timeout, unit="seconds")
        self._owner = owner
        self._context = context
        self._namespace = namespace
        self._timeout = timeout
        self._client = client
        self._not_before = 0.0  # loop time until which the server wants no request

    @property
    def namespace(self) -> str:
        """The namespace of all objects; known when it is open."""
        return self._namespace or self._open_client().namespace

    async def open(self) -> None:
        """Read the configuration; the server is not asked yet.

        Raises:
            StoreNotInstalled: `lightkube` is not installed.
            ScalingFailed: the configuration cannot be used.
        """
        self._not_before = 0.0  # another loop may have another clock
        if self._client is None:
            self._client = await asyncio.get_running_loop().run_in_executor(None, self._connect)

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _connect(self) -> KubernetesClient:
        try:
            from forebay.scale.kubernetes_client import connect  # noqa: PLC0415 - it needs a library
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("lightkube", "httpx2"):
                raise
            raise StoreNotInstalled(where=self._owner, library="lightkube", extra="kubernetes") from None
        try:
            return connect(self._context, self._timeout)
        except Exception as error:
            advice = "set KUBECONFIG to a file that kubectl accepts, or run in a pod with a service account"
            what = " ".join(f"{type(error).__name__}: {error}".split())
            why = f"its configuration is missing or invalid ({what}); {advice}"
            raise ScalingFailed(what="Kubernetes", why=why) from error

    async def request(
        self,
        access: Access,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the answer to a request. It may be sent more than once, so it must do no harm twice.

        Raises:
            Rejected: the server has answered with a status that another attempt would not change, such as 409.
            ScalingFailed: it does not answer, or cannot do it now.
        """
        loop = asyncio.get_running_loop()
        for attempt in range(1, _ATTEMPTS + 1):
            if (pause := self._not_before - loop.time()) > 0:
                if pause > _MAX_PAUSE:
                    why = f"the API server has asked for a pause of {pause:.0f} s more"
                    raise ScalingFailed(what=self._what(access), why=why)
                await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(self._timeout):
                    return await self._send(method, path, params or {}, body)
            except TimeoutError:
                failure = _Passing(f"the API server did not answer within {self._timeout:g} s")
            except _Passing as error:
                failure = error
            delay = _BACKOFF.delay(attempt, draw=clock.draw()) or 0.0
            if failure.retry_after is not None:
                self._not_before = max(self._not_before, loop.time() + failure.retry_after + delay)
            if attempt == _ATTEMPTS:
                raise ScalingFailed(what=self._what(access), why=str(failure)) from failure
            if failure.retry_after is None:
                await asyncio.sleep(delay)
        raise AssertionError  # the last attempt returns or raises

    async def watch(self, access: Access, path: str, params: Mapping[str, str]) -> AsyncGenerator[tuple[str, Any]]:
        """Yield the events of one watch, type and object, until the server ends it.

        That is after `WATCH` seconds; the caller has to notice that a connection is dead. If it was at once, this
        pauses for a second at the end, so that the next watch does not follow at once.

        Raises:
            Rejected: the server rejects it: 410 if it no longer knows the changes since the version in `params`.
            ScalingFailed: it does not answer, or the watch has broken off.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        query = {**params, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH)}
        try:
            async with self._open_client().stream(path, params=query) as (response, lines):
                _check(response)
                async for line in lines:
                    if line:
                        yield _event(line)
        except (_Passing, ConnectionError) as error:
            raise ScalingFailed(what=self._what(access), why=f"the watch is lost ({error})") from error
        if loop.time() - begun < _SHORT_WATCH:
            await asyncio.sleep(_SHORT_WATCH)

    async def fetch(self, url: str, *, timeout: float) -> bytes:  # noqa: ASYNC109 - of the whole request
        """Return what a pod answers at `url`; the credentials are not sent to it.

        Raises:
            ConnectionError: it does not answer, or not with 200.
            TimeoutError: it does not answer in time.
        """
        async with asyncio.timeout(timeout):
            response = await self._open_client().fetch(url)
        if response.status != HTTPStatus.OK:
            raise ConnectionError(f"{url} has answered {response.status}")
        return response.content

    def explain(self, access: Access, error: Rejected) -> ScalingFailed:
        """Return the error in words for a request that was rejected: which right is missing, or which object."""
        match error.status:
            case HTTPStatus.UNAUTHORIZED:
                why = f"the API server does not accept the credentials (401: {error})"
            case HTTPStatus.FORBIDDEN:
                right = f"the verb {access.verb!r} on {access.resource!r}"
                why = f"a right is missing: give the Role of this service account {right} (403: {error})"
            case HTTPStatus.NOT_FOUND:
                why = f"there is no such object (404: {error})"
            case _:
                why = f"the API server has answered {error.status}: {error}"
        return ScalingFailed(what=self._what(access), why=why)

    async def _send(self, method: str, path: str, params: Mapping[str, str], body: Mapping[str, Any] | None) -> Any:
        try:
            response = await self._open_client().request(method, path, params=params, body=body)
        except ConnectionError as error:
            raise _Passing(f"the API server cannot be reached ({error})") from error
        _check(response)
        try:
            return json.loads(response.content)
        except ValueError as error:
            raise _Passing("the API server has answered with something that is not JSON") from error

    def _open_client(self) -> KubernetesClient:
        if self._client is None:
            raise RuntimeError("the API server is used before open(), or after close()")
        return self._client

    def _what(self, access: Access) -> str:
        name = f"/{access.name}" if access.name else ""
        return f"{access.resource}{name} in namespace {self.namespace!r}"


def _check(response: Response) -> None:
    """Raise what the status of a response means, unless it is a success."""
    if HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
        return
    why = _message(response)
    if response.status in _PASSING or response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise _Passing(f"the API server has answered {response.status}: {why}", _retry_after(response))
    raise Rejected(response.status, why)


def _message(response: Response) -> str:
    """Return what the server says: the message of its Status, or else the reason of the status code."""
    try:
        message = json.loads(response.content)["message"]
    except (ValueError, LookupError, TypeError):
        message = None
    return str(message or response.reason)[:_MAX_SHOWN]


def _retry_after(response: Response) -> float | None:
    """Return the seconds of a Retry-After, which Kubernetes gives as a whole number; a minute at most."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), _MAX_RETRY_AFTER) if text.isascii() and text.isdigit() else None


def _event(line: str) -> tuple[str, Any]:
    """Return the type and the object of a line of a watch; raise what an error means."""
    try:
        event = json.loads(line)
        kind, found = event["type"], event["object"]
        if kind != "ERROR":
            return kind, found
        status, why = int(found["code"]), str(found.get("message", ""))[:_MAX_SHOWN]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Passing("one of its lines cannot be read") from error
    if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise _Passing(f"it has ended with {status}: {why}")
    raise Rejected(status, why)
