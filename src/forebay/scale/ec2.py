"""EC2 instances as replicas: the desired capacity of an Auto Scaling group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from forebay._validate import check_name, check_whole
from forebay.errors import ScalingFailed, StoreNotInstalled
from forebay.events import log
from forebay.scale.ratio import clamp
from forebay.scale.target import Replicas, sum_up

if TYPE_CHECKING:
    from forebay.scale.ec2_client import AwsClient
    from forebay.scale.ec2_reports import InstanceReports

_OWNER: Final = "Ec2Target"
_MAX_BATCH: Final = 50  # instances of a call of SetInstanceProtection
TERMINATING: Final = "autoscaling:EC2_INSTANCE_TERMINATING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One instance of a group.

    Attributes:
        weight: units of capacity; 1 unless the group gives its instance types weights.
        starting: it is being launched.
        in_service: it is in service; one that is leaving is not.
        healthy: it passes its health checks.
        protected: the group does not choose it when it removes instances.
    """

    instance_id: str
    weight: int
    starting: bool
    in_service: bool
    healthy: bool
    protected: bool

    @classmethod
    def read(cls, answer: Mapping[str, Any]) -> Instance:
        """Return an instance from an answer of DescribeAutoScalingGroups."""
        state = str(answer.get("LifecycleState", ""))
        return cls(
            instance_id=str(answer["InstanceId"]),
            weight=int(answer.get("WeightedCapacity") or 1),
            starting=state.startswith("Pending"),
            in_service=state == "InService",
            healthy=answer.get("HealthStatus", "Healthy") == "Healthy",
            protected=bool(answer.get("ProtectedFromScaleIn")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """An Auto Scaling group at one moment.

    Attributes:
        desired: the capacity that it has been asked for.
        minimum, maximum: its own bounds.
        suspended: its processes that are suspended, such as ``"Launch"``.
        instances: those that it has, leaving ones included.
    """

    desired: int
    minimum: int
    maximum: int
    suspended: frozenset[str]
    instances: Sequence[Instance]

    @classmethod
    def read(cls, answer: Mapping[str, Any]) -> Group:
        """Return a group from an answer of DescribeAutoScalingGroups."""
        return cls(
            desired=int(answer["DesiredCapacity"]),
            minimum=int(answer["MinSize"]),
            maximum=int(answer["MaxSize"]),
            suspended=frozenset(str(each["ProcessName"]) for each in answer.get("SuspendedProcesses", ())),
            instances=[Instance.read(each) for each in answer.get("Instances", ())],
        )

    @property
    def ready_instances(self) -> Sequence[Instance]:
        """Those that are in service and healthy."""
        return [each for each in self.instances if each.in_service and each.healthy]

    @property
    def ready(self) -> int:
        """The capacity in service, at most what is wanted: instances that leave, or are to leave, do not count."""
        return min(self.desired, sum(each.weight for each in self.ready_instances))

    def instances_to_release(self, desired: int) -> Sequence[str]:
        """Return the protected instances that must lose their protection, so that no more than `desired` remain.

        The same ones each time, whatever the order of the answer.
        """
        live = [each for each in self.instances if each.starting or each.in_service]
        excess = sum(each.weight for each in live if each.protected) - desired
        released: list[str] = []
        for each in sorted(live, key=lambda each: each.instance_id):
            if each.protected and each.in_service and each.weight <= excess:
                released.append(each.instance_id)
                excess -= each.weight
        return released


class Ec2Target:
    """Instances of an Auto Scaling group, which run ``forebay worker --protect ec2`` on a shared overflow.

    It sets the desired capacity of the group, and leaves the choice of the instances that go to the group: an instance
    whose worker runs tasks has protected itself from scale-in by then, and the group compares both at one moment. So
    without `drain_hook` only instances without a task go, and one that is too many may stay until its tasks have ended.

    With `drain_hook` it takes the protection from as many instances as are too many. A lifecycle hook of the group
    keeps an instance that goes until its worker has drained.

    Never more than the `MaxSize` of the group and never fewer than its `MinSize`: it logs when these bind. A replica is
    a unit of capacity: an instance, unless the group gives its instance types weights. Needs ``forebay[ec2]``.

    Args:
        group: name of the group.
        region: None for that of the environment or the profile.
        drain_hook: name of a lifecycle hook of the group for instances that terminate; None if there is none. The
            workers need the same name: ``forebay worker --protect ec2 --drain-hook NAME``.
        report_port: port on which each instance reports what it is short of and how long its tasks take (``forebay
            worker --listen``), in its private network; None if they do not. Without reports, no bottleneck of the
            instances is known: replicas are added while a quota that they share is used up.
        endpoint: address of the service; None for that of the region.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    def __init__(
        self,
        group: str,
        *,
        region: str | None = None,
        drain_hook: str | None = None,
        report_port: int | None = None,
        endpoint: str | None = None,
    ) -> None:
        for name, value in (("group", group), ("region", region), ("drain_hook", drain_hook), ("endpoint", endpoint)):
            if value is not None or name == "group":
                check_name(_OWNER, name, value)
        check_whole(_OWNER, "report_port", report_port, maximum=65_535, none="if the instances do not report")
        self._group = group
        self._region = region
        self._drain_hook = drain_hook
        self._report_port = report_port
        self._endpoint = endpoint
        self._client: AwsClient | None = None
        self._reports: InstanceReports | None = None
        self._warned: dict[str, str] = {}  # what was logged last, by what it is about

    @property
    def name(self) -> str:
        """``"ec2:"`` and the group."""
        return f"ec2:{self._group}"

    @property
    def outside(self) -> bool:
        """True: instances take tasks from the overflow."""
        return True

    async def open(self) -> None:
        """Connect, and look at the group and its lifecycle hook.

        Raises:
            StoreNotInstalled: `botocore` is not installed.
            ScalingFailed: they cannot be read, or there is none; the message says why.
        """
        try:
            from forebay.scale.ec2_client import AwsClient  # noqa: PLC0415 - needs botocore
            from forebay.scale.ec2_reports import InstanceReports  # noqa: PLC0415
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "botocore":
                raise
            raise StoreNotInstalled(where=_OWNER, library="botocore", extra="ec2") from None
        self._client = AwsClient(self.name, region=self._region, endpoint=self._endpoint)
        await self._client.open()
        await self._read()
        if self._drain_hook is not None:
            await find_hook(self._client, self.name, self._group, self._drain_hook)
        if self._report_port is not None:
            self._reports = InstanceReports(
                self.name, port=self._report_port, region=self._region, endpoint=self._endpoint
            )
            await self._reports.open()

    async def close(self) -> None:
        """Disconnect. The instances stay."""
        reports, self._reports = self._reports, None
        if reports is not None:
            await reports.close()
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def replicas(self) -> Replicas:
        """Return the instances. Those that are too many lose their protection, if `drain_hook` is given.

        Raises:
            ScalingFailed: the service does not say.
        """
        group = await self._read()
        await self._release(group, group.desired)
        if self._reports is None:
            return Replicas(current=group.desired, ready=group.ready)
        self._reports.follow([each.instance_id for each in group.ready_instances])
        summary = sum_up(group.desired, self._reports.last)
        return msgspec.structs.replace(summary, ready=group.ready)

    async def scale(self, replicas: int) -> None:
        """Ask for so many instances, within the bounds of the group.

        Raises:
            ScalingFailed: the service rejects it, or does not say.
        """
        check_whole(_OWNER, "replicas", replicas, minimum=0)
        group = await self._read()
        desired = clamp(replicas, group.minimum, group.maximum)
        self._warn_of_bounds(replicas, desired, group)
        if desired != group.desired:
            await self._call("SetDesiredCapacity", DesiredCapacity=desired, HonorCooldown=False)
        await self._release(group, desired)

    # --- the group ---

    async def _call(self, operation: str, **parameters: Any) -> Any:
        if self._client is None:
            raise ScalingFailed(what=self.name, why="it is not open: use it between open() and close()")
        return await self._client.call(operation, AutoScalingGroupName=self._group, **parameters)

    async def _read(self) -> Group:
        if self._client is None:
            raise ScalingFailed(what=self.name, why="it is not open: use it between open() and close()")
        answer = await self._client.call("DescribeAutoScalingGroups", AutoScalingGroupNames=[self._group])
        for each in answer.get("AutoScalingGroups", ()):
            if each.get("Status"):
                raise ScalingFailed(what=self.name, why="the group is being deleted")
            return Group.read(each)
        region = "that of the environment" if self._region is None else self._region
        why = f"there is no such group in the region ({region}): check its name, the region and the account"
        raise ScalingFailed(what=self.name, why=why)

    async def _release(self, group: Group, desired: int) -> None:
        """Take the protection from instances that are too many: the group chooses among those without one."""
        if self._drain_hook is None:
            return
        instances = group.instances_to_release(desired)
        try:
            for begin in range(0, len(instances), _MAX_BATCH):
                batch = list(instances[begin : begin + _MAX_BATCH])
                await self._call("SetInstanceProtection", InstanceIds=batch, ProtectedFromScaleIn=False)
        except ScalingFailed as error:  # one is too many until the next reading, which tries again
            self._warn("release", f"instances that are too many stay protected ({error})")
        else:
            self._warned.pop("release", None)

    # --- warnings ---

    def _warn_of_bounds(self, asked: int, desired: int, group: Group) -> None:
        if asked > desired:
            self._warn(
                "bounds", f"it is to have {asked} replicas, and MaxSize of the group is {group.maximum}: raise it"
            )
        elif asked < desired:
            self._warn(
                "bounds", f"it is to have {asked} replicas, and MinSize of the group is {group.minimum}: lower it"
            )
        else:
            self._warned.pop("bounds", None)
        process = "Launch" if desired > group.desired else "Terminate"
        if desired != group.desired and process in group.suspended:
            self._warn(
                "suspended", f"the process {process} of the group is suspended: nothing happens until it is resumed"
            )

    def _warn(self, about: str, message: str) -> None:
        """Log a warning, unless the last one about the same was the same."""
        if self._warned.get(about) != message:
            self._warned[about] = message
            log.warning("%s: %s", self.name, message)


async def find_hook(client: AwsClient, what: str, group: str, hook: str) -> float:
    """Return the seconds that a lifecycle hook for instances that terminate keeps one without a sign of life.

    Raises:
        ScalingFailed: there is none of that name, or it is for another transition.
    """
    answer = await client.call("DescribeLifecycleHooks", AutoScalingGroupName=group)
    for each in answer.get("LifecycleHooks", ()):
        if each.get("LifecycleHookName") == hook and each.get("LifecycleTransition") == TERMINATING:
            return float(each.get("HeartbeatTimeout") or 3600)
    raise ScalingFailed(what=what, why=f"the group {group} has no lifecycle hook {hook!r} for {TERMINATING}: add one")
