"""The Helm chart: what it renders is valid, runs and stops in time, and may do no more than it does."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tests.support import chart
from tests.support.chart import Manifest, containers, of_kind, only, render, workloads
from tests.support.kubernetes_double import NAMESPACE, KubernetesDouble, KubernetesTransport
from tests.unit.scale.test_autoscaler import ScriptedSupervisor

from forebay.cli.autoscale_config import (
    AutoscalerTable,
    AutoscaleSettings,
    KubernetesLeaderTable,
    KubernetesTable,
    load_autoscale_settings,
)
from forebay.cli.config import load_gateway_settings
from forebay.gateway import GatewaySettings
from forebay.interfaces import Demand
from forebay.scale import Autoscaler, KubernetesLease, KubernetesTarget, LeaderLease, PublishedTarget, Target
from forebay.scale.kubernetes_api import KubernetesApi
from forebay.scale.kubernetes_client import client_of
from forebay.testing import virtual

helm = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")
pytestmark = pytest.mark.slow

GROUPS = {"deployments": "apps", "pods": "", "leases": "coordination.k8s.io"}
REDIS = {"redis": {"password": {"secretName": "redis"}}}
WORKER = {"worker": {"supervisor": "app:make_supervisor"}}
GATEWAY = {"gateway": {"enabled": True, "token": {"secretName": "token"}}}
CONFIG = """[gateway]
max_connections = 2_000

[targets.openai]
url = "https://api.openai.com"
"""
ENV = [
    {"name": "MODE", "value": "1"},
    {"name": "OPENAI_API_KEY", "valueFrom": {"secretKeyRef": {"name": "openai", "key": "key"}}},
]
PLACE = {
    "podAnnotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
    "nodeSelector": {"pool": "agents"},
    "tolerations": [{"key": "agents", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
}
SPREAD = {
    **PLACE,
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
}
BUDGET = {"disruptionBudget": {"maxUnavailable": "25%"}}
NO_BUDGET = {"disruptionBudget": {"enabled": False}}


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return values merged as Helm merges them."""
    into: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(into.get(key), Mapping)
            into[key] = merged(into[key], value) if both else value
    return into


def redis(**values: Any) -> dict[str, Any]:
    return merged(REDIS, {"redis": values})


def worker(**values: Any) -> dict[str, Any]:
    return merged(WORKER, {"worker": values})


def gateway(**values: Any) -> dict[str, Any]:
    return merged(GATEWAY, {"gateway": {"config": CONFIG}}, {"gateway": values})


def autoscaler(**values: Any) -> dict[str, Any]:
    return {"autoscaler": {"enabled": True, "taskTypes": ["work"], **values}}


# Each of the values that the chart has is in one of these, apart from numbers; every combination is tried.
OVERFLOWS: dict[str, Mapping[str, Any]] = {
    "redis": redis(),
    "redis without a disk": redis(persistence={"enabled": False}, password={"key": "other"}, **PLACE),
    "redis on a disk of a class": redis(
        image={"repository": "mirror/redis", "tag": "7.4.2", "pullPolicy": "Always"},
        persistence={"size": "1Gi", "storageClassName": "fast"},
        resources={"limits": {"memory": "2Gi"}},
    ),
    "a URL": {"redis": {"enabled": False}, "overflow": {"url": "rediss://redis.example:6379/0"}},
    "a URL in a secret": {"redis": {"enabled": False}, "overflow": {"secret": {"name": "overflow", "key": "uri"}}},
}
WORKERS: dict[str, Mapping[str, Any]] = {
    "no worker": {"worker": {"enabled": False}},
    "workers": worker(),
    "workers with all": worker(
        image={"repository": "mine", "tag": "3"}, replicas=0, drainSeconds=900, port=9000, serviceAccountName="mine",
        env=ENV, envFrom=[{"configMapRef": {"name": "settings"}}], volumes=[{"name": "cache", "emptyDir": {}}],
        volumeMounts=[{"name": "cache", "mountPath": "/cache"}], resources={"limits": {"cpu": 2}}, **BUDGET, **SPREAD,
    ),
    "workers without a budget": worker(**NO_BUDGET),
}  # fmt: skip
GATEWAYS: dict[str, Mapping[str, Any]] = {
    "no gateway": {},
    "a gateway": gateway(),
    "a gateway with all": gateway(
        replicas=3, token={"key": "other"}, drainSeconds=600, leaveSeconds=15, port=9001, env=ENV,
        service={"type": "LoadBalancer", "port": 8080, "annotations": {"internal": "true"}}, **BUDGET, **SPREAD,
    ),
    "a gateway without a budget": gateway(**NO_BUDGET),
    "gateways with one set of limits": gateway(
        replicas=3, workers=2, shared={"enabled": True, "secret": {"name": "shared", "key": "uri"}}
    ),
}  # fmt: skip
AUTOSCALERS: dict[str, Mapping[str, Any]] = {
    "no autoscaler": {},
    "an autoscaler": autoscaler(),
    "an autoscaler with all": autoscaler(
        replicas=1, taskTypes=["work", "sum up"], seats=4, load=0.5, minimum=0, maximum=1_000_000, interval=0.5,
        window=30, panicWindow=3, stabilization=1_000_000, serviceSeconds=12.5, port=9002, env=ENV, **BUDGET, **PLACE,
        serviceAccount={"name": "scaler", "annotations": {"role": "scaler"}},
    ),
    "one that publishes": autoscaler(
        publishOnly=True, serviceAccount={"create": False, "name": "scaler"}, **NO_BUDGET
    ),
}  # fmt: skip
NAMED = {
    "fullnameOverride": "fleet",
    "nameOverride": "agents",
    "image": {"repository": "mirror/forebay", "tag": "0.2.0", "pullPolicy": "Always", "pullSecrets": ["pull"]},
}
AXES = (OVERFLOWS, WORKERS, GATEWAYS, AUTOSCALERS)
COMBINATIONS = {
    ", ".join(names): merged(*(values[name] for values, name in zip(AXES, names, strict=True)))
    for names in itertools.product(*AXES)
    if names[1] != "no worker" or names[3] == "no autoscaler"
}
ALL = COMBINATIONS["redis, workers with all, a gateway with all, an autoscaler with all"]
COMBINATIONS["all, with other names"] = merged(ALL, NAMED)


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Manifest]]:
    """Return the objects of every combination."""
    return {name: render(values) for name, values in COMBINATIONS.items()}


# --- what is rendered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [chart.OLDEST, chart.NEWEST])
def test_every_combination_of_values_renders_valid_objects(rendered: dict[str, list[Manifest]], version: str) -> None:
    different: dict[str, tuple[str, Manifest]] = {}
    for name, objects in rendered.items():
        names = [(each["kind"], each["metadata"]["name"]) for each in objects]
        assert len(names) == len(set(names)), name
        different |= {json.dumps(each): (name, each) for each in objects}
    assert len(different) > 30
    for name, each in different.values():
        try:
            chart.validate(each, version)
        except jsonschema.ValidationError as error:
            pytest.fail(f"{name}: {each['kind']} {each['metadata']['name']}: {error.message}")


def test_the_schema_that_validates_them_knows_no_other_fields() -> None:
    deployment = only(render(ALL), "Deployment", "-worker")
    deployment["spec"]["template"]["spec"]["containers"][0]["ressources"] = {}
    with pytest.raises(jsonschema.ValidationError):
        chart.validate(deployment)


def test_it_is_linted_without_a_finding() -> None:
    variants = [merged(REDIS, WORKER, values) for axis in AXES for values in axis.values()]
    for values in [*variants, ALL]:
        found = helm.lint(str(chart.CHART), values, strict=True)
        findings = [each for each in found["messages"] if "icon is recommended" not in each["error"]]
        assert (findings, found["errors"]) == ([], [])


def test_no_combination_makes_a_secret(rendered: dict[str, list[Manifest]]) -> None:
    assert not [name for name, objects in rendered.items() if of_kind(objects, "Secret")]


def test_all_objects_are_in_the_namespace_of_the_release_and_have_its_labels(
    rendered: dict[str, list[Manifest]],
) -> None:
    for each in itertools.chain.from_iterable(rendered.values()):
        assert each["metadata"]["namespace"] == chart.NAMESPACE
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "rel"
        assert each["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"


def test_the_name_of_a_long_release_still_fits() -> None:
    for values in (ALL, {**ALL, "fullnameOverride": "n" * 80}):
        for each in render(values, release="r" * 53):
            assert len(each["metadata"]["name"]) <= 63
            chart.validate(each)


# --- containers ------------------------------------------------------------------------------------------------------


def test_every_image_has_a_version(rendered: dict[str, list[Manifest]]) -> None:
    for objects in rendered.values():
        for _, container in containers(objects):
            _, _, tag = container["image"].rpartition(":")
            assert re.fullmatch(r"[0-9][0-9A-Za-z.-]*", tag), container["image"]


def test_every_container_has_resources_and_probes(rendered: dict[str, list[Manifest]]) -> None:
    for objects in rendered.values():
        for _, container in containers(objects):
            assert "memory" in container["resources"]["limits"]
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                (how,) = container[probe].keys() & {"httpGet", "tcpSocket", "exec"}
                assert container[probe][how].get("port", next(iter(ports))) in ports
            liveness, startup = container["livenessProbe"], container["startupProbe"]
            assert startup["failureThreshold"] * startup["periodSeconds"] >= 60
            assert liveness["failureThreshold"] * liveness["periodSeconds"] >= 60
            if container["name"] == "gateway":  # /readyz is 503 while it drains, which is no reason to kill it
                assert liveness["httpGet"]["path"] == "/healthz"
                assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_no_container_is_root_or_writes_outside_its_volumes(rendered: dict[str, list[Manifest]]) -> None:
    for objects in rendered.values():
        for pod, container in containers(objects):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_only_the_autoscaler_gets_a_token_of_kubernetes(rendered: dict[str, list[Manifest]]) -> None:
    for objects in rendered.values():
        for workload in workloads(objects):
            component = workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
            pod = workload["spec"]["template"]["spec"]
            assert pod["automountServiceAccountToken"] is (component == "autoscaler")


def test_selectors_find_the_pods_of_their_own_workload_and_no_others(rendered: dict[str, list[Manifest]]) -> None:
    for objects in rendered.values():
        pods = {each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"] for each in workloads(objects)}

        def found(selector: Mapping[str, str], pods: Mapping[str, Mapping[str, str]] = pods) -> list[str]:
            return [name for name, labels in pods.items() if selector.items() <= labels.items()]

        for each in of_kind(objects, "Deployment", "StatefulSet", "PodDisruptionBudget"):
            assert found(each["spec"]["selector"]["matchLabels"]) == [each["metadata"]["name"]]
        for each in of_kind(objects, "Service"):
            assert found(each["spec"]["selector"]) == [each["metadata"]["name"]]
            (workload,) = [one for one in workloads(objects) if one["metadata"]["name"] == each["metadata"]["name"]]
            ports = {port["name"] for port in workload["spec"]["template"]["spec"]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= ports


def test_pods_have_more_time_to_stop_than_they_drain(rendered: dict[str, list[Manifest]], tmp_path: Path) -> None:
    for objects in rendered.values():
        for pod, container in containers(objects):
            if container["name"] == "worker":
                _, options = chart.parse_command(container["args"])
                # What does not stop is given five seconds, and the overflow five more (docs/guide/shutdown.md).
                assert pod["terminationGracePeriodSeconds"] >= options["drain_timeout"] + 10
            if container["name"] == "gateway":
                leaving = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
                drain = gateway_settings(objects, tmp_path).drain_timeout
                assert pod["terminationGracePeriodSeconds"] >= leaving + drain + 5


def test_redis_refuses_before_it_is_killed_for_its_memory(rendered: dict[str, list[Manifest]]) -> None:
    for objects in rendered.values():
        for _, container in containers(objects):
            if container["name"] == "redis":
                options = dict(zip(container["command"][1::2], container["command"][2::2], strict=True))
                assert options["--maxmemory-policy"] == "noeviction"
                kept = int(options["--maxmemory"].removesuffix("mb"))
                assert kept <= 0.7 * 1024 * int(container["resources"]["limits"]["memory"].removesuffix("Gi"))


def test_a_disruption_budget_lets_a_node_be_drained(rendered: dict[str, list[Manifest]]) -> None:
    for each in itertools.chain.from_iterable(rendered.values()):
        if each["kind"] == "PodDisruptionBudget":
            assert each["spec"]["maxUnavailable"] in (1, "25%")


# --- what `forebay` is given -----------------------------------------------------------------------------------------


def test_the_command_line_knows_every_argument(rendered: dict[str, list[Manifest]]) -> None:
    for objects in rendered.values():
        for _, container in containers(objects):
            if "args" not in container:
                assert container["command"][0] == "redis-server"
                continue
            name, options = chart.parse_command(container["args"])
            assert name == {"worker": "worker", "gateway": "gateway", "autoscaler": "autoscale"}[container["name"]]
            (port,) = container["ports"]
            if "listen" in options and options["listen"] is not None:
                assert options["listen"] == f"0.0.0.0:{port['containerPort']}"
            for mounted in filter(None, [options.get("config")]):
                assert [each for each in container["volumeMounts"] if Path(mounted).parent == Path(each["mountPath"])]


def test_an_argument_that_the_command_line_does_not_know_is_found() -> None:
    with pytest.raises(ValueError, match="No such option"):
        chart.parse_command(["worker", "app:supervisor", "--drain-time=5"])


def gateway_settings(objects: list[Manifest], folder: Path) -> GatewaySettings:
    """Return the settings that the gateway has by its arguments and its ConfigMap."""
    (container,) = [each for _, each in containers(objects) if each["name"] == "gateway"]
    _, options = chart.parse_command(container["args"])
    file = folder / options.pop("config").name
    file.write_text(only(objects, "ConfigMap", "-gateway")["data"][file.name])
    named = ("listen", "token_env", "drain_timeout", "workers", "shared")
    given = {name: options[name] for name in named if name in options}
    return load_gateway_settings(file, gateway=given)


def test_the_gateway_accepts_its_configuration(rendered: dict[str, list[Manifest]], tmp_path: Path) -> None:
    for objects in rendered.values():
        for container in (each for _, each in containers(objects) if each["name"] == "gateway"):
            settings = gateway_settings(objects, tmp_path)
            assert settings.listen == f"0.0.0.0:{container['ports'][0]['containerPort']}"
            assert settings.token_env in [each["name"] for each in container["env"]]


def test_gateways_share_their_limits_in_the_redis_of_the_release_or_in_that_of_a_secret(tmp_path: Path) -> None:
    def shared(values: Mapping[str, Any]) -> tuple[GatewaySettings, dict[str, Any]]:
        objects = render(values)
        (container,) = [each for _, each in containers(objects) if each["name"] == "gateway"]
        return gateway_settings(objects, tmp_path), {each["name"]: each for each in container["env"]}

    settings, env = shared(merged(REDIS, WORKER, gateway(replicas=2, shared={"enabled": True})))
    assert (settings.shared, settings.workers) == ("$(FOREBAY_SHARED)", 1)
    assert env["FOREBAY_SHARED"]["value"] == "redis://:$(REDIS_PASSWORD)@rel-forebay-redis:6379/0"
    assert list(env)[:2] == ["REDIS_PASSWORD", "FOREBAY_SHARED"]  # a variable is expanded from those before it
    secret = {"enabled": True, "secret": {"name": "shared", "key": "uri"}}
    settings, env = shared(merged(REDIS, WORKER, gateway(workers=4, shared=secret)))
    assert settings.workers == 4
    assert env["FOREBAY_SHARED"]["valueFrom"]["secretKeyRef"] == {"name": "shared", "key": "uri"}
    settings, env = shared(merged(REDIS, WORKER, gateway()))
    assert (settings.shared, "FOREBAY_SHARED" in env) == (None, False)


def test_the_gateway_reads_the_file_as_it_was_given(tmp_path: Path) -> None:
    example = chart.ROOT / "examples" / "forebay.toml"
    settings = gateway_settings(render(merged(REDIS, WORKER, gateway(config=example.read_text()))), tmp_path)
    options = {"listen": "0.0.0.0:8787", "token_env": "FOREBAY_TOKEN", "drain_timeout": 60.0}
    assert settings == load_gateway_settings(example, gateway=options)


@pytest.mark.parametrize("start", ["  ", "\n\n", "# a comment\n\t", ""])
def test_a_file_that_begins_with_space_is_passed_on(tmp_path: Path, start: str) -> None:
    settings = gateway_settings(render(merged(REDIS, WORKER, gateway(config=start + CONFIG + "\n\n"))), tmp_path)
    assert settings.max_connections == 2_000


def autoscale_settings(objects: list[Manifest], folder: Path) -> AutoscaleSettings:
    """Return the settings that the autoscaler reads from its ConfigMap."""
    (container,) = [each for _, each in containers(objects) if each["name"] == "autoscaler"]
    _, options = chart.parse_command(container["args"])
    file = folder / options["config"].name
    file.write_text(only(objects, "ConfigMap", "-autoscaler")["data"][file.name])
    return load_autoscale_settings(file)


def test_the_autoscaler_accepts_its_configuration(rendered: dict[str, list[Manifest]], tmp_path: Path) -> None:
    for objects in rendered.values():
        for container in (each for _, each in containers(objects) if each["name"] == "autoscaler"):
            settings = autoscale_settings(objects, tmp_path)
            workers = only(objects, "Deployment", "-worker")
            assert isinstance(settings.target, KubernetesTable)
            assert settings.target.workload == f"deployment/{workers['metadata']['name']}"
            assert settings.target.namespace == chart.NAMESPACE
            (port,) = workers["spec"]["template"]["spec"]["containers"][0]["ports"]
            assert settings.target.report_port == port["containerPort"]
            assert settings.autoscaler.overflow_env in [each["name"] for each in container["env"]]
            assert (settings.leader is None) is settings.autoscaler.publish_only
            assert "replicas" not in workers["spec"]  # an upgrade of the release would set them back


def test_the_autoscaler_reads_what_its_values_say(tmp_path: Path) -> None:
    assert autoscale_settings(render(ALL), tmp_path).autoscaler == AutoscalerTable(
        overflow_env="FOREBAY_OVERFLOW",
        task_types=("work", "sum up"),
        seats=4,
        load=0.5,
        minimum=0,
        maximum=1_000_000,
        interval=0.5,
        window=30.0,
        panic_window=3.0,
        stabilization=1_000_000.0,
        service=12.5,
    )


def test_the_autoscaler_has_the_defaults_of_the_library(tmp_path: Path) -> None:
    objects = render(merged(REDIS, WORKER, autoscaler()))
    assert autoscale_settings(objects, tmp_path).autoscaler == AutoscalerTable(
        overflow_env="FOREBAY_OVERFLOW", task_types=("work",), maximum=10
    )


# --- rights ----------------------------------------------------------------------------------------------------------


def test_the_autoscaler_has_the_rights_of_a_role_in_its_namespace(rendered: dict[str, list[Manifest]]) -> None:
    for objects in rendered.values():
        for binding in of_kind(objects, "RoleBinding"):
            (role,) = of_kind(objects, "Role")
            assert binding["roleRef"]["name"] == role["metadata"]["name"]
            pod = only(objects, "Deployment", "-autoscaler")["spec"]["template"]["spec"]
            account = {"kind": "ServiceAccount", "name": pod["serviceAccountName"], "namespace": chart.NAMESPACE}
            assert binding["subjects"] == [account]
            made = [each["metadata"]["name"] for each in of_kind(objects, "ServiceAccount")]
            assert made in ([], [pod["serviceAccountName"]])
        assert not of_kind(objects, "ClusterRole", "ClusterRoleBinding")


Right = tuple[str, str, str, str]  # group, resource, name or "", verb


def granted(role: Manifest) -> set[Right]:
    """Return the rights of a role, one by one."""
    return {
        (group, resource, name, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
        for verb in rule["verbs"]
    }


def used(double: KubernetesDouble) -> set[Right]:
    """Return the rights that the requests of an API server needed."""
    return {
        (
            GROUPS[each.resource.partition("/")[0]],
            each.resource,
            each.name or each.params.get("fieldSelector", "").removeprefix("metadata.name="),
            each.verb,
        )
        for each in double.requests
    }


@virtual
@pytest.mark.blocks
@pytest.mark.parametrize("publish_only", [False, True])
async def test_the_autoscaler_uses_each_of_its_rights_and_needs_no_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, publish_only: bool
) -> None:
    objects = render(merged(REDIS, WORKER, autoscaler(publishOnly=publish_only)))
    settings = autoscale_settings(objects, tmp_path)
    (role,) = of_kind(objects, "Role")
    name = only(objects, "Deployment", "-worker")["metadata"]["name"]
    double = KubernetesDouble()
    double.workload(name, replicas=2)
    double.rules = role["rules"]
    api = KubernetesApi(
        client=client_of("http://kubernetes", namespace=NAMESPACE, transport=KubernetesTransport(double))
    )
    assert isinstance(settings.target, KubernetesTable)
    target: Target = KubernetesTarget(settings.target.workload, report_port=settings.target.report_port, api=api)
    target = PublishedTarget(target) if publish_only else target
    lease = None
    if settings.leader is not None:
        assert isinstance(settings.leader, KubernetesLeaderTable)
        lease = LeaderLease(KubernetesLease(settings.leader.lease_name(settings.lease_target), api=api))
    busy = ScriptedSupervisor(Demand(elsewhere=40))
    await api.open()
    async with Autoscaler(busy, target, task_types=["work"], maximum=10, leader=lease) as scaler:
        await asyncio.sleep(60.0)
        statistics = scaler.statistics()
    await api.close()
    assert used(double) == granted(role)
    # Nobody follows what is published here, and until a service time is known it is twice what is ready at most.
    assert (statistics.desired, statistics.failures) == (4 if publish_only else 10, 0)
    assert double.replicas(name) == (2 if publish_only else 10)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_workers_get_the_overflow_that_is_configured(rendered: dict[str, list[Manifest]]) -> None:
    for name, objects in rendered.items():
        for _, container in containers(objects):
            if container["name"] not in ("worker", "autoscaler"):
                continue
            names = [each["name"] for each in container["env"]]
            overflow = container["env"][names.index("FOREBAY_OVERFLOW")]
            if name.startswith("a URL in a secret"):
                assert overflow["valueFrom"] == {"secretKeyRef": {"name": "overflow", "key": "uri"}}
            elif name.startswith("a URL"):
                assert overflow["value"] == "rediss://redis.example:6379/0"
            else:  # Kubernetes puts variables in that are defined before
                assert names.index("REDIS_PASSWORD") < names.index("FOREBAY_OVERFLOW")
                service = only(objects, "Service", "-redis")
                host = f"redis://:$(REDIS_PASSWORD)@{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
                assert overflow["value"] == f"{host}/0"
                password = container["env"][names.index("REDIS_PASSWORD")]["valueFrom"]
                (server,) = [each for _, each in containers(objects) if each["name"] == "redis"]
                assert password in [each.get("valueFrom") for each in server["env"]]


def test_a_change_of_the_configuration_restarts_the_pods() -> None:
    def annotations(name: str, *values: Mapping[str, Any]) -> Any:
        objects = render(merged(REDIS, WORKER, gateway(), autoscaler(), *values))
        return only(objects, "Deployment", name)["spec"]["template"]["metadata"]["annotations"]

    assert annotations("-gateway") == annotations("-gateway", gateway(replicas=2))
    assert annotations("-gateway") != annotations("-gateway", gateway(config=CONFIG + "rpm = 5\n"))
    assert annotations("-autoscaler") == annotations("-autoscaler", autoscaler(replicas=1))
    assert annotations("-autoscaler") != annotations("-autoscaler", autoscaler(maximum=11))


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (WORKER, "redis.password.secretName is needed"),
        (REDIS, "worker.supervisor is needed"),
        ({"redis": {"enabled": False}, **WORKER}, "overflow.url or overflow.secret.name is needed"),
        (merged(REDIS, WORKER, {"gateway": {"enabled": True}}), "gateway.config is needed"),
        (merged(REDIS, WORKER, {"gateway": {"enabled": True, "config": CONFIG}}), "gateway.token.secretName is needed"),
        (
            merged({"redis": {"enabled": False}, "worker": {"enabled": False}}, gateway(shared={"enabled": True})),
            "gateway.shared.secret.name is needed",
        ),
        (merged(REDIS, worker(replica=3)), "'replica' not allowed"),
        (merged(REDIS, worker(drainSeconds="60")), "got string, want integer"),
        (merged(REDIS, worker(supervisor="app")), "does not match pattern"),
        (merged(REDIS, WORKER, {"image": {"tag": "latest"}}), "/image/tag"),
        ({"redis": {"enabled": False}, "overflow": {"url": "redis://:secret@redis/0"}, **WORKER}, "/overflow/url"),
        (merged(REDIS, worker(disruptionBudget={"maxUnavailable": 0})), "/worker/disruptionBudget/maxUnavailable"),
    ],
)
def test_a_mistake_in_the_values_is_reported(values: Mapping[str, Any], words: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(words)):
        render(values)


# --- the values are described ----------------------------------------------------------------------------------------


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value and key not in ("requests", "limits"):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_the_schema_has_every_value_and_no_other() -> None:
    schema = json.loads((chart.CHART / "values.schema.json").read_text())

    def paths(part: Mapping[str, Any], path: str = "") -> Iterator[str]:
        name = part.get("$ref", "").rpartition("/")[2]
        part = schema["definitions"][name] if name else part
        if "properties" not in part or name == "resources":
            yield path.rstrip(".")
        for key, inner in part.get("properties", {}).items() if name != "resources" else ():
            yield from paths(inner, f"{path}{key}.")

    known = {re.sub(r"\.(requests|limits)$", "", path) for path, _ in _leaves(chart.default_values())}
    assert set(paths(schema)) - {"global"} == known


def test_the_page_has_every_value_with_its_default() -> None:
    page = (chart.ROOT / "docs" / "operate" / "deploy" / "kubernetes.md").read_text()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", page, re.MULTILINE))
    values = dict(_leaves(chart.default_values()))
    assert rows.keys() == values.keys()
    for path, value in values.items():
        assert yaml.safe_load(rows[path].strip("`")) == value, path


def test_the_command_on_the_page_installs_all_of_it(tmp_path: Path) -> None:
    page = (chart.ROOT / "docs" / "operate" / "deploy" / "kubernetes.md").read_text()
    (command,) = re.findall(r"^helm install (.+?)^```", page, re.MULTILINE | re.DOTALL)
    release, folder, *options = shlex.split(command.replace("\\\n", " "))
    assert chart.ROOT / folder == chart.CHART
    values: dict[str, Any] = {}
    given = list(zip(options[::2], options[1::2], strict=True))
    for option, value in given:
        if option == "--set":
            values = merged(values, helm.parse_set_string(value))
    assert given.pop() == ("--set-file", "gateway.config=examples/forebay.toml")
    values["gateway"]["config"] = (chart.ROOT / "examples" / "forebay.toml").read_text()
    objects = render(values, release=release)
    assert {each["metadata"]["name"] for each in workloads(objects)} == {
        "forebay-autoscaler", "forebay-gateway", "forebay-redis", "forebay-worker",
    }  # fmt: skip
    assert gateway_settings(objects, tmp_path).targets
    assert autoscale_settings(objects, tmp_path).autoscaler.seats == 4


def test_the_chart_has_the_version_of_the_library() -> None:
    project = tomllib.loads((chart.ROOT / "pyproject.toml").read_text())["project"]
    metadata = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert metadata["appVersion"] == metadata["version"] == project["version"]


def test_the_notes_name_what_was_installed() -> None:
    text = chart.notes(ALL)
    assert "redis://:PASSWORD@rel-forebay-redis.agents:6379/0" in text
    assert "http://rel-forebay-gateway.agents:8080/v1" in text
    assert "gateway" not in chart.notes(merged(REDIS, WORKER))
