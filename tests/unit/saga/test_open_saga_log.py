"""open_saga_log: from the setting `saga_log` to a saga log."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from forebay.errors import InvalidSagaLogUrl
from forebay.saga import MemorySagaLog, SagaLog, open_saga_log
from forebay.saga.sqlite_log import SqliteSagaLog


def test_a_url_selects_the_kind_of_log() -> None:
    assert isinstance(open_saga_log("memory://"), MemorySagaLog)
    assert isinstance(open_saga_log("sqlite:///never-opened.db?fsync=checkpoint"), SqliteSagaLog)
    assert not Path("never-opened.db").exists()


def test_a_saga_log_is_returned_as_it_is() -> None:
    log = MemorySagaLog()
    assert open_saga_log(log) is log


@pytest.mark.parametrize("value", [None, 7, Path("saga.db"), ["memory://"]])
def test_any_other_value_is_rejected(value: object) -> None:
    with pytest.raises(InvalidSagaLogUrl, match="not a URL or a saga log"):
        open_saga_log(cast("SagaLog", value))


@pytest.mark.parametrize(
    "url",
    [
        "memory://?bound=7",
        "sqlite:///saga.db?bound=7",
        "sqlite:///saga.db?fsync=no&bound=100000",
        "redis://user:secret@host/0?bound=7",
        "redis+cluster://host:7000?bound=7&name=sagas",
    ],
)
def test_a_bound_is_rejected_for_a_saga_log_has_none(url: str) -> None:
    with pytest.raises(InvalidSagaLogUrl, match="bound is an option of an overflow") as error:
        open_saga_log(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("sqlite:///saga.db?fsync=maybe", "none of yes, checkpoint, no"),
        ("sqlite:///saga.db?colour=red", "it has no option 'colour'"),
        ("sqlite:///", "names no file"),
        ("sqs://queue", "no saga log is known for sqs://"),
        ("saga.db", "does not begin with the name of a store"),
        ("postgres://user:secret@host/db", "there is no store 'postgres'"),
    ],
)
def test_a_url_that_names_no_saga_log_is_rejected_with_the_forms_of_those_that_do(url: str, why: str) -> None:
    with pytest.raises(InvalidSagaLogUrl, match=why) as error:
        open_saga_log(url)
    assert str(error.value).startswith("The saga log ")
    assert "sqlite:///saga.db, redis://" in str(error.value)
    assert "bound" not in str(error.value)
    assert "secret" not in str(error.value)
