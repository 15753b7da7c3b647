"""From what a user hands in to a ledger."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from forebay.errors import InvalidOverflowUrl
from forebay.interfaces import TaskStore
from forebay.overflow import MemoryTaskStore, SqliteTaskStore, open_task_store


def test_a_url_names_a_kind_of_ledger() -> None:
    assert isinstance(open_task_store("memory://"), MemoryTaskStore)
    assert isinstance(open_task_store("sqlite:///never-opened.db"), SqliteTaskStore)
    assert not Path("never-opened.db").exists()


def test_a_ledger_is_taken_as_it_is() -> None:
    ledger = MemoryTaskStore()
    assert open_task_store(ledger) is ledger


@pytest.mark.parametrize("value", [None, 7, Path("spill.db")])
def test_what_is_neither_is_refused(value: object) -> None:
    with pytest.raises(InvalidOverflowUrl, match="not a URL or a ledger"):
        open_task_store(cast("TaskStore", value))
