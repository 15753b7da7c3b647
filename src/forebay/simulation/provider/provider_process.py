"""The simulated provider as a child process, for demos, benchmarks and tests."""

from __future__ import annotations

import contextlib
import http
import http.client
import json
import selectors
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Final, cast

from forebay.errors import ForebayError
from forebay.simulation.provider.provider_config import ProviderConfig

_START_TIMEOUT: Final = 30.0  # seconds until the child must have printed its URL
_STOP_TIMEOUT: Final = 5.0  # seconds until a terminated child is killed
_REQUEST_TIMEOUT: Final = 10.0  # seconds for an answer to statistics, runs or reset


class ProviderProcessFailed(ForebayError, RuntimeError):
    """The process of the simulated provider failed: {why}."""

    why: str


class ProviderProcess:
    """A simulated provider that serves HTTP in another process.

    Its methods block, for about a millisecond each: in a coroutine, call them in an executor.

    Attributes:
        url: for ``Anthropic(base_url=...)``.
        pid: its process id.
    """

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self.pid = pid

    @property
    def openai_url(self) -> str:
        """The URL for ``OpenAI(base_url=...)``."""
        return f"{self.url}/v1"

    def statistics(self) -> dict[str, Any]:
        """Return the fields of `ProviderStatistics`, decoded from JSON: the keys of `by_status` are strings."""
        return self._request("GET", "/simulation/statistics")

    def runs(self) -> dict[str, dict[str, Any]]:
        """Return the `Bill` of each run that calls named with ``x-simulated-run``."""
        return self._request("GET", "/simulation/runs")

    def reset(self, config: ProviderConfig | None = None) -> None:
        """Restart the provider at second 0, with `config` or with its current configuration."""
        self._request("POST", "/simulation/reset", b"" if config is None else config.to_json())

    def _request(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=_REQUEST_TIMEOUT)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            response = connection.getresponse()
            content = response.read()
        if response.status != http.HTTPStatus.OK:
            raise ProviderProcessFailed(why=f"it answered {method} {path} with {response.status}: {content.decode()}")
        return cast("dict[str, Any]", json.loads(content))


@contextlib.contextmanager
def start_provider(
    config: ProviderConfig | None = None, *, seed: int = 0, traffic: str = "conversation"
) -> Iterator[ProviderProcess]:
    """Serve a simulated provider over HTTP, in a child process that ends with the block or with this process.

    Args:
        config: its capacity, limits and faults; None: the defaults.
        seed: seeds all randomness.
        traffic: traffic whose output lengths are drawn where a call does not fix them: "conversation" or "code".

    Raises:
        ProviderProcessFailed: the process did not start within 30 s, or aiohttp is not installed.
    """
    if find_spec("aiohttp") is None:
        raise ProviderProcessFailed(why="it needs aiohttp: pip install 'forebay[sim]'")
    config = config or ProviderConfig()
    options = ["--attached", "--seed", str(seed), "--traffic", traffic, "--config", config.to_json().decode()]
    command = [sys.executable, "-m", "forebay.simulation", *options]
    # A process group of its own: Ctrl-C in a terminal must reach this process only, which may still need the provider.
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    ) as child:
        try:
            yield _wait_until_ready(child, command)
        finally:
            child.terminate()
            try:
                child.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                child.kill()


def _wait_until_ready(child: subprocess.Popen[bytes], command: list[str]) -> ProviderProcess:
    assert child.stdout is not None  # noqa: S101 - opened as a pipe
    advice = f"run `{shlex.join(command)}` to see why"
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        if not selector.select(_START_TIMEOUT):
            raise ProviderProcessFailed(why=f"it was not ready within {_START_TIMEOUT:.0f} s; {advice}")
    line = child.stdout.readline()
    if not line:
        status = child.wait(_STOP_TIMEOUT)
        raise ProviderProcessFailed(why=f"it ended with status {status} before it was ready; {advice}")
    ready = json.loads(line)
    return ProviderProcess(ready["url"], ready["pid"])
