"""``forebay autoscale`` as it runs, with a target in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support.redis_servers import free_port

from forebay.cli import autoscale
from forebay.cli.autoscale_config import ProcessTable, load_autoscale_settings
from forebay.scale import Replicas

CONFIG = """
[autoscaler]
overflow = "sqlite:///{folder}/a.db"
task_types = ["work"]
minimum = 2
maximum = 3
interval = 0.001
{more}

[target.process]
supervisor = "app:supervisor"
"""


class Target:
    """Replicas that are ready at once."""

    name = "pods"
    outside = True

    def __init__(self) -> None:
        self.current = 1
        self.scaled: list[int] = []
        self.read = 0
        self.often_read = asyncio.Event()

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    async def replicas(self) -> Replicas:
        self.read += 1
        if self.read > 5:
            self.often_read.set()
        return Replicas(current=self.current, ready=self.current)

    async def scale(self, replicas: int) -> None:
        self.scaled.append(replicas)
        self.current = replicas


async def get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        return (await reader.read()).decode()
    finally:
        writer.close()


@pytest.mark.blocks
@pytest.mark.parametrize(("more", "scaled"), [("", [2]), ("publish_only = true", [])])
async def test_it_scales_or_only_publishes_and_says_how_it_is(
    more: str, scaled: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "autoscale.toml"
    file.write_text(CONFIG.format(folder=tmp_path, more=more))
    settings = load_autoscale_settings(file)
    target = Target()
    monkeypatch.setattr(ProcessTable, "target", lambda _: target)
    port = free_port()
    running = asyncio.ensure_future(autoscale._scale(settings, ("127.0.0.1", port)))
    await target.often_read.wait()
    assert target.scaled == scaled
    metrics = await get(port, "/metrics")
    assert '\nforebay_desired_replicas{target="pods"} 2\n' in metrics
    assert '"desired":2,' in await get(port, "/report")
    for path in ("/healthz", "/readyz"):
        assert (await get(port, path)).startswith("HTTP/1.1 200 ")
    running.cancel()
    await asyncio.wait((running,))
    with pytest.raises(ConnectionError):
        await get(port, "/healthz")
