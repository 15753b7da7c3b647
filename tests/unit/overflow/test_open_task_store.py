"""open_task_store: from the setting `overflow` to a task store."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from forebay.errors import InvalidOverflowUrl
from forebay.interfaces import TaskStore
from forebay.overflow import MemoryTaskStore, SqliteTaskStore, open_task_store


def test_a_url_selects_the_kind_of_store() -> None:
    assert isinstance(open_task_store("memory://"), MemoryTaskStore)
    assert isinstance(open_task_store("sqlite:///never-opened.db"), SqliteTaskStore)
    assert not Path("never-opened.db").exists()


def test_a_task_store_is_returned_as_it_is() -> None:
    store = MemoryTaskStore()
    assert open_task_store(store) is store


@pytest.mark.parametrize("value", [None, 7, Path("spill.db")])
def test_any_other_value_is_rejected(value: object) -> None:
    with pytest.raises(InvalidOverflowUrl, match="not a URL or a task store"):
        open_task_store(cast("TaskStore", value))
