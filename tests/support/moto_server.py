"""A server that simulates AWS on the loopback interface, for the session of tests that asks for it first."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import subprocess
import sys
import time

import pytest

# What the clients of this process and of its children sign with; the server does not check it.
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret"}


@functools.cache
def endpoint() -> str:
    """Return the address of the server, having started it. Skip the test where its packages are not installed."""
    for package in ("moto", "flask", "botocore"):
        pytest.importorskip(package)
    os.environ.update(_CREDENTIALS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(_end, server, os.getpid())
    give_up = time.monotonic() + 60.0
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            if server.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError("the simulated AWS did not start") from None
            time.sleep(0.05)
        else:
            return f"http://127.0.0.1:{port}"


def _end(server: subprocess.Popen[bytes], parent: int) -> None:
    if os.getpid() == parent:  # and no child that was forked from it
        server.kill()
        server.wait()
