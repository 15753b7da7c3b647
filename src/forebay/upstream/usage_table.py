"""UsageTable: what the calls of an upstream have used, added up by tenant, model and keys."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import msgspec

from forebay._json import JsonStruct
from forebay.call_usage import NO_USAGE, CallUsage

OTHER: Final = "other"
"""The label of calls whose own label found no place in a table."""

_MAX_ROWS: Final = 2_000  # a snapshot of them takes four milliseconds
_MAX_MODELS: Final = 200  # rows beyond those that keep the model: callers of a gateway choose the names


class UsageLabels(msgspec.Struct, frozen=True, order=True):
    """The labels by which the usage of calls is added up.

    Attributes:
        tenant: that the calls were made for.
        model: that they asked for; empty where they named none.
        key: the name of the key that a gateway has issued, with which they were made; empty without one.
        api_key: the provider's API key that they were sent with, as eight digits of its hash, or the name that the
            upstream has for it; empty without one.
    """

    tenant: str
    model: str
    key: str = ""
    api_key: str = ""


class UsageRow(JsonStruct, frozen=True, kw_only=True):
    """The usage of the calls of one tenant, model and pair of keys; ``"other"`` stands for what found no place.

    Attributes:
        tenant: that the calls were made for.
        model: that they asked for; empty where they named none, as guarded functions.
        key: the name of the key that a gateway has issued, with which they were made; empty without one.
        api_key: the provider's API key that they were sent with, as eight digits of its hash, or the name that the
            upstream has for it; empty without one.
        usage: of these calls.
    """

    tenant: str
    model: str
    key: str
    api_key: str
    usage: CallUsage


class UsageTable:
    """The usage of all calls of one upstream, by labels. Safe to use from any thread.

    It is bounded: once it has `max_rows`, the calls of further labels are added up by their model alone and, after 200
    such models, together. No row is ever dropped, so the rows always sum up to `total`.

    Args:
        max_rows: rows with labels of their own.
    """

    def __init__(self, max_rows: int = _MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._lock = threading.Lock()
        self._rows: dict[UsageLabels, CallUsage] = {}
        self._by_model: dict[UsageLabels, CallUsage] = {}  # of labels beyond the bound

    def reset_after_fork(self) -> None:
        """See `ForkAware`. What the parent's calls have used, they have used before the child was."""
        self._lock = threading.Lock()

    def add(self, labels: UsageLabels, usage: CallUsage) -> None:
        """Add the usage of a call, or the correction of one."""
        with self._lock:
            rows = self._rows
            if labels not in rows and len(rows) >= self._max_rows:
                rows, labels = self._by_model, UsageLabels(OTHER, labels.model, OTHER, OTHER)
                if labels not in rows and len(rows) >= _MAX_MODELS:
                    labels = UsageLabels(OTHER, OTHER, OTHER, OTHER)
            before = rows.get(labels)
            rows[labels] = usage if before is None else before + usage

    @property
    def total(self) -> CallUsage:
        """The usage of all calls. The rows are added up when it is asked for, not at each call."""
        with self._lock:
            return sum((*self._rows.values(), *self._by_model.values()), NO_USAGE)

    def rows(self) -> Sequence[UsageRow]:
        """Return the rows, those that have cost most first."""
        with self._lock:
            found = [*self._rows.items(), *self._by_model.items()]
        found.sort(key=lambda row: (-row[1].usd, -row[1].output_tokens, row[0]))
        return [UsageRow(**msgspec.structs.asdict(labels), usage=usage) for labels, usage in found]
