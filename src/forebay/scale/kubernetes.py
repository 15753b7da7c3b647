"""Pods as replicas: the scale of a Deployment or a StatefulSet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec

from forebay import clock
from forebay._cancellation import raise_own_cancellation
from forebay._validate import check_whole, reject
from forebay.errors import ScalingFailed
from forebay.events import log
from forebay.retry import Retry
from forebay.scale.kubernetes_api import WATCH, Access, KubernetesApi, Rejected, check_object_name
from forebay.scale.target import ReplicaReport, Replicas, sum_up

_OWNER: Final = "KubernetesTarget"
_PLURALS: Final = {"deployment": "deployments", "statefulset": "statefulsets"}
_CONFLICTS: Final = 5  # in a row, of one change: the status of a Deployment changes its version, too
_BACKOFF: Final = Retry(base_delay=0.5, max_delay=30.0)
_WATCH_GRACE: Final = 10.0  # seconds for which a watch may last longer than it should
_REPORT_INTERVAL: Final = 5.0  # seconds between two rounds of reports
_REPORT_TIMEOUT: Final = 2.0  # seconds that a pod may take to report
_MOST_LISTED: Final = 500  # pods, of which those that are asked are drawn
_MOST_ASKED: Final = 50  # pods in a round; of more, these are drawn


class _Scale:
    """The scale of a workload as it was read. Kubernetes leaves out a number that is 0.

    Attributes:
        replicas: how many it has been asked for.
        version: of the workload; a change is refused if it has another one by then.
        selector: of the pods, as a query.
    """

    def __init__(self, answer: Any) -> None:
        self.replicas = int((answer.get("spec") or {}).get("replicas", 0))
        self.version = str(answer["metadata"]["resourceVersion"])
        self.selector = str((answer.get("status") or {}).get("selector", ""))


class KubernetesTarget:
    """Pods of a Deployment or a StatefulSet, which run ``forebay worker`` on a shared overflow.

    It changes the number of replicas by the scale subresource and nothing else, and only if nobody has changed the
    workload since it was read. The pods that take tasks are watched. A pod that goes gets SIGTERM from Kubernetes, at
    which ``forebay worker`` drains: its ``terminationGracePeriodSeconds`` must be longer than its ``--drain-timeout``.
    Which pod goes is up to Kubernetes: the highest ordinal of a StatefulSet; of a Deployment one that is not ready, and
    else one of those that began last.

    Configuration and credentials: the file that KUBECONFIG names; else the service account of the pod that this runs
    in; else ``~/.kube/config``. Needs ``forebay[kubernetes]``.

    Args:
        workload: ``"deployment/NAME"`` or ``"statefulset/NAME"``.
        namespace: None for that of the context, or of the pod.
        context: a context of the kubeconfig; None for its current one.
        timeout: seconds that one request may take.
        report_port: port on which each pod reports what it is short of and how long its tasks take (``forebay worker
            --listen``); None if they do not. Without reports, no bottleneck of the pods is known: replicas are added
            while a quota that they share is used up.
        api: an API server that its owner opens and closes; None for one of its own.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    def __init__(  # noqa: PLR0913 - every property has a name
        self,
        workload: str,
        *,
        namespace: str | None = None,
        context: str | None = None,
        timeout: float = 10.0,
        report_port: int | None = None,
        api: KubernetesApi | None = None,
    ) -> None:
        kind, _, name = workload.partition("/") if isinstance(workload, str) else ("", "", "")
        if kind not in _PLURALS or not name:
            reject(_OWNER, "workload", workload, '"deployment/NAME" or "statefulset/NAME"')
        check_object_name(_OWNER, "workload", name)
        check_whole(_OWNER, "report_port", report_port, maximum=65_535, none="if the pods do not report")
        self._workload = workload
        self._plural, self._object = _PLURALS[kind], name
        self._report_port = report_port
        self._api = api or KubernetesApi(_OWNER, context=context, namespace=namespace, timeout=timeout)
        self._owns_api = api is None
        self._scale: _Scale | None = None
        self._ready = 0
        self._watching: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._reports: Sequence[ReplicaReport] = ()
        self._service: float | None = None  # as the pods reported it last, which counts while there are none

    @property
    def name(self) -> str:
        """``"kubernetes:"`` and the workload."""
        return f"kubernetes:{self._workload}"

    @property
    def outside(self) -> bool:
        """True: pods take tasks from the overflow."""
        return True

    async def open(self) -> None:
        """Connect, read the workload, and watch it.

        Raises:
            StoreNotInstalled: `lightkube` is not installed.
            ScalingFailed: it cannot be read; the message says why, such as the right that is missing.
        """
        await self._api.open()
        version = await self._list()
        self._scale = await self._read_scale()
        self._watching = asyncio.ensure_future(self._watch(version))
        if self._report_port is not None:
            self._reporting = asyncio.ensure_future(self._ask_pods(self._report_port))

    async def close(self) -> None:
        """End the watch and disconnect. The pods stay."""
        tasks = [task for task in (self._watching, self._reporting) if task is not None]
        self._watching = self._reporting = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._owns_api:
            await self._api.close()

    async def replicas(self) -> Replicas:
        """Return the replicas.

        Raises:
            ScalingFailed: the API server does not say.
        """
        self._scale = await self._read_scale()
        current = self._scale.replicas
        ready = min(self._ready, current)  # of a rolling update there are more
        summary = sum_up(current, self._reports)
        if summary.service is not None:
            self._service = summary.service
        return Replicas(current=current, ready=ready, limited_by=summary.limited_by, service=self._service)

    async def scale(self, replicas: int) -> None:
        """Ask for so many replicas, if there are still as many as at the last reading.

        Raises:
            ScalingFailed: there are others by now, so that it must be decided again; or the API server rejects it.
        """
        check_whole(_OWNER, "replicas", replicas, minimum=0)
        known = self._scale or await self._read_scale()
        for _ in range(_CONFLICTS):
            if known.replicas == replicas:
                self._scale = known
                return
            written = await self._write_scale(known, replicas)
            if written is not None:
                self._scale = written
                return
            before, known = known, await self._read_scale()
            self._scale = known
            if known.replicas not in (before.replicas, replicas):
                why = f"somebody else has changed its replicas from {before.replicas} to {known.replicas} meanwhile"
                raise ScalingFailed(what=self.name, why=f"{why}: decided again with the next reading")
        raise ScalingFailed(what=self.name, why=f"it has changed {_CONFLICTS} times while it was to be scaled")

    # --- the scale ---

    async def _read_scale(self) -> _Scale:
        answer = await self._request("get", f"{self._plural}/scale", self._object, "GET", self._path("scale"))
        return self._read(answer)

    async def _write_scale(self, known: _Scale, replicas: int) -> _Scale | None:
        """Return the new scale; None if the workload has changed since `known` was read."""
        body = {
            "apiVersion": "autoscaling/v1",
            "kind": "Scale",
            "metadata": {"name": self._object, "namespace": self._api.namespace, "resourceVersion": known.version},
            "spec": {"replicas": replicas},
        }
        answer = await self._request(
            "update", f"{self._plural}/scale", self._object, "PUT", self._path("scale"), body=body, conflict=True
        )
        return None if answer is None else self._read(answer)

    def _read(self, answer: Any) -> _Scale:
        try:
            return _Scale(answer)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"the API server has answered with something that is not a scale ({type(error).__name__})"
            raise ScalingFailed(what=self.name, why=why) from error

    async def _request(  # noqa: PLR0913 - the parts of a request
        self,
        verb: str,
        resource: str,
        name: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        conflict: bool = False,
    ) -> Any:
        """Return the answer to a request; None if there is a conflict, and `conflict`."""
        access = Access(verb, resource, name)
        try:
            return await self._api.request(access, method, path, params=params, body=body)
        except Rejected as error:
            if conflict and error.status == HTTPStatus.CONFLICT:
                return None
            raise self._api.explain(access, error) from error

    def _path(self, subresource: str = "") -> str:
        path = f"/apis/apps/v1/namespaces/{self._api.namespace}/{self._plural}"
        return f"{path}/{self._object}/{subresource}" if subresource else path

    # --- ready replicas ---

    @property
    def _only_this(self) -> dict[str, str]:
        return {"fieldSelector": f"metadata.name={self._object}"}

    async def _list(self) -> str:
        """Read the ready replicas from a list; return the version to watch from."""
        answer = await self._request("list", self._plural, self._object, "GET", self._path(), params=self._only_this)
        items = answer.get("items") or ()
        self._take(items[0] if items else {})
        return str((answer.get("metadata") or {}).get("resourceVersion", ""))

    def _take(self, workload: Mapping[str, Any]) -> None:
        self._ready = int((workload.get("status") or {}).get("readyReplicas", 0))

    async def _watch(self, version: str) -> None:
        """Keep the ready replicas up to date; a watch that is lost is begun again from a list."""
        failures, told = 0, False
        while True:
            try:
                if not version:
                    version = await self._list()
                version = await self._follow(version)
                failures, told = 0, False
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it is begun again
                raise_own_cancellation(error)
                version = ""
                failures += 1
                gone = isinstance(error, Rejected)  # that is the way of things, once
                if not told and (failures > 1 or not gone):
                    log.warning("%s: the watch is begun again (%s: %s)", self.name, type(error).__name__, error)
                    told = True
                await asyncio.sleep(_BACKOFF.delay(failures, draw=clock.draw()) or 0.0)

    async def _follow(self, version: str) -> str:
        """Take the changes of one watch in; return the version that it came to.

        Raises:
            Rejected: the server no longer knows the changes since `version`.
            ScalingFailed: the watch is rejected or lost.
            TimeoutError: it has not ended when it had to, so the connection is dead.
        """
        access = Access("watch", self._plural, self._object)
        params = {**self._only_this, "resourceVersion": version}
        watch = self._api.watch(access, self._path(), params)
        try:
            async with asyncio.timeout(WATCH + _WATCH_GRACE), contextlib.aclosing(watch) as events:
                async for kind, workload in events:
                    version = str(workload["metadata"]["resourceVersion"])
                    if kind in ("ADDED", "MODIFIED"):
                        self._take(workload)
                    elif kind == "DELETED":
                        self._take({})
        except Rejected as error:
            if error.status == HTTPStatus.GONE:
                raise
            raise self._api.explain(access, error) from error
        return version

    # --- reports ---

    async def _ask_pods(self, port: int) -> None:
        """Ask the pods for their reports, round by round."""
        failing = False
        while True:
            try:
                self._reports = await self._round(port)
                failing = False
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the next round may succeed
                raise_own_cancellation(error)
                self._reports = ()
                if not failing:
                    log.warning("%s: the pods cannot be asked for reports (%s)", self.name, error)
                failing = True
            await asyncio.sleep(_REPORT_INTERVAL)

    async def _round(self, port: int) -> Sequence[ReplicaReport]:
        selector = "" if self._scale is None else self._scale.selector
        if not selector:
            raise ScalingFailed(what=self.name, why="its scale names no selector of pods")
        answer = await self._request(
            "list", "pods", "", "GET", f"/api/v1/namespaces/{self._api.namespace}/pods",
            params={"labelSelector": selector, "limit": str(_MOST_LISTED)},
        )  # fmt: skip
        ips = sorted(filter(None, map(_ready_ip, answer.get("items") or ())), key=lambda _: clock.draw())
        asked = [self._report(ip, port) for ip in ips[:_MOST_ASKED]]
        return [report for report in await asyncio.gather(*asked) if report is not None]

    async def _report(self, ip: str, port: int) -> ReplicaReport | None:
        """Return the report of one pod; None if it does not answer, as while it goes."""
        host = f"[{ip}]" if ":" in ip else ip
        try:
            content = await self._api.fetch(f"http://{host}:{port}/report", timeout=_REPORT_TIMEOUT)
            return msgspec.json.decode(content, type=ReplicaReport)
        except (ConnectionError, TimeoutError, msgspec.DecodeError):
            return None


def _ready_ip(pod: Any) -> str | None:
    """Return the address of a pod that takes tasks."""
    metadata, status = pod.get("metadata") or {}, pod.get("status") or {}
    if "deletionTimestamp" in metadata:
        return None
    ready = any(each.get("type") == "Ready" and each.get("status") == "True" for each in status.get("conditions") or ())
    return status.get("podIP") if ready else None
