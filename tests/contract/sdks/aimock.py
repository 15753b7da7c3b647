"""aimock from npm, in a process of its own: what `requirements/npm.txt` names, as `make packages` installs it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from forebay import clock

_HERE: Final = Path(__file__).parent
_PROGRAM: Final = _HERE.parents[2] / "build/npm/node_modules/@copilotkit/aimock/dist/cli.js"
_ENDS_WITH_US: Final = "data:text/javascript,process.stdin.resume();process.stdin.on('end',()=>process.exit())"


class Aimock:
    """One test's view of it.

    Attributes:
        url: where it is.
        options: of the clients whose requests it counts for this test.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._test = clock.new_id()
        self.options: dict[str, Any] = {"default_headers": {"x-test-id": self._test}}

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The requests of this test, with what was answered."""
        with urllib.request.urlopen(f"{self.url}/__aimock/journal?testId={self._test}", timeout=10) as answer:  # noqa: S310
            told: list[dict[str, Any]] = json.load(answer)
        return told


def missing() -> str | None:
    """What would have to be installed, or None."""
    if shutil.which("node") is None:
        return "node is missing: `make packages` installs Debian's nodejs, as root"
    if not _PROGRAM.exists():
        return f"{_PROGRAM} is missing: `make packages` installs it with npm"
    return None


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Run it on a free port; its URL. It ends with the block, and with this process in any case."""
    if (what := missing()) is not None:
        pytest.skip(what)
    command = [
        "node",
        "--import",
        _ENDS_WITH_US,
        str(_PROGRAM),
        "--port",
        "0",
        "--fixtures",
        str(_HERE / "aimock.json"),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        try:
            assert child.stdout is not None
            said = b""
            while (found := re.search(rb"listening on (http://\S+)", said)) is None:
                line = child.stdout.readline()
                assert line, f"aimock did not start: {said.decode()}"
                said += line
            yield found[1].decode()
        finally:
            child.terminate()
