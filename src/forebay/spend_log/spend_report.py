"""Reports from a spend log: spend added up by columns that a person chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from forebay.spend_log.spend_file import open_existing
from forebay.spend_log.spend_record import SpendAmounts

_SQL: Final[Mapping[str, str]] = MappingProxyType(
    {
        "upstream": "upstream",
        "tenant": "tenant",
        "model": "model",
        "key": "key",
        "api_key": "api_key",
        "hour": "hour",
        "day": "hour - hour % 86400",
    }
)
COLUMNS: Final = tuple(_SQL)
"""The columns that spend can be added up by."""


class SpendQuery(NamedTuple):
    """A question to a spend log.

    Attributes:
        by: columns, of `COLUMNS`.
        since: epoch seconds; only hours that began then or later count. None: all.
        where: only rows with these values count, by column.
    """

    by: Sequence[str]
    since: float | None = None
    where: Mapping[str, str] = MappingProxyType({})


class SpendGroup(NamedTuple):
    """The spend of one combination of values of the columns asked for."""

    values: tuple[Any, ...]
    amounts: SpendAmounts


def read_spend(path: Path, query: SpendQuery) -> list[SpendGroup]:
    """Return what was spent by the columns of a query: by time if that is among them, then the dearest first. Blocks.

    Raises:
        StoreUnavailable: there is no such file, or it is not a spend log; the message says what to do.
    """
    columns = [_SQL[name] for name in query.by]
    conditions = ["hour >= ?", *(f"{_SQL[name]} = ?" for name in query.where)]
    values = [0 if query.since is None else query.since, *query.where.values()]
    times = [str(number) for number, name in enumerate(query.by, 1) if name in ("hour", "day")]
    statement = (
        f"SELECT {', '.join([*columns, 'sum(calls), sum(input_tokens), sum(output_tokens), sum(usd)'])} FROM spend"  # noqa: S608 - columns are of `_SQL`
        f" WHERE {' AND '.join(conditions)}"
        + (f" GROUP BY {', '.join(str(number + 1) for number in range(len(columns)))}" if columns else "")
        + f" ORDER BY {', '.join([*times, 'sum(usd) DESC', *(str(number + 1) for number in range(len(columns)))])}"
    )
    file = open_existing(path)
    try:
        rows = file.select(statement, values)
    finally:
        file.close()
    count = len(columns)
    return [SpendGroup(row[:count], SpendAmounts(*row[count:])) for row in rows if row[count] is not None]
