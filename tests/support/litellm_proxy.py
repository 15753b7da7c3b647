"""litellm's proxy in an environment of its own, and how that is made."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
ENVIRONMENT: Final = ROOT / ".venv-litellm"
INSTALL: Final = "scripts/bootstrap.sh .venv-litellm '' requirements/litellm.txt"
MASTER_KEY: Final = "sk-litellm-0123456789abcdef0123456789abcdef"
"""The key of its callers; a weaker one it refuses."""
_START_TIMEOUT: Final = 100.0  # seconds; the first start takes thirty


def missing() -> str | None:
    """Return what must be installed, or None."""
    return None if (ENVIRONMENT / "bin/litellm").exists() else f"litellm is missing: {INSTALL}"


@contextlib.contextmanager
def running(config: Path, directory: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Run the proxy on a free port, and yield its URL.

    Args:
        config: its configuration.
        directory: for its log, and its home.
        environment: variables that the configuration names.

    Raises:
        RuntimeError: it did not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [str(ENVIRONMENT / "bin/litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    log = directory / "litellm.log"
    own = {"PATH": os.environ["PATH"], "HOME": str(directory), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**own, "LITELLM_MASTER_KEY": MASTER_KEY, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + _START_TIMEOUT
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/health/liveliness", timeout=5):  # noqa: S310
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    message = f"litellm did not start: {log.read_text()[-2000:]}"
    raise RuntimeError(message)
