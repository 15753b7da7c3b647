"""Where the server and the credentials come from, and what is said if they cannot be used."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest
from tests.support.kubernetes_double import NAMESPACE, KubernetesDouble, serve

from forebay.errors import ScalingFailed, StoreNotInstalled
from forebay.scale import KubernetesLease, KubernetesTarget

KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: test, namespace: agents}}]
clusters: [{name: test, cluster: {server: "URL"}}]
users: [{name: test, user: USER}]
"""


def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(textwrap.dedent(text))
    monkeypatch.setenv("KUBECONFIG", str(file))


async def failure(target: KubernetesTarget) -> str:
    with pytest.raises(ScalingFailed) as failed:
        await target.open()
    await target.close()
    return str(failed.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "its configuration is missing or invalid"),
        ("a: [", "ParserError"),
        ("apiVersion: v1", "KeyError: 'clusters'"),
        (KUBECONFIG.replace("current-context: test", "current-context: other"), "Context 'other' not found"),
        (KUBECONFIG.replace("current-context: test", ""), "No current context"),
        (KUBECONFIG.replace("USER", "{client-certificate: /no/such/file, client-key: /no}"), "FileNotFoundError"),
    ],
)
async def test_a_configuration_that_cannot_be_used(
    text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(tmp_path, monkeypatch, text.replace("USER", "{}"))
    found = await failure(KubernetesTarget("deployment/workers"))
    assert found.startswith("Kubernetes cannot be used: its configuration is missing or invalid (")
    assert why in found
    assert found.endswith("set KUBECONFIG to a file that kubectl accepts, or run in a pod with a service account.")
    assert "\n" not in found


async def test_several_files_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert "KUBECONFIG names 2 files; merge them into one" in await failure(KubernetesTarget("deployment/workers"))
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "~/.kube/config not found" in await failure(KubernetesTarget("deployment/workers"))


@pytest.mark.blocks
async def test_a_plugin_that_gives_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text('#!/bin/sh\necho \'{"status": {"token": "a-token"}}\'\n')
    plugin.chmod(0o755)
    double = KubernetesDouble()
    double.token = "a-token"  # noqa: S105
    double.workload(replicas=2)
    async with serve(double) as url:
        user = "{exec: {apiVersion: client.authentication.k8s.io/v1beta1, command: PLUGIN}}"
        text = KUBECONFIG.replace("URL", url).replace("USER", user)
        config(tmp_path, monkeypatch, text.replace("PLUGIN", str(plugin)))
        target = KubernetesTarget("deployment/workers")
        await target.open()
        assert (await target.replicas()).current == 2
        await target.close()
        config(tmp_path, monkeypatch, text.replace("PLUGIN", str(tmp_path / "none")))
        assert "its credentials cannot be read: FileNotFoundError" in await failure(
            KubernetesTarget("deployment/workers")
        )


@pytest.mark.blocks
async def test_a_namespace_and_a_context_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = KubernetesDouble()
    double.workload(replicas=2)
    async with serve(double) as url:
        text = KUBECONFIG.replace("URL", url).replace("USER", "{token: a}")
        config(tmp_path, monkeypatch, text.replace("namespace: agents", "namespace: other"))
        assert "in namespace 'other' cannot be used: there is no such object" in await failure(
            KubernetesTarget("deployment/workers")
        )
        for target in (
            KubernetesTarget("deployment/workers", namespace=NAMESPACE),
            KubernetesTarget("deployment/workers", namespace=NAMESPACE, context="test"),
        ):
            await target.open()
            await target.close()
        assert "Context 'none' not found" in await failure(KubernetesTarget("deployment/workers", context="none"))


async def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config(tmp_path, monkeypatch, KUBECONFIG.replace("URL", "http://127.0.0.1:1").replace("USER", "{token: a}"))
    assert "the API server cannot be reached (ConnectError: " in await failure(KubernetesTarget("deployment/workers"))


async def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "forebay.scale.kubernetes_client", raising=False)
    monkeypatch.setitem(sys.modules, "lightkube", None)
    for owner, made in (("KubernetesTarget", KubernetesTarget("deployment/a")), ("KubernetesLease", KubernetesLease())):
        with pytest.raises(StoreNotInstalled, match=rf"{owner} needs the library lightkube.*forebay\[kubernetes\]"):
            await made.open()
