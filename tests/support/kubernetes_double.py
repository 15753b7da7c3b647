"""A double of a Kubernetes API server: workloads and their scale, pods, leases, watches, rights, and faults.

It keeps what the real one keeps: a version of each object, which a change must name if it names one at all; a log of
the changes, which watches follow and which is forgotten from the front; numbers that are left out if they are 0; rights
by verb, resource and name. `KubernetesTransport` has a client ask it without a socket, so in virtual time as well;
`serve` over real HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import httpx2
from aiohttp import web

NAMESPACE: Final = "agents"
_LATENCY: Final = 0.005  # seconds until a request arrives
_PATH: Final = re.compile(
    r"/api(?:s/(?P<group>[^/]+))?/v1/namespaces/(?P<namespace>[^/]+)/(?P<resource>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<subresource>[^/]+))?"
)
_KINDS: Final = {"deployments": "Deployment", "statefulsets": "StatefulSet", "leases": "Lease", "pods": "Pod"}
_GROUPS: Final = {"deployments": "apps", "statefulsets": "apps", "leases": "coordination.k8s.io", "pods": ""}


class Cut(Exception):
    """The connection breaks."""


@dataclass
class Request:
    """One request, as the server understands it."""

    verb: str
    resource: str  # with its subresource
    name: str
    namespace: str
    params: Mapping[str, str]
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


@dataclass
class Answer:
    """An answer: plain JSON, or a stream of lines."""

    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    lines: AsyncIterator[bytes] | None = None

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


Fault = Callable[[Request, Callable[[], Answer]], Answer | Awaitable[Answer]]


class KubernetesDouble:
    """The server.

    Attributes:
        requests: all of them.
        token: the bearer token that is accepted; None for any.
        rules: of a Role, which hold if there are any.
        start: seconds until a new pod is ready.
    """

    def __init__(self, *, start: float = 0.0) -> None:
        self.requests: list[Request] = []
        self.token: str | None = None
        self.rules: list[dict[str, Any]] | None = None
        self.start = start
        self.watchers = 0
        self._version = 100
        self._objects: dict[tuple[str, str], dict[str, Any]] = {}
        self._log: list[tuple[int, str, str, dict[str, Any]]] = []  # version, type, resource, object
        self._forgotten = 0  # the version up to which the log is
        self._faults: list[tuple[str, Fault]] = []
        self._changed = asyncio.Event()
        self._ended = 0  # watches that are to end, counted in rounds
        self._cut = False
        self._tasks: set[asyncio.TimerHandle] = set()

    # --- for tests ---

    def workload(self, name: str = "workers", *, resource: str = "deployments", replicas: int = 1) -> None:
        """Add a workload whose pods are ready."""
        labels = {"app": name}
        spec = {"replicas": replicas, "selector": {"matchLabels": labels}}
        self._put(resource, name, {"metadata": {"name": name}, "spec": spec, "status": {}}, "ADDED")
        self.set_ready(name, replicas, resource=resource)

    def pod(self, name: str, ip: str, *, ready: bool = True, going: bool = False, app: str = "workers") -> None:
        """Add a pod."""
        metadata: dict[str, Any] = {"name": name, "labels": {"app": app}}
        if going:
            metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        self._put("pods", name, {"metadata": metadata, "status": {"podIP": ip, "conditions": conditions}}, "ADDED")

    def get(self, resource: str, name: str) -> dict[str, Any]:
        """Return an object."""
        return self._objects[resource, name]

    def find(self, resource: str, name: str) -> dict[str, Any] | None:
        """Return an object, or None."""
        return self._objects.get((resource, name))

    def replicas(self, name: str = "workers", *, resource: str = "deployments") -> int:
        """Return how many replicas a workload has been asked for."""
        return int(self.get(resource, name)["spec"].get("replicas", 0))

    def set_replicas(self, replicas: int, name: str = "workers", *, resource: str = "deployments") -> None:
        """Scale a workload as somebody else."""
        found = copy.deepcopy(self.get(resource, name))
        if found["spec"].get("replicas", 0) == replicas:
            return
        found["spec"]["replicas"] = replicas
        self._put(resource, name, found, "MODIFIED")
        if self.start:
            loop = asyncio.get_running_loop()
            loop.call_later(self.start, lambda: self.set_ready(name, self.replicas(name, resource=resource)))
        else:
            self.set_ready(name, replicas, resource=resource)

    def set_ready(self, name: str, ready: int, *, resource: str = "deployments") -> None:
        """Set how many pods are ready. It changes the version of the workload, as on the real one."""
        found = copy.deepcopy(self.get(resource, name))
        found["status"] = {"readyReplicas": ready} if ready else {}
        self._put(resource, name, found, "MODIFIED")

    def touch(self, name: str = "workers", *, resource: str = "deployments") -> None:
        """Change the version of an object, and nothing else."""
        self._put(resource, name, copy.deepcopy(self.get(resource, name)), "MODIFIED")

    def remove(self, name: str = "workers", *, resource: str = "deployments") -> None:
        """Delete an object."""
        found = self._objects.pop((resource, name))
        self._record("DELETED", resource, found)

    def forget(self) -> None:
        """Forget the changes so far, so that a watch from before now is Gone."""
        self._forgotten = self._version

    def fail(self, request: str, fault: Fault, times: int = 1) -> None:
        """Have the next `times` requests of a kind, such as ``"update deployments/scale"``, meet a fault."""
        self._faults += [(request, fault)] * times

    def recover(self) -> None:
        """Have no request meet a fault any more."""
        self._faults.clear()

    def end_watches(self, *, cut: bool = False) -> None:
        """End all watches in an orderly way, or cut them."""
        self._ended += 1
        self._cut = cut
        self._changed.set()

    def count(self, request: str) -> int:
        """Return how many requests of a kind there were."""
        return sum(str(each) == request for each in self.requests)

    # --- requests ---

    async def handle(
        self, method: str, path: str, params: Mapping[str, str], body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        """Answer a request."""
        match = _PATH.fullmatch(path)
        if match is None or _GROUPS.get(match["resource"]) != (match["group"] or ""):
            return _status(404, "NotFound", f"the server could not find the requested resource {path}")
        verb = {"GET": "get", "PUT": "update", "POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]
        if verb == "get" and match["name"] is None:
            verb = "watch" if params.get("watch") == "true" else "list"
        resource = "/".join(filter(None, (match["resource"], match["subresource"])))
        request = Request(
            verb, resource, match["name"] or "", match["namespace"], params, json.loads(body) if body else None, headers
        )
        self.requests.append(request)
        for index, (kind, fault) in enumerate(self._faults):
            if kind == str(request):
                del self._faults[index]
                answer = fault(request, lambda: self._answer(request))
                return answer if isinstance(answer, Answer) else await answer
        return self._answer(request)

    def _answer(self, request: Request) -> Answer:
        if (refused := self._refuse(request)) is not None:
            return refused
        resource, _, subresource = request.resource.partition("/")
        found = self._objects.get((resource, request.name))
        if request.namespace != NAMESPACE or (request.name and found is None):
            return _status(404, "NotFound", f'{resource}.{_GROUPS[resource]} "{request.name}" not found')
        match request.verb:
            case "list":
                return self._list(resource, request)
            case "watch":
                return Answer(200, lines=self._follow(resource, int(request.params["resourceVersion"]), request.params))
            case "get":
                return Answer(200, _scale_of(found) if found and subresource == "scale" else found)
        change = {"create": self._create, "update": self._update}[request.verb]
        return change(resource, subresource, request)

    def _update(self, resource: str, subresource: str, request: Request) -> Answer:
        version = request.body["metadata"].get("resourceVersion")
        if version is not None and version != self.get(resource, request.name)["metadata"]["resourceVersion"]:
            why = "the object has been modified; please apply your changes to the latest version and try again"
            what = f'Operation cannot be fulfilled on {resource}.{_GROUPS[resource]} "{request.name}": {why}'
            return _status(409, "Conflict", what)
        if subresource == "scale":
            self.set_replicas(request.body["spec"].get("replicas", 0), request.name, resource=resource)
            return Answer(200, _scale_of(self.get(resource, request.name)))
        return Answer(200, self._put(resource, request.name, copy.deepcopy(request.body), "MODIFIED"))

    def _create(self, resource: str, _: str, request: Request) -> Answer:
        name = request.body["metadata"]["name"]
        if (resource, name) in self._objects:
            return _status(409, "AlreadyExists", f'{resource}.{_GROUPS[resource]} "{name}" already exists')
        return Answer(201, self._put(resource, name, copy.deepcopy(request.body), "ADDED"))

    def _refuse(self, request: Request) -> Answer | None:
        """Return 401 if its token is not known, and 403 if no rule allows a request."""
        if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized", "Unauthorized")
        if self.rules is None:
            return None
        resource = request.resource.partition("/")[0]
        name = request.name or _selected(request.params)
        for rule in self.rules:
            named = rule.get("resourceNames")
            if (
                _GROUPS[resource] in rule["apiGroups"]
                and request.resource in rule["resources"]
                and request.verb in rule["verbs"]
                and (not named or (request.verb != "create" and name in named))
            ):
                return None
        user = 'User "system:serviceaccount:agents:autoscaler"'
        what = f'cannot {request.verb} resource "{request.resource}" in API group "{_GROUPS[resource]}"'
        why = f'{resource}.{_GROUPS[resource]} is forbidden: {user} {what} in the namespace "{request.namespace}"'
        return _status(403, "Forbidden", why)

    # --- objects, and their changes ---

    def _put(self, resource: str, name: str, found: dict[str, Any], kind: str) -> dict[str, Any]:
        found = {"apiVersion": "v1", "kind": _KINDS[resource], **found}
        self._objects[resource, name] = found
        return self._record(kind, resource, found)

    def _record(self, kind: str, resource: str, found: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        found["metadata"] = {**found["metadata"], "namespace": NAMESPACE, "resourceVersion": str(self._version)}
        self._log.append((self._version, kind, resource, copy.deepcopy(found)))
        self._changed.set()
        return copy.deepcopy(found)

    def _list(self, resource: str, request: Request) -> Answer:
        items = [
            found for (kind, _), found in self._objects.items() if kind == resource and _matches(found, request.params)
        ]
        metadata = {"resourceVersion": str(self._version)}
        return Answer(200, {"kind": f"{_KINDS[resource]}List", "metadata": metadata, "items": copy.deepcopy(items)})

    async def _follow(self, resource: str, version: int, params: Mapping[str, str]) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        end = loop.time() + float(params.get("timeoutSeconds", 3600))
        ended = self._ended
        self.watchers += 1
        try:
            while loop.time() < end:
                if version < self._forgotten:
                    gone = _status(410, "Expired", f"too old resource version: {version} ({self._version})").body
                    yield _line("ERROR", gone)
                    return
                for at, kind, changed, found in self._log:
                    if at > version and changed == resource and _matches(found, params):
                        yield _line(kind, found)
                version = self._version
                if self._ended > ended:
                    if self._cut:
                        raise Cut
                    return
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(end, loop.time() + 60.0)):
                        await self._changed.wait()
                        continue
                yield _line("BOOKMARK", {"metadata": {"resourceVersion": str(version)}})
        finally:
            self.watchers -= 1


# --- faults ---


def answers(status: int, *, retry_after: int | None = None, body: Any = None) -> Fault:
    """Return the fault of a server that answers with a status; its reason may not even be JSON."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def fault(_: Request, __: Callable[[], Answer]) -> Answer:
        answer = _status(status, "Failure", f"failed with {status}") if body is None else Answer(status, body)
        return Answer(answer.status, answer.body, headers)

    return fault


def hangs(_: Request, __: Callable[[], Answer]) -> Awaitable[Answer]:
    """Never answer."""
    return _forever()


def cuts(_: Request, __: Callable[[], Answer]) -> Answer:
    """Cut the connection before anything was done."""
    raise Cut


def answer_lost(_: Request, answer: Callable[[], Answer]) -> Answer:
    """Do what was asked, and cut the connection."""
    answer()
    raise Cut


def after(event: asyncio.Event) -> Fault:
    """Return the fault of a request that reaches the server when `event` is set, even if its sender has gone."""

    async def fault(_: Request, answer: Callable[[], Answer]) -> Answer:
        return await asyncio.shield(asyncio.ensure_future(_late(event, answer)))

    return fault


def meanwhile(change: Callable[[], object]) -> Fault:
    """Return the fault that something happens just before the request is answered."""

    def fault(_: Request, answer: Callable[[], Answer]) -> Answer:
        change()
        return answer()

    return fault


async def _late(event: asyncio.Event, answer: Callable[[], Answer]) -> Answer:
    await event.wait()
    return answer()


async def _forever() -> Answer:
    await asyncio.Event().wait()
    raise AssertionError


# --- ways to reach it ---


class KubernetesTransport(httpx2.AsyncBaseTransport):
    """A transport of a client to a double, without a socket."""

    def __init__(self, double: KubernetesDouble) -> None:
        self.double = double
        self.plain: dict[str, bytes] = {}  # what pods answer, by URL
        self.asked: list[httpx2.Request] = []  # of pods
        self.cut_off = False

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer a request."""
        if self.cut_off:
            await _forever()
        if request.url.host != "kubernetes":
            self.asked.append(request)
            if (content := self.plain.get(str(request.url))) is None:
                raise httpx2.ConnectError("refused", request=request)
            return httpx2.Response(200, content=content)
        await asyncio.sleep(_LATENCY)
        try:
            answer = await self.double.handle(
                request.method, request.url.path, dict(request.url.params), request.content, request.headers
            )
        except Cut:
            raise httpx2.RemoteProtocolError("cut", request=request) from None
        if answer.lines is not None:
            return httpx2.Response(answer.status, headers=answer.headers, stream=_Lines(answer.lines, request))
        return httpx2.Response(answer.status, headers=answer.headers, content=answer.content)


class _Lines(httpx2.AsyncByteStream):
    def __init__(self, lines: AsyncIterator[bytes], request: httpx2.Request) -> None:
        self._lines = lines
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for line in self._lines:
                yield line
        except Cut:
            raise httpx2.RemoteProtocolError("cut", request=self._request) from None

    async def aclose(self) -> None:
        await self._lines.aclose()  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def serve(double: KubernetesDouble) -> AsyncIterator[str]:
    """Serve a double over HTTP on a free port of the loopback; yield its URL."""
    runner = web.AppRunner(_application(double), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _application(double: KubernetesDouble) -> web.Application:
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            answer = await double.handle(
                request.method, request.path, request.query, await request.read(), _lower(request.headers)
            )
        except Cut:
            return _abort(request, web.Response())
        if answer.lines is None:
            return web.Response(status=answer.status, headers=answer.headers, body=answer.content)
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        await response.prepare(request)
        try:
            async with contextlib.aclosing(answer.lines) as lines:  # type: ignore[type-var]
                async for line in lines:
                    await response.write(line)
        except Cut:
            return _abort(request, response)
        return response

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    return application


def _abort(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Break the connection, so that the response does not matter."""
    assert request.transport is not None
    request.transport.abort()
    return response


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


# --- parts of answers ---


def _status(code: int, reason: str, message: str) -> Answer:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason}
    return Answer(code, {**body, "code": code})


def _line(kind: str, found: Any) -> bytes:
    return json.dumps({"type": kind, "object": found}).encode() + b"\n"


def _scale_of(found: dict[str, Any]) -> dict[str, Any]:
    replicas = found["spec"].get("replicas", 0)
    labels = found["spec"]["selector"]["matchLabels"]
    selector = ",".join(f"{name}={value}" for name, value in labels.items())
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": found["metadata"],
        "spec": {"replicas": replicas} if replicas else {},  # which Kubernetes leaves out if it is 0
        "status": {"selector": selector, "replicas": replicas},
    }


def _selected(params: Mapping[str, str]) -> str:
    return params.get("fieldSelector", "").removeprefix("metadata.name=")


def _matches(found: Mapping[str, Any], params: Mapping[str, str]) -> bool:
    labels = found["metadata"].get("labels", {})
    wanted = _pairs(params.get("labelSelector", ""))
    return _selected(params) in ("", found["metadata"]["name"]) and all(
        labels.get(key) == value for key, value in wanted
    )


def _pairs(selector: str) -> Iterator[tuple[str, str]]:
    for part in filter(None, selector.split(",")):
        name, _, value = part.partition("=")
        yield name, value
