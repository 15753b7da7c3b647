"""Pods as replicas: the scale of a Deployment or a StatefulSet."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from forebay import clock
from forebay._validate import check_positive, check_whole, reject
from forebay.errors import ScalingFailed, StoreNotInstalled
from forebay.events import log
from forebay.retry import Retry
from forebay.scale.target import ReplicaReport, Replicas, sum_up

if TYPE_CHECKING:
    from forebay.scale.kubernetes_api import Access, KubernetesApi, Rejected

_OWNER: Final = "KubernetesTarget"
_PLURALS: Final = {"deployment": "deployments", "statefulset": "statefulsets"}
_NAME: Final = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_CONFLICTS: Final = 5  # in a row, of one change: the status of a Deployment changes its version, too
_BACKOFF: Final = Retry(base_delay=0.5, max_delay=30.0)
_GONE: Final = HTTPStatus.GONE
_REPORT_INTERVAL: Final = 5.0  # seconds between two rounds of reports
_MAX_PODS: Final = 1000  # that are listed for a round


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
        timeout: float = 10.0,  # noqa: ASYNC109 - of each request
        report_port: int | None = None,
        api: KubernetesApi | None = None,
    ) -> None:
        kind, _, name = workload.partition("/") if isinstance(workload, str) else ("", "", "")
        if kind not in _PLURALS or not _NAME.fullmatch(name):
            reject(_OWNER, "workload", workload, '"deployment/NAME" or "statefulset/NAME", such as "deployment/workers"')
        check_namespace(_OWNER, namespace)
        check_positive(_OWNER, "timeout", timeout, unit="seconds")
        check_whole(_OWNER, "report_port", report_port, maximum=65_535, none="if the pods do not report")
        self._workload = workload
        self._plural, self._object = _PLURALS[kind], name
        self._settings: dict[str, Any] = {"namespace": namespace, "context": context, "timeout": timeout}
        self._report_port = report_port
        self._given_api = api
        self._api: KubernetesApi | None = None
        self._scale: _Scale | None = None
        self._ready = 0
        self._watching: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._reports: Sequence[ReplicaReport] = ()

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
        self._api = self._given_api or load_api(_OWNER, **self._settings)
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
        api, self._api = self._api, None
        if api is not None and api is not self._given_api:
            await api.close()

    async def replicas(self) -> Replicas:
        """Return the replicas.

        Raises:
            ScalingFailed: the API server does not say.
        """
        self._scale = await self._read_scale()
        current = self._scale.replicas
        ready = min(self._ready, current)  # of a rolling update there are more
        summary = sum_up(current, self._reports)
        return Replicas(current=current, ready=ready, limited_by=summary.limited_by, service=summary.service)

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
            "metadata": {"name": self._object, "namespace": self._open_api.namespace, "resourceVersion": known.version},
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
        access = _access(verb, resource, name)
        api = self._open_api
        try:
            return await api.request(access, method, path, params=params, body=body)
        except _rejected() as error:
            if conflict and error.status == HTTPStatus.CONFLICT:
                return None
            raise api.explain(access, error) from error

    @property
    def _open_api(self) -> KubernetesApi:
        if self._api is None:
            raise RuntimeError("a KubernetesTarget is used before open(), or after close()")
        return self._api

    def _path(self, subresource: str = "") -> str:
        path = f"/apis/apps/v1/namespaces/{self._open_api.namespace}/{self._plural}"
        return f"{path}/{self._object}/{subresource}" if subresource else path

    # --- ready replicas ---

    @property
    def _only_this(self) -> dict[str, str]:
        return {"fieldSelector": f"metadata.name={self._object}"}

    async def _list(self) -> str:
        """Read the ready replicas from a list; return the version to watch from."""
        answer = await self._request(
            "list", self._plural, self._object, "GET", self._path(), params=self._only_this
        )
        items = answer.get("items") or ()
        self._take(items[0] if items else {})
        return str((answer.get("metadata") or {}).get("resourceVersion", ""))

    def _take(self, workload: Mapping[str, Any]) -> None:
        self._ready = int((workload.get("status") or {}).get("readyReplicas", 0))

    async def _watch(self, version: str) -> None:
        """Keep the ready replicas up to date; a watch that is lost is begun again from a list."""
        failures = 0
        while True:
            try:
                if not version:
                    version = await self._list()
                version = await self._follow(version)
                failures = 0
            except Exception as error:  # noqa: BLE001 - it is begun again
                version = ""
                failures += 1
                gone = isinstance(error, _rejected()) and error.status == _GONE
                if failures == 2 or (failures == 1 and not gone):  # noqa: PLR2004
                    log.warning("%s: the watch is begun again (%s: %s)", self.name, type(error).__name__, error)
                await asyncio.sleep(_BACKOFF.delay(failures, draw=clock.draw()) or 0.0)

    async def _follow(self, version: str) -> str:
        """Take the changes of one watch in; return the version that it came to."""
        access = _access("watch", self._plural, self._object)
        params = {**self._only_this, "resourceVersion": version}
        async with contextlib.aclosing(self._open_api.watch(access, self._path(), params)) as events:
            async for kind, workload in events:
                version = str(workload["metadata"]["resourceVersion"])
                if kind in ("ADDED", "MODIFIED"):
                    self._take(workload)
                elif kind == "DELETED":
                    self._take({})
        return version
