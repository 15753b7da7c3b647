"""open_task_store: from the setting `overflow` to a task store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import pytest

from forebay import overflow
from forebay.errors import InvalidOverflowUrl, StoreNotInstalled
from forebay.interfaces import TaskStore
from forebay.overflow import MemoryTaskStore, SqliteTaskStore, open_task_store
from forebay.overflow.redis import RedisTaskStore
from forebay.storage import StoreUrl


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


def test_a_kind_of_url_without_a_task_store_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overflow, "parse_url", lambda _: StoreUrl(scheme="other"))
    with pytest.raises(InvalidOverflowUrl, match="no task store is known for other://"):
        open_task_store("other://host")


@pytest.mark.parametrize("url", ["redis://host", "rediss://host", "redis+sentinel://a,b/s", "redis+cluster://a,b"])
def test_a_url_of_redis_selects_the_store_on_redis(url: str) -> None:
    assert isinstance(open_task_store(url), RedisTaskStore)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "forebay.overflow.redis", raising=False)
    monkeypatch.delitem(sys.modules, "forebay.storage.redis_master", raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(
        StoreNotInstalled, match=r"redis://host:6379/0 needs the library redis.*'forebay\[redis\]'"
    ) as caught:
        open_task_store("redis://user:secret@host")
    assert "secret" not in str(caught.value)
    assert isinstance(open_task_store("memory://"), MemoryTaskStore)


@pytest.mark.parametrize("value", [Path("spill.db"), "sqlite://spill.db"])
def test_what_looks_like_a_path_gets_the_way_to_write_one(value: object) -> None:
    with pytest.raises(InvalidOverflowUrl, match=r'"sqlite:///" \+ str\(path\)'):
        open_task_store(cast("TaskStore", value))


@pytest.mark.parametrize("value", ["postgres://host", "memory://name", 7])
def test_what_is_no_path_gets_no_advice_about_paths(value: object) -> None:
    with pytest.raises(InvalidOverflowUrl) as caught:
        open_task_store(cast("TaskStore", value))
    assert "str(path)" not in str(caught.value)


@pytest.mark.parametrize("results", ["", "&results=memory://", "&results=sqlite:///i.db", "&results=redis://host"])
def test_a_url_of_sqs_selects_the_store_on_sqs(results: str) -> None:
    sqs = pytest.importorskip("forebay.overflow.sqs")
    assert isinstance(open_task_store(f"sqs://queue?region=eu-west-1{results}"), sqs.SqsTaskStore)


def test_sqs_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("forebay.overflow.sqs", "forebay.overflow.sqs_queues"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module in ("botocore", "botocore.exceptions"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StoreNotInstalled, match=r"sqs://queue needs the library botocore.*'forebay\[sqs\]'"):
        open_task_store("sqs://queue?results=redis://user:secret@host")
