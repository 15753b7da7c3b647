"""The API server of a Kubernetes cluster: requests with time limits, retries, and errors in words.

Configuration and credentials are those of `lightkube` (KUBECONFIG, the service account of a pod, exec plugins, tokens
that change). The requests are plain HTTP by its client: a watch of `lightkube` begins again without a pause when a
stream ends at once, and its errors need a Content-Type, which a proxy before the server may leave out.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import httpx2
from lightkube import ConfigError, KubeConfig
from lightkube.config.client_adapter import AsyncClient, ConnectionParams
from lightkube.config.kubeconfig import SingleConfig
from lightkube.config.models import User

from forebay import clock
from forebay.errors import ScalingFailed
from forebay.retry import Retry

_ATTEMPTS: Final = 4
_BACKOFF: Final = Retry(base_delay=0.25, max_delay=4.0)
_MAX_PAUSE: Final = 8.0  # seconds that a request waits for a Retry-After; a longer one is left to the caller
_WATCH: Final = 120  # seconds after which the server ends a watch, so that a dead connection is noticed
_SHORT_WATCH: Final = 1.0  # a watch that has ended sooner is begun again later
_PASSING: Final = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, *(each for each in HTTPStatus if each >= 500)}  # noqa: PLR2004
)
_MAX_SHOWN: Final = 300  # characters of a message of the server


class Access(NamedTuple):
    """A right that a request needs, and its object."""

    verb: str
    resource: str  # such as "deployments/scale"
    name: str = ""


class Rejected(Exception):  # noqa: N818 - it is caught, and told in words
    """The server has rejected a request for good, with a status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Passing(Exception):  # noqa: N818
    """A request has failed as it may not fail the next time."""

    def __init__(self, why: str, retry_after: float | None = None) -> None:
        super().__init__(why)
        self.retry_after = retry_after


class KubernetesApi:
    """The API server of a cluster.

    Args:
        context: a context of the kubeconfig; None for its current one.
        namespace: of all objects; None for that of the context, or of the pod.
        timeout: seconds that one request may take.
        config: a configuration of `lightkube`; None for the file that KUBECONFIG names, then that of the pod, then
            ``~/.kube/config``.
        transport: a transport of `httpx2` for the requests; None for its own.
    """

    def __init__(
        self,
        *,
        context: str | None = None,
        namespace: str | None = None,
        timeout: float = 10.0,  # noqa: ASYNC109 - of each request
        config: SingleConfig | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._context = context
        self._namespace = namespace
        self._timeout = timeout
        self._config = config
        self._transport = transport
        self._client: httpx2.AsyncClient | None = None
        self._not_before = 0.0  # loop time until which the server wants no request

    @property
    def namespace(self) -> str:
        """The namespace of all objects."""
        return self._namespace or (self._config.namespace if self._config is not None else "default")

    async def open(self) -> None:
        """Read the configuration; the server is not asked yet.

        Raises:
            ScalingFailed: the configuration cannot be used.
        """
        if self._client is None:
            self._client = await asyncio.get_running_loop().run_in_executor(None, self._connect)

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _connect(self) -> httpx2.AsyncClient:
        """Return a client. It reads files, so it blocks."""
        try:
            config = self._config = self._config or _find_config(self._context)
            if config.user is None:  # as in front of `kubectl proxy`
                config = config._replace(user=User())
            timeout = httpx2.Timeout(self._timeout)
            client: httpx2.AsyncClient = AsyncClient(config, ConnectionParams(timeout, transport=self._transport))
        except Exception as error:
            why = f"the configuration of Kubernetes cannot be used ({type(error).__name__}: {error})"
            advice = "set KUBECONFIG to a file that kubectl accepts, or run in a pod with a service account"
            raise ScalingFailed(what="Kubernetes", why=f"{why}; {advice}") from error
        return client

    async def request(  # noqa: PLR0913 - the parts of a request
        self,
        access: Access,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the answer to a request, which may be sent again: it must not do harm twice.

        Raises:
            Rejected: the server has answered with a status that another attempt would not change; 409 for a conflict.
            ScalingFailed: it does not answer, or only that it cannot now.
        """
        loop = asyncio.get_running_loop()
        for attempt in range(1, _ATTEMPTS + 1):
            if (pause := self._not_before - loop.time()) > 0:
                if pause > _MAX_PAUSE:
                    why = f"the API server wants no request for {pause:.0f} s more"
                    raise ScalingFailed(what=self._what(access), why=why)
                await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(self._timeout):
                    return await self._send(access, method, path, params or {}, body)
            except (_Passing, TimeoutError) as error:
                why = str(error) or f"the API server did not answer within {self._timeout:g} s"
                retry_after = error.retry_after if isinstance(error, _Passing) else None
                if attempt == _ATTEMPTS:
                    raise ScalingFailed(what=self._what(access), why=why) from error
                delay = _BACKOFF.delay(attempt, draw=clock.draw()) or 0.0
                if retry_after is None:
                    await asyncio.sleep(delay)
                else:
                    self._not_before = max(self._not_before, loop.time() + retry_after + delay)
        raise AssertionError  # the last attempt returns or raises

    async def watch(self, access: Access, path: str, params: Mapping[str, str]) -> AsyncIterator[tuple[str, Any]]:
        """Yield the events of one watch, type and object, until the server ends it, or it is cut off.

        After one that ended at once it pauses for a second, so that the next one does not follow at once.

        Raises:
            Rejected: the server rejects it: 410 if it no longer knows the changes since the version in `params`.
            ScalingFailed: it does not answer.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        query = {**params, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(_WATCH)}
        timeout = httpx2.Timeout(self._timeout, read=_WATCH + self._timeout)
        try:
            async with self._open_client().stream("GET", path, params=query, timeout=timeout) as response:
                if response.is_error:
                    await response.aread()
                    _check(response, self._what(access))
                async for line in response.aiter_lines():
                    if line:
                        yield _event(line)
        except _Passing as error:
            raise ScalingFailed(what=self._what(access), why=str(error)) from error
        except (httpx2.HTTPError, ConfigError, OSError) as error:
            why = f"the watch is lost ({type(error).__name__}: {error})"
            raise ScalingFailed(what=self._what(access), why=why) from error
        if loop.time() - begun < _SHORT_WATCH:
            await asyncio.sleep(_SHORT_WATCH)

    def explain(self, access: Access, error: Rejected) -> ScalingFailed:
        """Return the error, in words, of a request that was rejected: which right is missing, or which object."""
        match error.status:
            case HTTPStatus.UNAUTHORIZED:
                why = f"the API server does not accept the credentials (401: {error})"
            case HTTPStatus.FORBIDDEN:
                why = f"the right is missing: give the service account the verb {access.verb!r} on {access.resource!r}"
                why = f"{why} ({error})"
            case HTTPStatus.NOT_FOUND:
                why = f"there is no such object ({error})"
            case _:
                why = f"the API server has answered {error.status}: {error}"
        return ScalingFailed(what=self._what(access), why=why)

    # --- one request ---

    async def _send(
        self, access: Access, method: str, path: str, params: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> Any:
        try:
            response = await self._open_client().request(method, path, params=dict(params), json=body)
        except (httpx2.HTTPError, ConfigError, OSError) as error:  # the latter of exec plugins and files of tokens
            raise _Passing(f"the API server cannot be reached ({type(error).__name__}: {error})") from error
        _check(response, self._what(access))
        try:
            return response.json()
        except ValueError as error:
            raise _Passing("the API server has answered with something that is not JSON") from error

    def _open_client(self) -> httpx2.AsyncClient:
        if self._client is None:
            raise RuntimeError("the API server is used before open(), or after close()")
        return self._client

    def _what(self, access: Access) -> str:
        name = f"/{access.name}" if access.name else ""
        return f"{access.resource}{name} in the namespace {self.namespace}"


def _find_config(context: str | None) -> SingleConfig:
    """Return the configuration of the environment."""
    if path := os.environ.get("KUBECONFIG"):
        files = [each for each in path.split(os.pathsep) if each]
        if len(files) > 1:
            raise ValueError(f"KUBECONFIG names {len(files)} files; merge them into one")
        found = KubeConfig.from_file(files[0])
    else:
        found = KubeConfig.from_env()
    config = found.get(context)
    if config is None:
        raise ValueError("it has no context")
    return config


def _check(response: httpx2.Response, what: str) -> None:
    """Raise what the status of a response means, unless it is a success."""
    if response.is_success:
        return
    why = _message(response)
    if response.status_code in _PASSING:
        raise _Passing(f"the API server has answered {response.status_code}: {why}", _retry_after(response))
    if response.is_redirect:
        why = f"{what} has moved, which no API server says: check its address"
    raise Rejected(response.status_code, why)


def _message(response: httpx2.Response) -> str:
    """Return what the server says: the message of its Status, or the reason of the status code."""
    try:
        message = json.loads(response.content)["message"]
    except (ValueError, LookupError, TypeError):
        message = None
    return str(message or response.reason_phrase)[:_MAX_SHOWN]


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds of a Retry-After, which Kubernetes gives as a whole number."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else None


def _event(line: str) -> tuple[str, Any]:
    try:
        event = json.loads(line)
        kind, found = event["type"], event["object"]
        if kind != "ERROR":
            return kind, found
        status, why = int(found.get("code", 500)), str(found.get("message", ""))[:_MAX_SHOWN]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Passing("a line of the watch cannot be read") from error
    if status in _PASSING:
        raise _Passing(f"the watch has ended with {status}: {why}")
    raise Rejected(status, why)


def config_at(url: str, namespace: str | None = None) -> SingleConfig:
    """Return the configuration of a server without credentials, such as ``kubectl proxy``."""
    config = KubeConfig.from_server(url, namespace).get()
    assert config is not None  # noqa: S101 - it was made with a context
    return config


