"""litellm's proxy as it comes: ``python -m bench.proxies.litellm_proxy URL`` prints its port and its process id.

It has one worker, and runs in an environment of its own, since it pins what it needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from bench.proxies.load import KEY

PROGRAM = Path(__file__).parents[2] / ".venv-litellm/bin/litellm"
INSTALL = "scripts/bootstrap.sh .venv-litellm '' requirements/litellm.txt"
START_TIMEOUT = 120.0  # seconds; the first start takes thirty


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until the proxy answers; exit if it does not."""
    end = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).close()
            return
        time.sleep(0.1)
    process.kill()
    sys.exit(f"litellm did not start: {log.read_text()[-2000:]}")


def serve(url: str) -> None:
    """Run the proxy until this process is terminated."""
    if not PROGRAM.exists():
        sys.exit(f"litellm is missing; this installs it: {INSTALL}")
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        config, log = Path(directory, "litellm.yaml"), Path(directory, "log")
        parameters = {"model": "openai/gpt-4o", "api_base": f"{url}/v1", "api_key": "sk-1"}
        settings = {"model_list": [{"model_name": "gpt-4o", "litellm_params": parameters}]}
        config.write_text(json.dumps(settings))  # JSON is YAML
        environment = {"PATH": os.environ["PATH"], "HOME": directory, "LITELLM_MASTER_KEY": KEY, "LITELLM_LOG": "ERROR"}
        command = [str(PROGRAM), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603
                command,
                env={**environment, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
                stdout=output,
                stderr=output,
            )
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        wait_until_ready(process, port, log)
        print(port, process.pid, flush=True)
        process.wait()


if __name__ == "__main__":
    serve(sys.argv[1])
