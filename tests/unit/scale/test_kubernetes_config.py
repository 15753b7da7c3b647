"""Where the server and the credentials come from, and what is said if they cannot be used."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import textwrap
from pathlib import Path

import pytest
from tests.support.kubernetes_double import NAMESPACE, KubernetesDouble, serve

from forebay.errors import ScalingFailed, StoreNotInstalled
from forebay.scale import KubernetesLease, KubernetesTarget
from forebay.scale.kubernetes_client import connect

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


def with_plugin(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure a plugin, which is a shell script."""
    plugin = folder / "plugin"
    plugin.write_text(f"#!/bin/sh\n{script}\n")
    plugin.chmod(0o755)
    user = f"{{exec: {{apiVersion: client.authentication.k8s.io/v1, command: {plugin}}}}}"
    config(folder, monkeypatch, KUBECONFIG.replace("URL", "http://127.0.0.1:1").replace("USER", user))


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
@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo password=secret >&2; exit 3", "plugin has ended with 3: run it by hand"),
        ("echo secret", "plugin gives no token (JSONDecodeError)"),
        (
            """echo '{"status": {"clientKeyData": "secret"}}'""",
            "gives no token (KeyError); certificates of plugins are",
        ),
    ],
)
async def test_a_plugin_that_gives_no_token(
    script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plugin(script, tmp_path, monkeypatch)
    client = connect(None, 5.0)
    with pytest.raises(ConnectionError, match=re.escape(why)) as failed:
        await client.request("GET", "/", params={}, body=None)
    assert "secret" not in str(failed.value)
    await client.close()


@pytest.mark.blocks
async def test_a_plugin_that_hangs_ends_with_its_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_plugin(f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 300", tmp_path, monkeypatch)
    client = connect(None, 5.0)
    asking = asyncio.ensure_future(client.request("GET", "/", params={}, body=None))
    while not (tmp_path / "pid").exists():  # noqa: ASYNC110 - another process makes it
        await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait((asking,))
    stat = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # it has been killed, and the system may take a moment
    await client.close()


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
