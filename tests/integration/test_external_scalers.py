"""The examples with which KEDA, or a HorizontalPodAutoscaler, sets the replicas that the autoscaler publishes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import pytest
import yaml
from tests.support import chart
from tests.support.chart import DEPLOY, ROOT, Manifest, only, render

from forebay.cli.autoscale_config import load_autoscale_settings
from forebay.cli.autoscale_metrics import render_metrics
from forebay.scale import AutoscalerStatistics

FOLDER: Final = DEPLOY / "kubernetes"
NPM: Final = ROOT / "build" / "npm"
VALIDATE: Final = """
import { ScaledObject } from "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject";
import { readFileSync } from "node:fs";
new ScaledObject(JSON.parse(readFileSync(0))).validate();
"""


def load(name: str) -> Manifest:
    document = yaml.safe_load((FOLDER / name).read_text())
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="module")
def installed() -> list[Manifest]:
    """Return the objects of a release called forebay, with the values of the examples."""
    return render(load("values.yaml"), release="forebay")


def bounds(installed: list[Manifest]) -> tuple[int, int]:
    values = load("values.yaml")["autoscaler"]
    assert f"maximum = {values['maximum']}" in only(installed, "ConfigMap", "-autoscaler")["data"]["autoscale.toml"]
    return values["minimum"], values["maximum"]


def check_keda(manifest: Manifest) -> subprocess.CompletedProcess[str]:
    """Check an object by KEDA's schema."""
    node = shutil.which("node")
    if node is None or not (NPM / "node_modules" / "@kubernetes-models").is_dir():
        pytest.skip("node, or @kubernetes-models/keda of npm, is missing: `make packages`")
    command = (node, "--input-type=module", "--eval", VALIDATE)
    text = json.dumps(manifest)
    return subprocess.run(command, cwd=NPM, input=text, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.blocks
def test_keda_takes_its_example() -> None:
    manifest = load("keda.yaml")
    assert check_keda(manifest).stderr == ""
    manifest["spec"]["maxReplicaCount"] = "ten"
    assert "data/spec/maxReplicaCount must be integer" in check_keda(manifest).stderr


@pytest.mark.parametrize("version", [chart.OLDEST, chart.NEWEST])
def test_kubernetes_takes_its_example(version: str) -> None:
    hpa = load("hpa.yaml")
    chart.validate(hpa, version)
    keda = load("keda.yaml")["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    assert keda["behavior"] == hpa["spec"]["behavior"]  # which KEDA gives to an autoscaler of its own


def test_they_scale_the_workers_within_the_bounds_of_the_autoscaler(installed: list[Manifest]) -> None:
    workers = only(installed, "Deployment", "-worker")
    assert "replicas" not in workers["spec"]
    keda, hpa = load("keda.yaml")["spec"], load("hpa.yaml")["spec"]
    assert keda["scaleTargetRef"]["name"] == hpa["scaleTargetRef"]["name"] == workers["metadata"]["name"]
    assert (hpa["scaleTargetRef"]["apiVersion"], hpa["scaleTargetRef"]["kind"]) == ("apps/v1", "Deployment")
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == bounds(installed)
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == bounds(installed)


def test_keda_asks_the_autoscaler_for_a_number_that_it_reports(installed: list[Manifest]) -> None:
    (trigger,) = load("keda.yaml")["spec"]["triggers"]
    url = urlsplit(trigger["metadata"]["url"])
    service = only(installed, "Service", "-autoscaler")
    assert (url.hostname, url.port) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert url.path == "/report"
    report = json.loads(msgspec.json.encode(AutoscalerStatistics(desired=7)))
    assert report[trigger["metadata"]["valueLocation"]] == 7
    assert (trigger["metricType"], trigger["metadata"]["targetValue"]) == ("AverageValue", "1")


def test_the_metric_is_one_that_the_autoscaler_has(installed: list[Manifest], tmp_path: Path) -> None:
    file = tmp_path / "autoscale.toml"
    file.write_text(only(installed, "ConfigMap", "-autoscaler")["data"][file.name])
    settings = load_autoscale_settings(file)
    assert settings.autoscaler.publish_only
    (metric,) = load("hpa.yaml")["spec"]["metrics"]
    (rule,) = load("prometheus-adapter.yaml")["rules"]["external"]
    name = metric["external"]["metric"]["name"]
    text = render_metrics(settings.target.target().name, AutoscalerStatistics(desired=7))
    assert f"\n{rule['seriesQuery']} 7\n" in text
    assert rule["seriesQuery"].startswith(f"{name}{{")
    labels = rule["seriesQuery"].removeprefix(f"{name}{{")
    assert rule["metricsQuery"] == f"max(<<.Series>>{{<<.LabelMatchers>>,{labels})"  # each replica of it has it
    pods = only(installed, "Deployment", "-autoscaler")["spec"]["template"]
    annotations: dict[str, Any] = pods["metadata"]["annotations"]
    (port,) = only(installed, "Service", "-autoscaler")["spec"]["ports"]
    assert annotations["prometheus.io/port"] == str(port["port"])


def test_keda_asks_the_only_autoscaler(installed: list[Manifest]) -> None:
    assert only(installed, "Deployment", "-autoscaler")["spec"]["replicas"] == 1


def test_the_metrics_are_those_on_the_page() -> None:
    page = (ROOT / "docs" / "operate" / "deploy" / "external-metrics.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `forebay_")]
    rendered = render_metrics("workers", AutoscalerStatistics(limited_by="host"))
    assert set(re.findall(r"forebay_\w+", " ".join(rows))) == set(re.findall(r"^forebay_\w+", rendered, re.MULTILINE))
