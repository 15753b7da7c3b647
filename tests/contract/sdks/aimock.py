"""aimock from npm, run in another process; `make packages` installs it, by requirements/npm.txt."""

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
NODE_MODULES: Final = _HERE.parents[2] / "build/npm/node_modules"
_PROGRAM: Final = NODE_MODULES / "@copilotkit/aimock/dist/cli.js"
_EXIT_WITH_PARENT: Final = "data:text/javascript,process.stdin.resume();process.stdin.on('end',()=>process.exit())"


class Aimock:
    """A running aimock, as one test sees it.

    Attributes:
        url: of the server.
        test_id: tells the requests of this test from others, in the header ``x-test-id``.
        options: for clients whose requests count for this test.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.test_id = clock.new_id()
        self.options: dict[str, Any] = {"default_headers": {"x-test-id": self.test_id}}

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Return the requests of this test, with their responses."""
        with urllib.request.urlopen(f"{self.url}/__aimock/journal?testId={self.test_id}", timeout=10) as response:  # noqa: S310
            journal: list[dict[str, Any]] = json.load(response)
        return journal


def missing(*needed: Path) -> str | None:
    """Return what must be installed for aimock, and for packages that are needed besides; or None."""
    if shutil.which("node") is None:
        return "node is missing: `make packages` installs Debian's nodejs, as root"
    for path in (_PROGRAM, *needed):
        if not path.exists():
            return f"{path} is missing: `make packages` installs it with npm"
    return None


@contextlib.contextmanager
def running(fixtures: Path = _HERE / "aimock.json") -> Iterator[str]:
    """Run aimock on a free port and yield its URL. It ends with the block, and with this process in any case."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    command = [
        "node",
        "--import",
        _EXIT_WITH_PARENT,
        str(_PROGRAM),
        "--port",
        "0",
        "--fixtures",
        str(fixtures),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        try:
            assert child.stdout is not None
            output = b""
            while (found := re.search(rb"listening on (http://\S+)", output)) is None:
                line = child.stdout.readline()
                assert line, f"aimock did not start: {output.decode()}"
                output += line
            yield found[1].decode()
        finally:
            child.terminate()
