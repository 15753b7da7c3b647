"""The Helm chart in deploy/helm, rendered by Helm's own library, and the manifests of deploy/ checked by schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import typer
import yaml
from referencing import Registry, Resource

from forebay.cli.app import app

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy"
CHART: Final = DEPLOY / "helm" / "forebay"
NAMESPACE: Final = "agents"
OLDEST: Final = "1.27.0"  # of Kubernetes: `kubeVersion` of the chart
NEWEST: Final = "1.37.0"

Manifest = dict[str, Any]


def load_chart() -> Any:
    """Return the chart as Helm loads it. Skip the test where its library is not installed."""
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")
    return helm.Chart.load(str(CHART))


def render(values: Mapping[str, Any], *, release: str = "rel") -> list[Manifest]:
    """Return the objects that the chart makes of values.

    Raises:
        HelmError: the values are invalid, or a template fails.
    """
    with load_chart() as chart:
        texts = chart.render(dict(values), name=release, namespace=NAMESPACE)
    documents = (yaml.safe_load_all(text) for name, text in sorted(texts.items()) if name.endswith(".yaml"))
    return [each for part in documents for each in part if each is not None]


def notes(values: Mapping[str, Any]) -> str:
    """Return what Helm prints after an installation."""
    with load_chart() as chart:
        text = chart.render(dict(values), name="rel", namespace=NAMESPACE)["forebay/templates/NOTES.txt"]
    assert isinstance(text, str)
    return text


def default_values() -> dict[str, Any]:
    """Return the values of the chart."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert isinstance(values, dict)
    return values


# --- schemas ---


@cache
def _schemas(version: str) -> tuple[Any, Registry[Any]]:
    """Return the folder of the strict schemas of a version of Kubernetes, and their definitions."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    definitions = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return folder, Registry().with_resource(definitions.id() or "_definitions.json", definitions)


@cache
def _validator(kind: str, api: str, version: str) -> jsonschema.Draft202012Validator:
    folder, registry = _schemas(version)
    group, _, rest = api.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.partition(".")[0], rest)))
    schema = json.loads((folder / f"{name}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def validate(manifest: Manifest, version: str = NEWEST) -> None:
    """Validate an object by the schema of Kubernetes, in which unknown fields are mistakes.

    Raises:
        ValidationError: it is not valid.
        FileNotFoundError: Kubernetes has no such kind.
    """
    _validator(manifest["kind"], manifest["apiVersion"], version).validate(manifest)


# --- parts ---


def of_kind(objects: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    """Return the objects of some kinds."""
    return [each for each in objects if each["kind"] in kinds]


def only(objects: Sequence[Manifest], kind: str, suffix: str) -> Manifest:
    """Return the one object of a kind whose name ends so."""
    (found,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"].endswith(suffix)]
    return found


def workloads(objects: Sequence[Manifest]) -> list[Manifest]:
    """Return the objects that make pods."""
    return of_kind(objects, "Deployment", "StatefulSet")


def containers(objects: Sequence[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Yield each container with the specification of its pod."""
    for workload in workloads(objects):
        pod = workload["spec"]["template"]["spec"]
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            yield pod, container


# --- commands ---


@cache
def _commands() -> Any:
    return typer.main.get_command(app)


def parse_command(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the command that ``forebay`` runs for its arguments, and the values of its options.

    Raises:
        ValueError: there is no such command or option, or a value is invalid.
    """
    group = _commands()
    name, *rest = arguments
    command = group.get_command(typer.Context(group), name)
    if command is None:
        raise ValueError(f"forebay has no command {name!r}")
    try:
        return name, command.make_context(name, list(rest)).params
    except Exception as error:  # typer has a click of its own, whose errors it does not export
        raise ValueError(f"forebay {' '.join(arguments)}: {error}") from error
