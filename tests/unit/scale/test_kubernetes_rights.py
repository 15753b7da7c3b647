"""The Role on the page of auto-scaling: it is enough for all that is asked of the server, and no right is too many."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.kubernetes_double import KubernetesDouble, KubernetesTransport
from tests.unit.scale.test_kubernetes import api_of

from forebay.errors import ScalingFailed
from forebay.scale import KubernetesLease, KubernetesTarget, LeaderLease
from forebay.testing import virtual

PAGE = Path(__file__).parents[3] / "docs" / "guide" / "autoscaling.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
MANIFESTS = [manifest for block in BLOCKS for manifest in yaml.safe_load_all(block)]


def manifest(kind: str) -> Any:
    (found,) = (each for each in MANIFESTS if each["kind"] == kind)
    return found


RULES: list[dict[str, Any]] = manifest("Role")["rules"]


def fewer() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the rules without one verb, for each verb of each rule."""
    for index, rule in enumerate(RULES):
        for verb in rule["verbs"]:
            rules = copy.deepcopy(RULES)
            rules[index]["verbs"].remove(verb)
            yield f"{verb} {rule['resources'][0]}", rules


async def use_all(rules: list[dict[str, Any]]) -> KubernetesDouble:
    """Do all that an autoscaler does; raise what it cannot."""
    double = KubernetesDouble()
    double.rules = rules
    double.workload(replicas=1)
    double.pod("workers-1", "10.0.0.1")
    transport = KubernetesTransport(double)
    transport.plain["http://10.0.0.1:9000/report"] = b'{"running": 1, "service": 2.0}'
    api = api_of(double, transport)
    target = KubernetesTarget("deployment/workers", api=api, report_port=9000)
    lease = LeaderLease(KubernetesLease(api=api))
    try:
        await target.open()
        await lease.open()
        await asyncio.sleep(10.0)
        await target.scale(3)
        await asyncio.sleep(10.0)
        replicas = await target.replicas()
        if replicas.ready != 3:
            raise ScalingFailed(what="the watch", why="it says nothing")
        if replicas.service is None:
            raise ScalingFailed(what="the pods", why="they do not report")
        if lease.leads_until < asyncio.get_running_loop().time():
            raise ScalingFailed(what="the lease", why="it is not renewed")
    finally:
        await lease.close()
        await target.close()
        await api.close()
    return double


@virtual
async def test_the_rights_on_the_page_are_enough() -> None:
    double = await use_all(RULES)
    asked = {(request.verb, request.resource) for request in double.requests}
    assert asked == {(verb, resource) for rule in RULES for verb in rule["verbs"] for resource in rule["resources"]}


@pytest.mark.parametrize(("right", "rules"), list(fewer()), ids=[right for right, _ in fewer()])
@virtual
async def test_no_right_on_the_page_is_too_many(right: str, rules: list[dict[str, Any]]) -> None:
    del right
    with pytest.raises(ScalingFailed):
        await use_all(rules)


def test_the_manifests_fit_together() -> None:
    binding, account, role = manifest("RoleBinding"), manifest("ServiceAccount"), manifest("Role")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account["metadata"]["name"]}]
    deployment = manifest("Deployment")
    assert {name for rule in RULES[:2] for name in rule["resourceNames"]} == {deployment["metadata"]["name"]}
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]
    assert pod["terminationGracePeriodSeconds"] > float(command[command.index("--drain-timeout") + 1])
    port = int(command[command.index("--listen") + 1].rpartition(":")[2])
    assert {container[probe]["httpGet"]["port"] for probe in ("readinessProbe", "livenessProbe")} == {port}
    assert "replicas" not in deployment["spec"]
