"""A Lease of Kubernetes, by which autoscalers elect the one that acts."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final

from forebay import clock
from forebay.errors import ScalingFailed
from forebay.scale.kubernetes_api import Access, KubernetesApi, Rejected, check_object_name
from forebay.scale.leader import LeaseRecord

_OWNER: Final = "KubernetesLease"
_RESOURCE: Final = "leases"


class KubernetesLease:
    """A Lease object (coordination.k8s.io/v1), which is made if there is none. A `LeaseStore`.

    Args:
        name: of the object.
        namespace: None for that of the context, or of the pod.
        context: a context of the kubeconfig; None for its current one.
        timeout: seconds that one request may take.
        api: an API server that its owner opens and closes; None for one of its own.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    def __init__(
        self,
        name: str = "forebay-autoscaler",
        *,
        namespace: str | None = None,
        context: str | None = None,
        timeout: float = 3.0,
        api: KubernetesApi | None = None,
    ) -> None:
        check_object_name(_OWNER, "name", name)
        self._object = name
        self._api = api or KubernetesApi(_OWNER, context=context, namespace=namespace, timeout=timeout)
        self._owns_api = api is None
        self._found: dict[str, Any] = {}  # the object, as it was read or written last

    @property
    def name(self) -> str:
        """``"lease/"`` and the name of the object."""
        return f"lease/{self._object}"

    async def open(self) -> None:
        """Connect.

        Raises:
            StoreNotInstalled: `lightkube` is not installed.
            ScalingFailed: the configuration cannot be used.
        """
        await self._api.open()

    async def close(self) -> None:
        """Disconnect."""
        if self._owns_api:
            await self._api.close()

    async def read(self) -> LeaseRecord | None:
        """Return the lease; None if it was never taken.

        Raises:
            ScalingFailed: the API server does not say.
        """
        access = Access("get", _RESOURCE, self._object)
        try:
            return self._record(await self._api.request(access, "GET", self._path(self._object)))
        except Rejected as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise self._api.explain(access, error) from error

    async def write(self, holder: str, duration: float, *, after: LeaseRecord | None) -> LeaseRecord | None:
        """Replace the lease that was read, and return the new one; None if another process has changed it since.

        Raises:
            ScalingFailed: the API server does not do it.
        """
        at = datetime.fromtimestamp(clock.wall_time(), UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        found = {} if after is None else self._found  # what others have set in it, such as labels, stays
        metadata = {**found.get("metadata", {}), "name": self._object, "namespace": self._api.namespace}
        if after is not None:
            metadata["resourceVersion"] = after.version
        spec = {**(found.get("spec") or {}), "leaseDurationSeconds": math.ceil(duration), "renewTime": at}
        spec.pop("holderIdentity", None)
        if holder:
            spec["holderIdentity"] = holder
        body = {**found, "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        access = Access("create" if after is None else "update", _RESOURCE, "" if after is None else self._object)
        method, path = ("POST", self._path()) if after is None else ("PUT", self._path(self._object))
        try:
            return self._record(await self._api.request(access, method, path, body=body))
        except Rejected as error:
            if error.status == HTTPStatus.CONFLICT:
                return None
            raise self._api.explain(access, error) from error

    def _record(self, answer: Any) -> LeaseRecord:
        try:
            spec = answer.get("spec") or {}
            record = LeaseRecord(
                str(spec.get("holderIdentity") or ""),
                float(spec.get("leaseDurationSeconds") or 0),
                str(answer["metadata"]["resourceVersion"]),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"the API server has answered with something that is not a lease ({type(error).__name__})"
            raise ScalingFailed(what=self.name, why=why) from error
        self._found = answer
        return record

    def _path(self, name: str = "") -> str:
        path = f"/apis/coordination.k8s.io/v1/namespaces/{self._api.namespace}/leases"
        return f"{path}/{name}" if name else path
