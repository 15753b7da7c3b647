"""An application that `uvicorn --workers 2` runs: its upstream is one for all workers if it is shared."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tests.support.redis_servers import free_port, until

APPLICATION = """
import os
from forebay import Budget, Overloaded, Price, Upstream

upstream = Upstream(
    "openai", budget=Budget(usd=8), prices={"m": Price(input=0, output=1e6)}, shared=os.environ["SHARED"], max_wait=1
)

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    status = 200
    if scope["path"] == "/call":
        try:
            async with upstream.call("m", output_tokens=1) as call:
                call.settle(input_tokens=0, output_tokens=1)
        except Overloaded:
            status = 503
    await send({"type": "http.response.start", "status": status})
    await send({"type": "http.response.body", "body": b""})
"""


def call(url: str) -> int:
    """Make a call on a connection of its own; return the status of its answer."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - http
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def answers(url: str) -> bool:
    """Return whether a server answers."""
    try:
        call(url)
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_workers_of_uvicorn_spend_one_budget(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    (tmp_path / "application.py").write_text(APPLICATION)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "application:app", "--port", str(port), "--workers", "2"]
    environment = {**os.environ, "SHARED": f"sqlite:///{tmp_path}/account.db"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: answers(f"{url}/"), "uvicorn answers", within=60.0)
            statuses = [call(f"{url}/call") for _ in range(20)]
        finally:
            process.terminate()
            process.wait(60)
    assert statuses.count(200) == 8
