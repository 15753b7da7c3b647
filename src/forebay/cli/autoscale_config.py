"""The configuration of ``forebay autoscale``: a TOML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar

import msgspec

from forebay._validate import check_name, check_positive, reject
from forebay.cli.settings_reader import SettingsReader, SettingsSource
from forebay.cli.toml_document import read_document
from forebay.scale import Ec2Target, KubernetesLease, KubernetesTarget, LeaderLease, ProcessTarget, ScalePolicy, Target
from forebay.scale.leader import check_duration
from forebay.state.shard_url import open_shard
from forebay.supervisor.overflow_demand import OverflowDemand

S = TypeVar("S", bound=msgspec.Struct)

_OWNER: Final = "forebay autoscale"
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NOT_IN_NAMES: Final = re.compile(r"[^a-z0-9.-]+")  # of Kubernetes
_MAX_NAME: Final = 253
_TABLES: Final = ("autoscaler", "target", "leader")


def _check_url(name: str, url: str | None, variable: str | None) -> None:
    """Check that either a URL is given or a variable that holds it. No message has the URL, whatever is mistaken."""
    expected = f"a URL, unless {name}_env names a variable that holds it"
    if url is not None and variable is not None:
        reject(_OWNER, name, f"given, and {name}_env too", expected)
    if variable is None and not url:
        reject(_OWNER, name, url, expected)
    if variable is not None and not _VARIABLE.fullmatch(variable):
        reject(_OWNER, f"{name}_env", "something else", f"the name of an environment variable; a URL belongs in {name}")


class AutoscalerTable(msgspec.Struct, frozen=True, kw_only=True):
    """The table ``[autoscaler]``: the overflow, and the settings of `forebay.scale.Autoscaler`.

    Attributes:
        overflow: URL of the overflow; or `overflow_env`.
        overflow_env: the environment variable that holds it.
        task_types: the types whose tasks the replicas take.
        publish_only: it decides, and something else, which reads that from its metrics, sets the replicas.
    """

    task_types: tuple[str, ...]
    maximum: int
    overflow: str | None = None
    overflow_env: str | None = None
    seats: int = 1
    load: float = 0.7
    minimum: int = 1
    interval: float = 2.0
    window: float = 60.0
    panic_window: float = 6.0
    stabilization: float = 300.0
    drain: float | None = None
    tolerance: float = 0.1
    service: float | None = None
    publish_only: bool = False

    def __post_init__(self) -> None:
        _check_url("overflow", self.overflow, self.overflow_env)
        if not self.task_types or not all(self.task_types):
            reject(_OWNER, "task_types", self.task_types, 'a list of task types, such as ["write"]')
        if len(set(self.task_types)) < len(self.task_types):
            reject(_OWNER, "task_types", self.task_types, "a list that has each task type once")
        check_positive(_OWNER, "interval", self.interval, unit="seconds")
        check_positive(_OWNER, "service", self.service, unit="seconds", none="if it is not known")
        self.policy()

    def policy(self) -> ScalePolicy:
        """Return the settings by which it decides.

        Raises:
            InvalidSetting: one is invalid.
        """
        return ScalePolicy(
            seats=self.seats,
            load=self.load,
            minimum=self.minimum,
            maximum=self.maximum,
            window=self.window,
            panic_window=self.panic_window,
            stabilization=self.stabilization,
            drain=self.drain,
            tolerance=self.tolerance,
        )

    def check_overflow(self, environment: Mapping[str, str]) -> None:
        """Check the URL of the overflow, if it is given here or set. Nothing is connected.

        Raises:
            InvalidOverflowUrl, InvalidSetting, StoreNotInstalled: as `OverflowDemand` raises them.
        """
        if self.overflow_env is None or environment.get(self.overflow_env):
            OverflowDemand(self.overflow_url(environment))

    def overflow_url(self, environment: Mapping[str, str]) -> str:
        """Return the URL of the overflow.

        Raises:
            InvalidSetting: the environment variable is not set.
        """
        if self.overflow is not None:
            return self.overflow
        url = environment.get(self.overflow_env or "")
        if not url:
            reject(_OWNER, "overflow_env", self.overflow_env, "the name of an environment variable that is set")
        return url


class KubernetesTable(msgspec.Struct, frozen=True, kw_only=True):
    """The table ``[target.kubernetes]``: the settings of `forebay.scale.KubernetesTarget`."""

    workload: str
    namespace: str | None = None
    context: str | None = None
    timeout: float = 10.0
    report_port: int | None = None

    def __post_init__(self) -> None:
        self.target()

    def target(self) -> Target:
        """Return the target."""
        return KubernetesTarget(
            self.workload,
            namespace=self.namespace,
            context=self.context,
            timeout=self.timeout,
            report_port=self.report_port,
        )


class Ec2Table(msgspec.Struct, frozen=True, kw_only=True):
    """The table ``[target.ec2]``: the settings of `forebay.scale.Ec2Target`."""

    group: str
    region: str | None = None
    drain_hook: str | None = None
    report_port: int | None = None
    endpoint: str | None = None

    def __post_init__(self) -> None:
        self.target()

    def target(self) -> Target:
        """Return the target."""
        return Ec2Target(
            self.group,
            region=self.region,
            drain_hook=self.drain_hook,
            report_port=self.report_port,
            endpoint=self.endpoint,
        )


class ProcessTable(msgspec.Struct, frozen=True, kw_only=True):
    """The table ``[target.process]``: the settings of `forebay.scale.ProcessTarget`."""

    supervisor: str
    drain_timeout: float | None = None
    start_timeout: float = 60.0
    report_timeout: float | None = 20.0

    def __post_init__(self) -> None:
        self.target()

    def target(self) -> Target:
        """Return the target."""
        return ProcessTarget(
            self.supervisor,
            drain_timeout=self.drain_timeout,
            start_timeout=self.start_timeout,
            report_timeout=self.report_timeout,
        )


class KubernetesLeaderTable(msgspec.Struct, frozen=True, kw_only=True):
    """The table ``[leader.kubernetes]``: the settings of `forebay.scale.KubernetesLease`, and of the lease.

    Attributes:
        name: of the lease; None for one that ends with the name of the target.
    """

    name: str | None = None
    namespace: str | None = None
    context: str | None = None
    duration: float = 15.0

    def __post_init__(self) -> None:
        self.lease("target")

    def lease_name(self, target: str) -> str:
        """Return the name of the lease of the autoscalers of a target."""
        if self.name is not None:
            return self.name
        return f"forebay-autoscaler-{_NOT_IN_NAMES.sub('-', target.lower())}"[:_MAX_NAME].rstrip("-.")

    def lease(self, target: str) -> LeaderLease:
        """Return the lease of the autoscalers of a target."""
        store = KubernetesLease(self.lease_name(target), namespace=self.namespace, context=self.context)
        return LeaderLease(store, duration=self.duration)


class StateLeaderTable(msgspec.Struct, frozen=True, kw_only=True):
    """The table ``[leader.state]``: a lease in a store that the autoscalers share.

    Attributes:
        url: of a shard of `forebay.state.ShardedState`; or `url_env`.
        url_env: the environment variable that holds it.
        name: of the lease; None for one that ends with the name of the target.
    """

    url: str | None = None
    url_env: str | None = None
    name: str | None = None
    duration: float = 15.0

    def __post_init__(self) -> None:
        _check_url("url", self.url, self.url_env)
        if self.name is not None:
            check_name(_OWNER, "name", self.name)
        check_duration(_OWNER, self.duration)

    def lease_name(self, target: str) -> str:
        """Return the name of the lease of the autoscalers of a target."""
        return f"autoscaler/{target}" if self.name is None else self.name

    def shard_url(self, environment: Mapping[str, str]) -> str:
        """Return the URL of the store.

        Raises:
            InvalidSetting: the environment variable is not set.
        """
        url = environment.get(self.url_env or "") if self.url is None else self.url
        if not url:
            reject(_OWNER, "url_env", self.url_env, "the name of an environment variable that is set")
        return url

    def check_shard(self, environment: Mapping[str, str]) -> None:
        """Check the URL of the store, if it is given here or set. Nothing is connected.

        Raises:
            InvalidShardUrl, StoreNotInstalled: as `forebay.state.ShardedState` raises them.
            InvalidSetting: it is in memory.
        """
        if self.url_env is None or environment.get(self.url_env):
            url = self.shard_url(environment)
            if url.strip().startswith("memory:"):
                expected = 'one that the other autoscalers see, too, such as "redis://host/0"'
                reject(_OWNER, "url", "one in memory", expected)
            open_shard(url)


TARGETS: Final[Mapping[str, type[KubernetesTable | Ec2Table | ProcessTable]]] = MappingProxyType(
    {"kubernetes": KubernetesTable, "ec2": Ec2Table, "process": ProcessTable}
)
"""The targets, by their tables in ``[target]``."""

LEADERS: Final[Mapping[str, type[KubernetesLeaderTable | StateLeaderTable]]] = MappingProxyType(
    {"kubernetes": KubernetesLeaderTable, "state": StateLeaderTable}
)
"""The places of a lease, by their tables in ``[leader]``."""


class AutoscaleSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration of ``forebay autoscale``.

    Attributes:
        autoscaler: what is read, and how it is decided.
        target: what is made larger and smaller.
        leader: where the lease is; None if there is no other autoscaler of this target.
    """

    autoscaler: AutoscalerTable
    target: KubernetesTable | Ec2Table | ProcessTable
    leader: KubernetesLeaderTable | StateLeaderTable | None

    @property
    def lease_target(self) -> str:
        """The name of the target in that of a lease: two targets must not share one."""
        name = self.target.target().name.removeprefix("kubernetes:")
        namespace = self.target.namespace if isinstance(self.target, KubernetesTable) else None
        return name if namespace is None else f"{namespace}/{name}"


def load_autoscale_settings(file: Path) -> AutoscaleSettings:
    """Return the settings in a file.

    Raises:
        InvalidConfiguration: with every mistake that was found, each with its file and line.
    """
    source = SettingsSource(read_document(file), str(file))
    reader = SettingsReader(source)
    reader.known_keys((), source.values, _TABLES)
    autoscaler = reader.read_struct(AutoscalerTable, ("autoscaler",), source.values.get("autoscaler", {}))
    target = _read_one(reader, source, "target", TARGETS)
    leader = _read_one(reader, source, "leader", LEADERS) if "leader" in source.values else None
    if target is None and not reader.problems:
        reader.add_problem(("target",), f"there is no target: add one of the tables {_tables('target', TARGETS)}")
    if source.values.get("leader") == {}:
        problem = f"there is no lease in it: leave [leader] out, or add one of the tables {_tables('leader', LEADERS)}"
        reader.add_problem(("leader",), problem)
    if autoscaler is not None and autoscaler.publish_only and leader is not None:
        problem = "leader and autoscaler.publish_only exclude each other: leave one of them out, since nobody acts"
        reader.add_problem(("leader",), problem)
    reader.raise_problems()
    assert autoscaler is not None  # noqa: S101 - else a problem was raised
    assert target is not None  # noqa: S101
    return AutoscaleSettings(autoscaler=autoscaler, target=target, leader=leader)


def _read_one(reader: SettingsReader, source: SettingsSource, name: str, kinds: Mapping[str, type[S]]) -> S | None:
    """Return the struct of the one table below `name`; None if there is none, or a problem."""
    table = source.values.get(name, {})
    if not isinstance(table, dict):
        reader.add_problem((name,), f"{name} must be one of the tables {_tables(name, kinds)}")
        return None
    found = [
        reader.read_struct(kinds[key], (name, key), table[key]) for key in reader.known_keys((name,), table, kinds)
    ]
    if len(found) > 1:
        reader.add_problem((name,), f"{name} has {len(found)} tables; keep one of {_tables(name, kinds)}")
    return found[0] if found else None


def _tables(name: str, kinds: Mapping[str, object]) -> str:
    return ", ".join(f"[{name}.{key}]" for key in kinds)
