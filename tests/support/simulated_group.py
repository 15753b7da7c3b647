"""An Auto Scaling group in memory, as its documentation describes it: what a simulated service leaves out.

Sources: Amazon EC2 Auto Scaling User Guide, "Use instance scale-in protection", "Amazon EC2 Auto Scaling lifecycle
hooks"; API Reference of the operations below.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from botocore.exceptions import ClientError

LEAVING = ("Terminating", "Terminating:Wait", "Terminating:Proceed")


@dataclass
class SimulatedInstance:
    """One instance: its state, and whether the group may choose it."""

    instance_id: str
    state: str = "Pending"
    protected: bool = False
    health: str = "Healthy"
    weight: int | None = None
    heartbeats: int = 0
    on_end: list[Callable[[], None]] = field(default_factory=list)

    @property
    def target(self) -> str:
        """What its metadata calls the target lifecycle state."""
        return "Terminated" if self.state in (*LEAVING, "Terminated") else "InService"


class SimulatedGroup:
    """A group, and the client of its API. A change of the desired capacity is carried out by `settle`.

    It chooses the oldest of the instances without protection. With a hook, one that it has chosen waits. A `quick`
    group settles and launches with each call.
    """

    def __init__(
        self, desired: int = 0, *, minimum: int = 0, maximum: int = 20, hook: str | None = None, quick: bool = False
    ) -> None:
        self.desired, self.minimum, self.maximum, self.hook, self.quick = desired, minimum, maximum, hook, quick
        self.instances: list[SimulatedInstance] = []
        self.suspended: list[str] = []
        self.status: str | None = None
        self.calls: list[str] = []
        self.faults: dict[str, list[BaseException]] = {}  # by operation: raised by the next calls, before they act
        self.lost: dict[str, list[BaseException]] = {}  # the same, after they have acted
        self.chosen: list[SimulatedInstance] = []
        self._ids = itertools.count(1)
        self.settle()
        self.launch_all()

    # --- the group ---

    def settle(self) -> None:
        """Launch what is missing, and choose from what is too much."""
        live = self.live
        for _ in range(self.desired - len(live)):
            self.instances.append(SimulatedInstance(f"i-{next(self._ids):017x}"))
        free = [each for each in live if not (each.protected and each.state == "InService")]
        for each in free[: max(0, len(live) - self.desired)]:
            self.chosen.append(each)
            each.state = "Terminating" if self.hook is None else "Terminating:Wait"
            if self.hook is None:
                self.terminate(each)

    def launch_all(self) -> None:
        """Bring into service what is being launched."""
        for each in self.instances:
            if each.state == "Pending":
                each.state = "InService"

    def terminate(self, each: SimulatedInstance) -> None:
        """End an instance."""
        each.state = "Terminated"
        self.instances.remove(each)
        for end in each.on_end:
            end()

    @property
    def live(self) -> list[SimulatedInstance]:
        """Those that are being launched or in service."""
        return [each for each in self.instances if each.state in ("Pending", "InService")]

    @property
    def states(self) -> list[tuple[str, bool]]:
        """The state of each, and whether it is protected."""
        return [(each.state, each.protected) for each in self.instances]

    # --- the client ---

    def close(self) -> None:
        """Disconnect."""

    def describe_auto_scaling_groups(self, *, AutoScalingGroupNames: list[str]) -> Any:  # noqa: N803
        """Return the group, if it is asked for."""
        return self._call("DescribeAutoScalingGroups", lambda: self._describe(AutoScalingGroupNames))

    def _describe(self, names: list[str]) -> Any:
        if names != ["workers"]:
            return {"AutoScalingGroups": []}
        described = {
            "AutoScalingGroupName": "workers",
            "DesiredCapacity": self.desired,
            "MinSize": self.minimum,
            "MaxSize": self.maximum,
            "SuspendedProcesses": [{"ProcessName": each} for each in self.suspended],
            "Instances": [self._describe_instance(each) for each in self.instances],
        }
        return {"AutoScalingGroups": [described if self.status is None else {**described, "Status": self.status}]}

    @staticmethod
    def _describe_instance(each: SimulatedInstance) -> Any:
        described = {
            "InstanceId": each.instance_id,
            "LifecycleState": each.state,
            "HealthStatus": each.health,
            "ProtectedFromScaleIn": each.protected and each.state == "InService",
        }
        return described if each.weight is None else {**described, "WeightedCapacity": str(each.weight)}

    def describe_auto_scaling_instances(self, *, InstanceIds: list[str]) -> Any:  # noqa: N803
        """Return instances with the name of their group."""

        def describe() -> Any:
            found = [each for each in self.instances if each.instance_id in InstanceIds]
            described = [{**self._describe_instance(each), "AutoScalingGroupName": "workers"} for each in found]
            return {"AutoScalingInstances": described}

        return self._call("DescribeAutoScalingInstances", describe)

    def describe_instances(self, *, Filters: list[dict[str, Any]]) -> Any:  # noqa: N803
        """Return the private addresses of instances: that of this machine."""

        def describe() -> Any:
            (wanted,) = (each["Values"] for each in Filters if each["Name"] == "instance-id")
            found = [each.instance_id for each in self.instances if each.instance_id in wanted]
            instances = [{"InstanceId": each, "PrivateIpAddress": "127.0.0.1"} for each in found]
            return {"Reservations": [{"Instances": [each]} for each in instances]}

        return self._call("DescribeInstances", describe)

    def set_desired_capacity(
        self,
        *,
        AutoScalingGroupName: str,  # noqa: N803
        DesiredCapacity: int,  # noqa: N803
        HonorCooldown: bool,  # noqa: N803
    ) -> Any:
        """Change the desired capacity within the bounds."""

        def change() -> None:
            assert AutoScalingGroupName == "workers"
            assert not HonorCooldown
            if not self.minimum <= DesiredCapacity <= self.maximum:
                raise invalid("SetDesiredCapacity", f"New SetDesiredCapacity value {DesiredCapacity} is out of bounds.")
            self.desired = DesiredCapacity

        return self._call("SetDesiredCapacity", change)

    def set_instance_protection(
        self,
        *,
        AutoScalingGroupName: str,  # noqa: N803
        InstanceIds: list[str],  # noqa: N803
        ProtectedFromScaleIn: bool,  # noqa: N803
    ) -> Any:
        """Protect instances or not; all must be in service."""

        def change() -> None:
            assert AutoScalingGroupName == "workers"
            assert len(InstanceIds) <= 50
            found = [each for each in self.instances if each.instance_id in InstanceIds and each.state == "InService"]
            if len(found) < len(InstanceIds):
                raise invalid("SetInstanceProtection", "The instance is not in InService or EnteringStandby or Standby")
            for each in found:
                each.protected = ProtectedFromScaleIn

        return self._call("SetInstanceProtection", change)

    def describe_lifecycle_hooks(self, *, AutoScalingGroupName: str) -> Any:  # noqa: N803
        """Return the hook."""

        def describe() -> Any:
            assert AutoScalingGroupName == "workers"
            transitions = {"launching": "autoscaling:EC2_INSTANCE_LAUNCHING"}
            if self.hook is not None:
                transitions[self.hook] = "autoscaling:EC2_INSTANCE_TERMINATING"
            hooks = [
                {"LifecycleHookName": name, "LifecycleTransition": transition, "HeartbeatTimeout": 300}
                for name, transition in transitions.items()
            ]
            return {"LifecycleHooks": hooks}

        return self._call("DescribeLifecycleHooks", describe)

    def record_lifecycle_action_heartbeat(self, **parameters: Any) -> Any:
        """Keep an instance waiting."""

        def record() -> None:
            self._waiting("RecordLifecycleActionHeartbeat", **parameters).heartbeats += 1

        return self._call("RecordLifecycleActionHeartbeat", record)

    def complete_lifecycle_action(self, *, LifecycleActionResult: str, **parameters: Any) -> Any:  # noqa: N803
        """Let an instance that waits go."""

        def complete() -> None:
            assert LifecycleActionResult == "CONTINUE"
            self.terminate(self._waiting("CompleteLifecycleAction", **parameters))

        return self._call("CompleteLifecycleAction", complete)

    def _waiting(
        self,
        operation: str,
        *,
        AutoScalingGroupName: str,  # noqa: N803
        LifecycleHookName: str,  # noqa: N803
        InstanceId: str,  # noqa: N803
    ) -> SimulatedInstance:
        assert (AutoScalingGroupName, LifecycleHookName) == ("workers", self.hook)
        for each in self.instances:
            if each.instance_id == InstanceId and each.state == "Terminating:Wait":
                return each
        raise invalid(operation, f"No active Lifecycle Action found with instance ID {InstanceId}")

    def _call(self, operation: str, act: Callable[[], Any]) -> Any:
        self.calls.append(operation)
        if self.quick:
            self.launch_all()
            self.settle()
        for faults in (self.faults, self.lost):
            if faults.get(operation):
                error = faults[operation].pop(0)
                if faults is self.lost:
                    act()
                raise error
        return act()


def invalid(operation: str, message: str) -> ClientError:
    """Return the error of a request that the service rejects."""
    return service_error("ValidationError", operation, message)


def service_error(code: str, operation: str = "SetDesiredCapacity", message: str = "") -> ClientError:
    """Return an error with which the service answers."""
    return ClientError({"Error": {"Code": code, "Message": message}}, operation)
