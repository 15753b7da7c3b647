"""Auto-scaling: more workers while workers are the bottleneck, and only then."""

from forebay.scale.autoscaler import Autoscaler, AutoscalerStatistics, Leader, ScalableSupervisor
from forebay.scale.decision import ScaleDecider, ScaleDecision, ScalePolicy, slots_asked
from forebay.scale.ec2 import Ec2Target
from forebay.scale.kubernetes import KubernetesTarget
from forebay.scale.kubernetes_lease import KubernetesLease
from forebay.scale.leader import LeaderLease, LeaseRecord, LeaseStore, StateLease
from forebay.scale.process_target import ProcessTarget
from forebay.scale.published_target import PublishedTarget
from forebay.scale.ratio import desired_replicas
from forebay.scale.target import ReplicaReport, Replicas, Target, sum_up
from forebay.scale.worker_target import ResizableWorker, WorkerTarget

__all__ = [
    "Autoscaler",
    "AutoscalerStatistics",
    "Ec2Target",
    "KubernetesLease",
    "KubernetesTarget",
    "Leader",
    "LeaderLease",
    "LeaseRecord",
    "LeaseStore",
    "ProcessTarget",
    "PublishedTarget",
    "ReplicaReport",
    "Replicas",
    "ResizableWorker",
    "ScalableSupervisor",
    "ScaleDecider",
    "ScaleDecision",
    "ScalePolicy",
    "StateLease",
    "Target",
    "WorkerTarget",
    "desired_replicas",
    "slots_asked",
    "sum_up",
]
