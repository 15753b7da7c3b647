"""The commands ``forebay overflow ls|show|count|replay|purge``: what waits in a task store, and what to do about it."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final, TypeVar

import typer

from forebay import clock
from forebay._json import plain_field, plain_value
from forebay._text import format_duration
from forebay.cli.store_command import USAGE_ERROR, AsJson, check_file, date, fail, print_json, relative, run
from forebay.cli.text_table import one_line, text_table
from forebay.interfaces import Completion, PutResult, RecordState, StoredRecord, TaskRecord, TaskStore
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew, decode_result, decode_task, open_task_store
from forebay.storage import parse_url
from forebay.task import TaskStatus

T = TypeVar("T")

_PAGE: Final = 500  # records that are read at once
_AT_ONCE: Final = 100  # records that are changed at once
_MAX_ERROR: Final = 60  # characters of an error in a table
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LISTED: Final = (RecordState.LEASED, RecordState.WAITING, RecordState.DELAYED, RecordState.PARKED, RecordState.DEAD)

overflow = typer.Typer(help="Look into an overflow, and run its dead letters again.", no_args_is_help=True)


class State(StrEnum):
    """The state of a record, as an option."""

    WAITING = "waiting"
    PARKED = "parked"
    LEASED = "leased"
    DELAYED = "delayed"
    DONE = "done"
    DEAD = "dead"


class PurgedState(StrEnum):
    """The state of records that may be purged, as an option."""

    WAITING = "waiting"
    DELAYED = "delayed"
    DONE = "done"
    DEAD = "dead"


Url = Annotated[
    str, typer.Argument(metavar="URL", show_default=False, help="The overflow, such as sqlite:///spill.db.")
]


@overflow.command()
def ls(
    url: Url,
    *,
    state: Annotated[
        list[State] | None,
        typer.Option(help="Only records in this state; repeatable. By default all states but done."),
    ] = None,
    task_type: Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Only tasks of this type.")] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many records.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List the records, of each state the oldest first. Payloads are not printed."""
    states = [RecordState(each.value) for each in state or ()] or _LISTED

    async def read(store: TaskStore) -> list[tuple[RecordState, StoredRecord]]:
        found: list[tuple[RecordState, StoredRecord]] = []
        for each in states:
            async for stored in _records(store, each):
                if len(found) > limit:
                    return found
                if task_type in (None, stored.record.task_type):
                    found.append((each, stored))
        return found

    found, now = _run(url, read), clock.wall_time()
    if as_json:
        print_json([_listed(*each) for each in found[:limit]])
        return
    rows = [_row(each, stored, now) for each, stored in found[:limit]]
    titles = ("state", "type", "priority", "tenant", "age", "attempts", "due", "error", "id")
    typer.echo(text_table(titles, rows) if rows else "no records")
    if len(found) > limit:
        typer.echo(f"... and more: raise --limit {limit}", err=True)


@overflow.command()
def show(
    url: Url,
    task_id: Annotated[str, typer.Argument(metavar="ID", show_default=False, help="The id of the task.")],
    *,
    payload: Annotated[bool, typer.Option("--payload", help="Print the payload and the result too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show one record."""
    found = _run(url, lambda store: store.find(task_id))
    if found is None:
        fail(f"there is no task {one_line(task_id)!r} in this overflow")
    state, record, completion = found
    fields = _fields(state, record, completion)
    fields["stored_bytes"] = len(record.envelope)
    if payload:
        fields |= _content(record, completion)
    if as_json:
        print_json(fields)
        return
    now = clock.wall_time()
    width = max(map(len, fields))
    for name, value in fields.items():
        if value is not None:
            typer.echo(f"{name.ljust(width)}  {_value(name, value, now)}")


@overflow.command()
def count(url: Url, *, as_json: AsJson = False) -> None:
    """Count the records by state, type and priority. Counted while others work, it is an estimate."""

    async def read(store: TaskStore) -> Counter[tuple[RecordState, str, int]]:
        counts = Counter[tuple[RecordState, str, int]]()
        for state in (*_LISTED, RecordState.DONE):
            async for stored in _records(store, state):
                counts[state, stored.record.task_type, stored.record.priority] += 1
        return counts

    counts = _run(url, read)
    order = (*_LISTED, RecordState.DONE)
    keys = sorted(counts, key=lambda key: (order.index(key[0]), key[1], key[2]))
    found = [
        {
            "state": state.value,
            "task_type": task_type,
            "priority": _priority(priority),
            "records": counts[state, task_type, priority],
        }
        for state, task_type, priority in keys
    ]
    if as_json:
        print_json(found)
    else:
        rows = [tuple(str(value) for value in each.values()) for each in found]
        typer.echo(text_table(("state", "type", "priority", "records"), rows) if rows else "no records")


@overflow.command()
def replay(
    url: Url,
    task_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", show_default=False, help="Ids.")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="Replay every dead letter.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have dead letters run again: they wait in their old order, with no attempts counted."""
    if bool(task_ids) is every:
        fail("name the ids of dead letters, or give --all", status=USAGE_ERROR)

    async def replay_each(store: TaskStore) -> Mapping[str, PutResult | None]:
        ids = list(dict.fromkeys(task_ids or [])) or [
            stored.record.task_id async for stored in _records(store, RecordState.DEAD)
        ]
        return dict(zip(ids, await _each(ids, store.requeue), strict=True))

    results = _run(url, replay_each)
    failed = {task_id: _why_not_replayed(put) for task_id, put in results.items() if put is not PutResult.STORED}
    replayed = [task_id for task_id in results if task_id not in failed]
    if as_json:
        reasons = [{"task_id": task_id, "reason": why} for task_id, why in failed.items()]
        print_json({"replayed": replayed, "failed": reasons})
    else:
        typer.echo(f"{len(replayed):,} replayed")
        for task_id, why in failed.items():
            typer.echo(f"forebay: {one_line(task_id)}: {why}", err=True)
    if failed:
        raise typer.Exit(1)


@overflow.command()
def purge(
    url: Url,
    *,
    state: Annotated[PurgedState, typer.Option(help="The state of the records.", show_default=False)],
    older_than: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only those that ended, or else were submitted, so long ago: 30m, 12h, 7d."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete dead letters or results; cancel tasks that wait. A result takes its idempotency key with it."""
    before = clock.wall_time() - (0.0 if older_than is None else _parse_time(older_than))
    chosen = RecordState(state.value)
    ids = _run(url, lambda store: _older(store, chosen, before))
    if ids and not yes:
        _confirm(chosen, len(ids))
    purged = _run(url, lambda store: _purge(store, chosen, ids, before)) if ids else 0
    if as_json:
        print_json({"purged": purged})
    else:
        typer.echo(f"{purged:,} purged")


def _confirm(state: RecordState, records: int) -> None:
    what = {RecordState.DEAD: "Delete {} dead letters", RecordState.DONE: "Delete {} results"}
    question = what.get(state, "Cancel {} " + state.value + " tasks").format(f"{records:,}")
    if not sys.stdin.isatty():
        fail(f"{question}? Give --yes to do it without being asked", status=USAGE_ERROR)
    typer.confirm(f"{question}?", abort=True, err=True)


async def _older(store: TaskStore, state: RecordState, before: float) -> list[str]:
    """Return the ids of the records in `state` from before `before`.

    Those that wait behind another one of their conversation wait too, and come first: the end of the other one would
    make them WAITING meanwhile.
    """
    states = (RecordState.PARKED, state) if state is RecordState.WAITING else (state,)
    return [
        stored.record.task_id
        for each in states
        async for stored in _records(store, each)
        if stored.position[0] < before
    ]


async def _purge(store: TaskStore, state: RecordState, ids: Sequence[str], before: float) -> int:
    """Delete or cancel the records of `ids` that are still in `state`; return how many."""
    if state is RecordState.DONE:
        return await store.prune(before=before)
    if state is RecordState.DEAD:
        return sum(await _each(ids, store.delete_dead))
    end = Completion(status=TaskStatus.CANCELLED.value, error="it was purged", finished_at=clock.wall_time())

    async def cancel(task_id: str) -> bool:
        return await store.finish(task_id, end, fence=None)

    return sum(await _each(ids, cancel))


# --- the store -------------------------------------------------------------------------------------------------------


def _run(url: str, action: Callable[[TaskStore], Awaitable[T]]) -> T:
    """Return what `action` returns of the store that `url` names; if it cannot, print why and exit."""
    return run(lambda: _find_store(url), action)


def _find_store(url: str) -> TaskStore:
    """Return the store that `url` names, if another process may have records in it; nothing is made by opening it."""
    named = parse_url(url)
    index = named if named.sqs is None else named.sqs.results
    if index is None:
        fail(
            "without results= the index of a queue is seen by its process alone; give the URL that it has", USAGE_ERROR
        )
    if index.scheme == "memory":
        fail("an overflow in memory is seen by its process alone; name one in a file or on a server", USAGE_ERROR)
    check_file(index.path)
    if named.sqs is not None and named.sqs.create and "create=" not in url:
        url += "&create=no"
    return open_task_store(url)


async def _records(store: TaskStore, state: RecordState) -> AsyncIterator[StoredRecord]:
    """Yield the records in a state, read page by page."""
    after: tuple[float, str] | None = None
    while page := await store.list_records(state, _PAGE, after=after):
        for stored in page:
            yield stored
        after = page[-1].position


async def _each(ids: Sequence[str], change: Callable[[str], Awaitable[T]]) -> list[T]:
    """Return the results of `change` for each id, some at a time."""
    results: list[T] = []
    for start in range(0, len(ids), _AT_ONCE):
        results += await asyncio.gather(*map(change, ids[start : start + _AT_ONCE]))
    return results


def _why_not_replayed(put: PutResult | None) -> str:
    match put:
        case PutResult.DUPLICATE:
            return "another task has taken its key"
        case PutResult.FULL:
            return "the overflow is full"
    return "there is no dead letter of that id"


# --- what is printed -------------------------------------------------------------------------------------------------


def _priority(priority: int) -> str:
    return str(plain_field(priority))


def _fields(state: RecordState, record: TaskRecord, completion: Completion | None) -> dict[str, Any]:
    """Return what is known of a record, without its payload and its result, as plain data."""
    fields: dict[str, Any] = {"task_id": record.task_id, "state": state}
    fields |= {
        name: getattr(record, name)
        for name in ("task_type", "priority", "tenant", "key", "thread_id", "deadline", "not_before")
    }
    fields |= {"submitted_at": record.enqueued_at, "attempts": record.attempts, "failures": record.failures}
    fields |= {"last_error": record.last_error, "status": None, "error": None, "worker_id": None}
    fields |= {"duration_ms": None, "finished_at": None}
    if completion is not None:
        ended = ("status", "error", "worker_id", "duration_ms", "attempts", "finished_at")
        fields |= {name: getattr(completion, name) for name in ended}
    return {name: plain_field(value) for name, value in fields.items()}


def _listed(state: RecordState, stored: StoredRecord) -> dict[str, Any]:
    due = stored.until if state is RecordState.DELAYED else None
    lease_until = stored.until if state is RecordState.LEASED else None
    return _fields(state, stored.record, stored.completion) | {"due": due, "lease_until": lease_until}


def _content(record: TaskRecord, completion: Completion | None) -> dict[str, Any]:
    """Return the payload and the result as plain data, or why there are none."""
    content: dict[str, Any] = {}
    if record.envelope:
        try:
            content |= plain_value("payload", decode_task(record.envelope).payload)
        except (EnvelopeDamaged, EnvelopeTooNew) as error:
            content |= {"payload": None, "payload_error": str(error)}
    elif completion is None:
        content |= {"payload": None, "payload_error": "this overflow does not show it before the task has ended"}
    if completion is not None and completion.result is not None:
        try:
            content |= plain_value("result", decode_result(completion.result))
        except (EnvelopeDamaged, EnvelopeTooNew) as error:
            content |= {"result": None, "result_error": str(error)}
    return content


def _row(state: RecordState, stored: StoredRecord, now: float) -> tuple[str, ...]:
    record, completion = stored.record, stored.completion
    due = ""
    if stored.until is not None:
        due = relative(stored.until, now) if state is RecordState.DELAYED else f"lease {relative(stored.until, now)}"
    error = record.last_error if completion is None else completion.error
    return (
        state.value,
        record.task_type,
        _priority(record.priority),
        record.tenant,
        format_duration(max(0.0, now - stored.position[0])),
        str(record.attempts),
        due,
        one_line(error or "", _MAX_ERROR),
        record.task_id,
    )


def _value(name: str, value: Any, now: float) -> str:
    """Return a field of a record for a person."""
    if name in ("deadline", "not_before", "submitted_at", "finished_at"):
        return f"{date(value)} ({relative(value, now)})"
    if name in ("payload", "result"):
        return json.dumps(value)
    return one_line(str(value))


def _parse_time(text: str) -> float:
    """Return the seconds that a time such as ``12h`` has."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text)
    seconds = math.inf if match is None else float(match[1]) * _SECONDS[match[2]]
    if not math.isfinite(seconds):
        fail(f"--older-than {one_line(text)} is no time: write a number and s, m, h or d, as in 7d", USAGE_ERROR)
    return seconds
