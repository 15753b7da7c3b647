"""Handlers in processes of their own (`engine="process"`) of two supervisors: their calls use one quota."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.redis_servers import until
from tests.support.shared_agents import CALLS, SLOTS

PATIENCE = 120.0  # seconds on a slow machine


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_processes_of_two_supervisors_use_one_quota_while_one_supervisor_is_killed(tmp_path: Path) -> None:
    """What a killed process had leased counts as used: a lease of each is a waiting call, and 2 % of the quota."""
    file, url = tmp_path / "calls", f"sqlite:///{tmp_path}/account.db"
    command = [sys.executable, "-m", "tests.support.shared_agents", url, str(file)]

    def calls() -> Counter[str]:
        return Counter(file.read_text().split()) if file.exists() else Counter()

    with ExitStack() as stack:
        killed, other = (stack.enter_context(subprocess.Popen(command)) for _ in range(2))
        for each in (killed, other):
            stack.callback(each.kill)
        until(lambda: len(calls()) == 2, "both call", within=PATIENCE)
        killed.send_signal(signal.SIGKILL)
        assert other.wait(PATIENCE) == 0
    lost = SLOTS * (1 + int(0.02 * CALLS)) + SLOTS
    assert CALLS - lost <= calls().total() <= CALLS
    assert set(calls()) == {str(killed.pid), str(other.pid)}
