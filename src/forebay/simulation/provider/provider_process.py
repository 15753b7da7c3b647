"""The plant as a child process, for demos, benches and tests."""

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
from typing import Any, Final, cast

from forebay.errors import ForebayError
from forebay.simulation.provider.provider_config import ProviderConfig

_READY: Final = 30.0  # seconds until a child must have said its URL
_END: Final = 5.0  # seconds that it is given to end
_ANSWER: Final = 10.0  # seconds for an answer about itself


class ProviderProcessFailed(ForebayError, RuntimeError):
    """The simulated provider in a process of its own failed: {why}."""

    why: str


class ProviderProcess:
    """A simulated provider that serves in another process.

    Its methods block, for about a millisecond each: from a coroutine, call them in an executor.
    """

    def __init__(self, url: str, pid: int) -> None:
        self.url = url
        self.pid = pid

    @property
    def openai_url(self) -> str:
        """For ``OpenAIWriter(base_url=...)``. Anthropic's client takes `url` itself."""
        return f"{self.url}/v1"

    def statistics(self) -> dict[str, Any]:
        """The fields of `ProviderStatistics`, as read from JSON: keys of `by_status` are strings."""
        return self._request("GET", "/plant/statistics")

    def runs(self) -> dict[str, dict[str, Any]]:
        """The `Bill` of each run that calls named with ``x-plant-run``."""
        return self._request("GET", "/plant/runs")

    def reset(self, config: ProviderConfig | None = None) -> None:
        """Begin anew at second 0, with the same configuration or another."""
        self._request("POST", "/plant/reset", b"" if config is None else config.to_json())

    def _request(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=_ANSWER)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            answer = connection.getresponse()
            told = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise ProviderProcessFailed(why=f"it answered {method} {path} with {answer.status}: {told.decode()}")
        return cast("dict[str, Any]", json.loads(told))


@contextlib.contextmanager
def start_provider(
    config: ProviderConfig | None = None, *, seed: int = 0, traffic: str = "conversation"
) -> Iterator[ProviderProcess]:
    """Start a plant in a process of its own, and end it with the block; it ends with this process in any case.

    Args:
        config: what it is like.
        seed: all its chance comes from it.
        traffic: whose answers it gives where a call does not fix the length: "conversation" or "code".

    Raises:
        PlantFailed: it said no URL within 30 s.
    """
    config = config or ProviderConfig()
    options = ["--attached", "--seed", str(seed), "--traffic", traffic, "--config", config.to_json().decode()]
    command = [sys.executable, "-m", "forebay.simulation", *options]
    # A process group of its own: a Ctrl-C in the terminal is for its owner, who may still need it to finish.
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    ) as child:
        try:
            yield _ready(child, command)
        finally:
            child.terminate()
            try:
                child.wait(_END)
            except subprocess.TimeoutExpired:
                child.kill()


def _ready(child: subprocess.Popen[bytes], command: list[str]) -> ProviderProcess:
    assert child.stdout is not None  # noqa: S101 - it was asked for
    by_hand = f"run `{shlex.join(command)}` by hand to see it"
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        if not selector.select(_READY):
            raise ProviderProcessFailed(why=f"it was not ready within {_READY:.0f} s; {by_hand}")
    line = child.stdout.readline()
    if not line:
        raise ProviderProcessFailed(why=f"it ended with status {child.wait(_END)} before it was ready; {by_hand}")
    told = json.loads(line)
    return ProviderProcess(told["url"], told["pid"])
