"""Ledgers that another version has written."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.ledger_layouts import as_first_layout, spend

from forebay.errors import StoreUnavailable
from forebay.upstream.shared.ledger.ledger import UnreadableLedger, decode_ledger, encode_ledger
from forebay.upstream.shared.ledger.ledger_state import LAYOUT
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore
from forebay.upstream.shared.stores.sqlite_store import SqliteLedgerStore


def stored(path: Path) -> dict[str, Any]:
    """Return the only ledger in a file."""
    with closing(sqlite3.connect(path)) as connection:
        ((state,),) = connection.execute("SELECT state FROM ledger")
    return dict(msgspec.msgpack.decode(state))


def store_instead(path: Path, state: bytes) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE ledger SET state = ?", [state])


@pytest.mark.parametrize("seconds_away", [0.0, 8.0])
def test_a_ledger_of_the_first_layout_goes_on_with_what_was_spent(seconds_away: float) -> None:
    memory = MemoryLedgerStore()
    before = spend(memory, range(1, 5))
    (ledger,) = memory.ledgers.values()
    state = as_first_layout(msgspec.msgpack.decode(encode_ledger(ledger)))
    state["clock"] -= seconds_away
    memory.ledgers["l"] = decode_ledger(msgspec.msgpack.encode(state))
    after = spend(memory, range(5, 8), before)
    assert after.budget is not None
    assert after.budget.spent == 6.0
    assert memory.ledgers["l"].state.layout == LAYOUT


def test_a_file_of_the_first_layout_goes_on_with_what_was_spent(tmp_path: Path) -> None:
    path = tmp_path / "account.db"
    with closing(SqliteLedgerStore(path)) as store:
        before = spend(store, range(1, 5))
        store_instead(path, msgspec.msgpack.encode(as_first_layout(stored(path))))
        after = spend(store, range(5, 8), before)
    assert after.budget is not None
    assert after.budget.spent == 6.0
    assert stored(path)["layout"] == LAYOUT


def test_a_ledger_of_a_newer_version_is_left_as_it_is_and_the_error_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "account.db"
    with closing(SqliteLedgerStore(path)) as store:
        before = spend(store, range(1, 5))
        newer = {**stored(path), "layout": LAYOUT + 1, "spent_in_euros": 4.0}
        store_instead(path, msgspec.msgpack.encode(newer))
        with pytest.raises(StoreUnavailable, match=rf"layout {LAYOUT + 1}; this version knows {LAYOUT}\)\. Update"):
            spend(store, range(5, 8), before)
    assert stored(path) == newer


@pytest.mark.parametrize("data", [b"", b"no ledger", msgspec.msgpack.encode({"epoch": 3}), msgspec.msgpack.encode([1])])
def test_what_is_no_ledger_is_an_error_that_says_so(data: bytes) -> None:
    with pytest.raises(UnreadableLedger) as caught:
        decode_ledger(data)
    assert "something else in the place of a ledger" in str(caught.value.unavailable("account.db"))
