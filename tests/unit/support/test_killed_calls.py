"""The check with killed processes finds stores that acknowledge what they have not written."""

from __future__ import annotations

from pathlib import Path

from tests.support.killed_calls import KILLED_CALLS, lost_calls
from tests.support.task_stores import STORES

(SQLITE,) = [backend for backend in STORES if backend.name == "sqlite"]


def test_a_store_that_returns_before_its_writes_loses_every_call(tmp_path: Path) -> None:
    assert lost_calls(SQLITE, tmp_path, opener="postponing") == list(KILLED_CALLS)


def test_a_store_that_writes_no_renewal_loses_that_call(tmp_path: Path) -> None:
    assert lost_calls(SQLITE, tmp_path, opener="not renewing") == ["renew"]
