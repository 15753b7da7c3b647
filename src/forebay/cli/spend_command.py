"""The command ``forebay spend``: what a spend log has, added up by chosen columns."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from forebay import clock
from forebay.cli.state_directory import default_spend_logs, state_directory
from forebay.cli.store_command import USAGE_ERROR, AsJson, date, fail, print_json
from forebay.cli.text_table import one_line, text_table
from forebay.errors import ForebayError, InvalidSetting, InvalidSpendLogUrl
from forebay.spend_log import COLUMNS, SpendAmounts, SpendQuery, parse_spend_log, read_spend
from forebay.spend_log.spend_record import hour_of

_HOURS: Final[Mapping[str, float | None]] = {"hour": 1, "day": 24, "week": 168, "month": 720, "all": None}
_NUMBER_OF: Final = re.compile(r"([1-9][0-9]{0,5}) ?(h|d)")
_TIMES: Final = ("hour", "day")
_AMOUNTS: Final = ("calls", "input tokens", "output tokens", "USD")


def spend(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            show_default=False,
            help="The spend log: a file, or a URL such as sqlite:///spend.db. Default: that of this user's gateway.",
        ),
    ] = None,
    *,
    by: Annotated[
        str, typer.Option(metavar="COLUMNS", help=f"Any of {', '.join(COLUMNS)}, separated by commas.")
    ] = "upstream,model",
    last: Annotated[
        str, typer.Option(metavar="TIME", help="hour, day, week, month, all; or as 36h or 7d. Whole hours count.")
    ] = "day",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="Only such spend, as tenant=acme; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what calls have cost, from a spend log: that of a gateway, or of Upstream(spend_log=...).

    It may be in use meanwhile. Times are in UTC.
    """
    query = SpendQuery(by=_columns(by), since=_since(last, clock.wall_time()), where=_conditions(where or ()))
    path = _path(file)
    try:
        groups = read_spend(path, query)
    except ForebayError as error:
        fail(str(error))
    total = SpendAmounts()
    for group in groups:
        total.add(group.amounts)
    shown = [([_shown(*pair) for pair in zip(query.by, group.values, strict=True)], group.amounts) for group in groups]
    if as_json:
        rows = [dict(zip(query.by, values, strict=True)) | _plain(amounts) for values, amounts in shown]
        since = None if query.since is None else date(query.since)
        print_json({"file": str(path), "since": since, "rows": rows if query.by else [], "total": _plain(total)})
        return
    if not groups:
        typer.echo(f"no spend in the last {last}" if query.since is not None else "no spend")
        return
    typer.echo(_table(query.by, shown if query.by else [], total))


def _columns(text: str) -> Sequence[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in COLUMNS:
            allowed = ", ".join(COLUMNS)
            fail(f"--by: there is no column {one_line(name, 40)!r}; there are {allowed}", status=USAGE_ERROR)
    if len(set(names)) < len(names):
        fail("--by: name each column once", status=USAGE_ERROR)
    return names


def _since(last: str, now: float) -> float | None:
    """Return when the first hour began that counts; None for all."""
    text = last.strip()
    if text in _HOURS:
        hours = _HOURS[text]
    elif (found := _NUMBER_OF.fullmatch(text)) is not None:
        hours = int(found[1]) * (24 if found[2] == "d" else 1)
    else:
        fail(f"--last: {one_line(text, 40)!r} is none of hour, day, week, month, all, 36h, 7d", status=USAGE_ERROR)
    return None if hours is None else hour_of(now - hours * 3600)


def _conditions(texts: Sequence[str]) -> Mapping[str, str]:
    conditions: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in COLUMNS or name in _TIMES or name in conditions:
            columns = ", ".join(column for column in COLUMNS if column not in _TIMES)
            fail(
                f"--where: give COLUMN=VALUE, once for each of {columns}; for times there is --last", status=USAGE_ERROR
            )
        conditions[name] = value
    return conditions


def _path(file: str | None) -> Path:
    """Return the file to read; without a name, the only one that gateways of this user have."""
    try:
        if file is not None:
            return parse_spend_log(file).path if "://" in file else Path(file)
        found, directory = default_spend_logs(os.environ), state_directory(os.environ)
    except (InvalidSpendLogUrl, InvalidSetting) as error:
        fail(str(error), status=USAGE_ERROR)
    if not found:
        fail(
            f"there is no spend log in {directory}: name its file. `forebay gateway --check` prints where a gateway "
            "keeps one; without budgets and keys it needs --spend-log"
        )
    if len(found) > 1:
        fail(f"there are several spend logs, name one: {', '.join(map(str, found))}")
    return found[0]


def _shown(column: str, value: Any) -> str:
    if column == "hour":
        return date(value)
    return date(value)[:10] if column == "day" else str(value)


def _plain(amounts: SpendAmounts) -> dict[str, Any]:
    return {
        "calls": amounts.calls,
        "input_tokens": amounts.input_tokens,
        "output_tokens": amounts.output_tokens,
        "usd": round(amounts.usd, 10),  # sums have rounding errors
    }


def _table(by: Sequence[str], rows: Sequence[tuple[list[str], SpendAmounts]], total: SpendAmounts) -> str:
    """Return a table with numbers to the right, and the sum below."""
    lines = [*rows, (["total", *[""] * (len(by) - 1)] if by else [], total)]
    numbers = [
        [f"{each.calls:,}", f"{each.input_tokens:,}", f"{each.output_tokens:,}", f"{each.usd:,.4f}"]
        for _, each in lines
    ]
    widths = [max(len(row[index]) for row in [_AMOUNTS, *numbers]) for index in range(len(_AMOUNTS))]
    titles = [*by, *(title.rjust(width) for title, width in zip(_AMOUNTS, widths, strict=True))]
    cells = [
        [*values, *(number.rjust(width) for number, width in zip(row, widths, strict=True))]
        for (values, _), row in zip(lines, numbers, strict=True)
    ]
    return text_table(titles, cells)
