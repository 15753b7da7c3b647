"""What is shown of a saga: a line for each kind of entry."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from forebay.saga import records
from forebay.saga.records import Entry
from forebay.saga.saga_view import describe

KINDS: tuple[type[Entry], ...] = get_args(Entry)
FIELDS: dict[str, Any] = {"step": "act", "function": "call_act", "output": b"secret", "result": b"secret"}
FIELDS |= {"error_type": "ValueError", "error": "ValueError: no", "why": "look at it", "note": "by hand"}


def example_of(kind: type[Any]) -> Entry:
    """Return an entry of a kind, with a value for each field that is known here."""
    values = {name: FIELDS[name] for name in kind.__struct_fields__ if name in FIELDS}
    entry: Entry = kind(at=1.0, **values)
    return entry


def test_each_kind_of_entry_is_one_that_a_log_may_have() -> None:
    defined = {kind for kind in vars(records).values() if isinstance(kind, type) and issubclass(kind, records._Entry)}
    assert set(KINDS) == defined - {records._Entry}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_entry_has_a_line_that_tells_what_it_holds_and_no_output(kind: type[Any]) -> None:
    line = describe(example_of(kind))
    told = [FIELDS[name] for name in kind.__struct_fields__ if name in ("step", "error", "why", "note", "function")]
    assert [text for text in told if text not in line] == []
    assert line.strip()
    assert "secret" not in line


def test_no_two_kinds_of_entries_have_the_same_line() -> None:
    lines = [describe(example_of(kind)) for kind in KINDS]
    assert len(set(lines)) == len(lines)
