"""The connection to a Kubernetes API server, as `lightkube` configures it: the one module that imports it.

Configuration and credentials are those of `lightkube` (kubeconfig, the service account of a pod, exec plugins, tokens
that change). The requests are plain HTTP by the client that it makes: a watch of `lightkube` itself follows the one
before at once, even on a stream that was empty, and its errors need a Content-Type, which a proxy may leave out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

import httpx2
from lightkube import ConfigError, KubeConfig
from lightkube.config.client_adapter import AsyncClient, ConnectionParams, ExecAuth
from lightkube.config.kubeconfig import SingleConfig
from lightkube.config.models import User


class Response(NamedTuple):
    """The answer of the server to one request."""

    status: int
    reason: str
    headers: Mapping[str, str]
    content: bytes


class _PluginAuth(httpx2.Auth):
    """The token of an exec plugin. That of `lightkube` leaves a plugin running when its request is given up."""

    def __init__(self, auth: ExecAuth) -> None:
        self._exec = auth._exec  # noqa: SLF001 - lightkube has no other way to it
        self._token: str | None = None

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """Send a request with the token; with a new one if there is none, or it has expired."""
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
            response = yield request
            if response.status_code != HTTPStatus.UNAUTHORIZED:
                return
        self._token = await self._ask()
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request

    async def _ask(self) -> str:
        plugin = await asyncio.create_subprocess_exec(
            self._exec.command,
            *(self._exec.args or ()),
            env={**os.environ, **{each.name: each.value for each in self._exec.env or ()}},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # a secret may be in it
            start_new_session=True,
        )
        try:
            output, _ = await plugin.communicate()
        finally:
            if plugin.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(plugin.pid, signal.SIGKILL)
                await plugin.wait()  # soon; the event loop may be closed after that
        if plugin.returncode:
            raise ValueError(f"the plugin {self._exec.command} has ended with {plugin.returncode}: run it by hand")
        try:
            return str(json.loads(output)["status"]["token"])
        except (ValueError, LookupError, TypeError) as error:
            what = f"the plugin {self._exec.command} gives no token ({type(error).__name__})"
            raise ValueError(f"{what}; certificates of plugins are not supported") from error


class KubernetesClient:
    """Connections to one API server.

    Args:
        config: the server and the credentials.
        timeout: seconds that each part of a request may take.
        transport: a transport of `httpx2`; None for its own.

    Raises:
        Others: what `lightkube` raises if the configuration is invalid. It reads files, so it blocks.
    """

    def __init__(
        self,
        config: SingleConfig,
        *,
        timeout: float = 10.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.namespace = config.namespace
        self._timeout = timeout
        if config.user is None:  # as in front of `kubectl proxy`
            config = config._replace(user=User())
        parameters = ConnectionParams(httpx2.Timeout(timeout), transport=transport)  # type: ignore[arg-type]
        self._client = AsyncClient(config, parameters)
        if isinstance(self._client.auth, ExecAuth):
            self._client.auth = _PluginAuth(self._client.auth)
        self._pods = httpx2.AsyncClient(trust_env=False, transport=transport)

    async def request(
        self, method: str, path: str, *, params: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> Response:
        """Return the answer to a request, whatever its status.

        Raises:
            ConnectionError: there is no answer.
        """
        with _connection_errors():
            response = await self._client.request(method, path, params=dict(params), json=body)
        return _response(response)

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, *, params: Mapping[str, str]
    ) -> AsyncIterator[tuple[Response, AsyncIterator[str]]]:
        """Open a stream of lines; the response has a content only if it is an error.

        Raises:
            ConnectionError: there is no answer, or it breaks off; it may be silent for any time.
        """
        timeout = httpx2.Timeout(self._timeout, read=None)
        with _connection_errors():
            async with self._client.stream("GET", path, params=dict(params), timeout=timeout) as response:
                if not response.is_success:
                    await response.aread()
                yield _response(response), response.aiter_lines()

    async def fetch(self, url: str) -> Response:
        """Return the answer of a pod at `url`, without credentials.

        Raises:
            ConnectionError: there is no answer.
        """
        with _connection_errors():
            response = await self._pods.get(url)
        return _response(response)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._pods.aclose()


def connect(context: str | None, timeout: float) -> KubernetesClient:
    """Return the client of the environment: of KUBECONFIG, of the pod that this runs in, or of ``~/.kube/config``.

    It reads files, so it blocks.

    Args:
        context: of the file; None for its current one.
        timeout: seconds that each part of a request may take.

    Raises:
        Others: there is none, or it is invalid.
    """
    if path := os.environ.get("KUBECONFIG"):
        files = [each for each in path.split(os.pathsep) if each]
        if len(files) != 1:
            raise ValueError(f"KUBECONFIG names {len(files)} files; merge them into one")
        found = KubeConfig.from_file(files[0])
    else:
        found = KubeConfig.from_env()
    config = found.get(context)
    if config is None:
        raise ValueError("it has no current context")
    return KubernetesClient(config, timeout=timeout)


def client_of(url: str, *, namespace: str = "default", **settings: Any) -> KubernetesClient:
    """Return the client of a server that needs no credentials, such as ``kubectl proxy``."""
    config = KubeConfig.from_server(url, namespace).get()
    assert config is not None  # noqa: S101 - it has been made with a context
    return KubernetesClient(config, **settings)


def _response(response: httpx2.Response) -> Response:
    content = b"" if response.is_success and not response.is_closed else response.content
    return Response(response.status_code, response.reason_phrase, response.headers, content)


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    """Raise ConnectionError for errors of the libraries, of exec plugins and their output, and of files of tokens."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
        raise ConnectionError(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
    except (ConfigError, OSError, ValueError, KeyError) as error:
        raise ConnectionError(f"its credentials cannot be read: {type(error).__name__}: {error}") from error
