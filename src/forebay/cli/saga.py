"""The commands ``forebay saga ls|show|retry|resolve``: the sagas of a log, and what to do about parked ones."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Annotated, Any, Final, TypeVar

import msgspec
import typer

from forebay import clock
from forebay._text import format_duration
from forebay.cli.store_command import USAGE_ERROR, AsJson, check_file, date, fail, print_json, relative, run
from forebay.cli.text_table import one_line, text_table
from forebay.errors import UnknownSaga
from forebay.saga import SagaAdmin, SagaLog, SagaState, SagaView, open_saga_log
from forebay.saga.records import SagaHeader, StepState
from forebay.saga.saga_view import StepView
from forebay.storage import parse_url
from forebay.storage.shown_url import shown_url

T = TypeVar("T")

_PAGE: Final = 500  # sagas that are listed at once
_AT_ONCE: Final = 10  # sagas that are read at once: each may have large outputs
_MAX_WHY: Final = 60  # characters of a reason in a table
_PARKED: Final = (SagaState.PARKED,)
_UNFINISHED: Final = (SagaState.RUNNING, SagaState.COMPENSATING)
_ENDED: Final = (SagaState.DONE, SagaState.COMPENSATED, SagaState.RESOLVED)
_COUNTED_DONE: Final = (StepState.DONE, StepState.UNDONE)
_STATES: Final = {StepState.STARTED: "unknown", StepState.FAILED: "failed, perhaps with an effect"}

saga = typer.Typer(help="Look into a saga log, and decide about parked sagas.", no_args_is_help=True)


class ListedState(StrEnum):
    """The state of a saga, as an option."""

    PARKED = "parked"
    RUNNING = "running"
    COMPENSATING = "compensating"
    DONE = "done"
    COMPENSATED = "compensated"
    RESOLVED = "resolved"


Url = Annotated[str, typer.Argument(metavar="URL", show_default=False, help="The saga log, such as sqlite:///saga.db.")]
SagaId = Annotated[str, typer.Argument(metavar="ID", show_default=False, help="The id of the saga.")]


@saga.command()
def ls(
    url: Url,
    *,
    state: Annotated[
        list[ListedState] | None,
        typer.Option(help="Only sagas in this state; repeatable. By default those that are parked or unfinished."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="At most so many sagas.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List the sagas, those that are parked first, then the oldest first. Payloads and outputs are not printed."""
    if state and every:
        fail("give --state or --all, not both", status=USAGE_ERROR)
    chosen = {SagaState(each.value) for each in state or ()} or {*_PARKED, *_UNFINISHED, *(_ENDED if every else ())}

    async def read(admin: SagaAdmin) -> list[tuple[SagaHeader, SagaView | None]]:
        headers: list[SagaHeader] = []
        async for header in _headers(admin, chosen):
            headers.append(header)
            if len(headers) > limit:
                break
        return await _with_steps(admin, headers)

    found, now = _run(url, read), clock.wall_time()
    if as_json:
        print_json([_listed(*each) for each in found[:limit]])
        return
    rows = [_row(header, view, now) for header, view in found[:limit]]
    typer.echo(text_table(("state", "name", "age", "steps", "why", "id"), rows) if rows else "no sagas")
    if len(found) > limit:
        typer.echo(f"... and more: raise --limit {limit}", err=True)


@saga.command()
def show(
    url: Url,
    saga_id: SagaId,
    *,
    outputs: Annotated[bool, typer.Option("--outputs", help="Print what its steps have returned, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show one saga: its steps, what has happened in order, and what to do if it is parked."""
    view = _run(url, lambda admin: admin.show(saga_id, outputs=outputs))
    if as_json:
        fields = view.as_dict()
        if not outputs:
            del fields["outputs"]
        print_json(fields | {"next": [command for _, command in _advice(view, url)]})
    else:
        _print_saga(view, clock.wall_time())
        _print_advice(view, url)


@saga.command()
def retry(url: Url, saga_id: SagaId, *, as_json: AsJson = False) -> None:
    """Let a parked saga go on: a supervisor on this log takes it, and begins with what it was parked for."""
    _print_state(saga_id, _run(url, lambda admin: admin.retry(saga_id)), as_json=as_json)


@saga.command()
def resolve(  # noqa: PLR0913 - options of the command line
    url: Url,
    saga_id: SagaId,
    *,
    step: Annotated[str | None, typer.Option(metavar="NAME", help="The step whose outcome is known now.")] = None,
    done: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="The step has its effect; what it would have returned, null for nothing."),
    ] = None,
    not_done: Annotated[bool, typer.Option("--not-done", help="The step has no effect.")] = False,
    undone: Annotated[bool, typer.Option("--undone", help="The effect of the step was undone.")] = False,
    note: Annotated[str, typer.Option(metavar="TEXT", help="Why; it stays in the log.")] = "",
    as_json: AsJson = False,
) -> None:
    """Say what has become of a step of a parked saga, which goes on then. Without --step, close the saga as it is."""
    said = [done is not None, not_done, undone]
    if step is None and any(said):
        fail("name the step, by --step NAME: --done, --not-done and --undone are about a step", status=USAGE_ERROR)
    if step is not None and sum(said) != 1:
        fail("give one of --done JSON, --not-done and --undone for the step", status=USAGE_ERROR)
    output = msgspec.UNSET if done is None else _parse_json(done)

    async def change(admin: SagaAdmin) -> SagaState:
        if step is None:
            return await admin.resolve(saga_id, note=note)
        if not_done or undone:
            return await admin.resolve(saga_id, step, outcome="not-done" if not_done else "undone", note=note)
        return await admin.resolve(saga_id, step, output=output, note=note)

    _print_state(saga_id, _run(url, change), as_json=as_json)


def _parse_json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):  # its text might quote the output
        fail("--done takes JSON: text in quotes, as in --done '\"sent\"', or null for no output", status=USAGE_ERROR)


# --- the log ---------------------------------------------------------------------------------------------------------


def _run(url: str, action: Callable[[SagaAdmin], Awaitable[T]]) -> T:
    """Return what `action` does with the sagas of the log that `url` names; if it cannot, print why and exit."""
    return run(lambda: _find_log(url), lambda log: action(SagaAdmin(log)))


def _find_log(url: str) -> SagaLog:
    """Return the log that `url` names, if another process may have sagas in it; nothing is made by opening it."""
    log = open_saga_log(url)
    if not log.durable:
        fail("a saga log in memory is not shared; name one in a file or on a server", status=USAGE_ERROR)
    check_file(parse_url(url).path)
    return log


async def _headers(admin: SagaAdmin, states: Collection[SagaState]) -> AsyncIterator[SagaHeader]:
    """Yield the sagas in these states, read page by page: parked ones, unfinished ones, and those that have ended."""
    for group in (_PARKED, _UNFINISHED, _ENDED):
        chosen, after = [state for state in group if state in states], None
        while chosen and (page := await admin.list(*chosen, limit=_PAGE, after=after)):
            for header in page:
                yield header
            after = page[-1]


async def _with_steps(admin: SagaAdmin, headers: Sequence[SagaHeader]) -> list[tuple[SagaHeader, SagaView | None]]:
    """Return each saga with its steps, or with None if it is gone by now."""

    async def view(header: SagaHeader) -> SagaView | None:
        with suppress(UnknownSaga):
            return await admin.show(header.saga_id)
        return None

    found: list[tuple[SagaHeader, SagaView | None]] = []
    for start in range(0, len(headers), _AT_ONCE):
        page = headers[start : start + _AT_ONCE]
        found += zip(page, await asyncio.gather(*map(view, page)), strict=True)
    return found


# --- what is printed -------------------------------------------------------------------------------------------------


def _steps(view: SagaView) -> tuple[int, int]:
    """Return how many steps have been done, undone ones included, and how many have begun."""
    return sum(step.state in _COUNTED_DONE for step in view.steps), len(view.steps)


def _listed(header: SagaHeader, view: SagaView | None) -> dict[str, Any]:
    done, begun = (None, None) if view is None else _steps(view)
    return {
        "saga_id": header.saga_id,
        "name": header.name,
        "version": header.version,
        "state": header.state.value,
        "why": header.why,
        "created_at": header.created_at,
        "updated_at": header.updated_at,
        "claims": header.claims,
        "lease_until": None if view is None else view.lease_until,
        "steps_done": done,
        "steps_begun": begun,
    }


def _row(header: SagaHeader, view: SagaView | None, now: float) -> tuple[str, ...]:
    age, why = format_duration(max(0.0, now - header.created_at)), one_line(header.why, _MAX_WHY)
    steps = "" if view is None else "{} of {}".format(*_steps(view))
    return _shown_state(header.state, view, now), header.name, age, steps, why, header.saga_id


def _shown_state(state: SagaState, view: SagaView | None, now: float) -> str:
    return f"{state.value}, held by nobody" if view is not None and view.is_abandoned(now) else state.value


def _print_state(saga_id: str, state: SagaState, *, as_json: bool) -> None:
    if as_json:
        print_json({"saga_id": saga_id, "state": state.value})
    elif state is SagaState.RESOLVED:
        typer.echo(f"saga {one_line(saga_id)} is closed")
    else:
        typer.echo(f"saga {one_line(saga_id)} goes on, and is {state.value}")


def _print_saga(view: SagaView, now: float) -> None:
    lease = None if view.lease_until is None else f"{date(view.lease_until)} ({relative(view.lease_until, now)})"
    fields = {
        "saga_id": view.saga_id,
        "name": view.name,
        "version": view.version,
        "state": _shown_state(view.state, view, now),
        "why": view.why,
        "compensates for": view.error if view.error != view.why else "",
        "round": view.round if view.round > 1 else None,
        "created_at": f"{date(view.created_at)} ({relative(view.created_at, now)})",
        "updated_at": f"{date(view.updated_at)} ({relative(view.updated_at, now)})",
        "lease_until": lease,
        "claims": view.claims or None,
        "damage": view.damage and f"its log cannot be read from entry {len(view.history) + 1} on: {view.damage}",
    }
    width = max(map(len, fields))
    for name, value in fields.items():
        if value:
            typer.echo(f"{name.ljust(width)}  {one_line(str(value))}")
    titles = ("step", "state", "function", "kind", "undo failed", "error", "key")
    typer.echo("\n" + (text_table(titles, [_step_row(step) for step in view.steps]) if view.steps else "no steps"))
    typer.echo()
    for line in view.history:
        typer.echo(f"{date(line.at)}  {one_line(line.text)}")
    if view.outputs is not None:
        typer.echo()
    for output in view.outputs or ():
        what = "the result" if output.step is None else f"the output of step {output.step!r}"
        typer.echo(f"{one_line(what)}: {one_line(output.problem) or json.dumps(output.value)}")


def _step_row(step: StepView) -> tuple[str, ...]:
    return (
        step.name,
        _STATES.get(step.state, step.state.value),
        step.function,
        "pivot" if step.pivot else "compensable" if step.compensable else "",
        f"{step.undo_failures} times" if step.undo_failures > 1 else "once" if step.undo_failures else "",
        one_line(step.undo_error or step.error, _MAX_WHY),
        step.key,
    )


# --- what to do next -------------------------------------------------------------------------------------------------


def _print_advice(view: SagaView, url: str) -> None:
    if view.state is SagaState.PARKED:
        typer.echo("\nIt is parked, and waits for you:")
        for what, command in _advice(view, url):
            typer.echo(f"- {what}:\n  {command}")


def _advice(view: SagaView, url: str) -> list[tuple[str, str]]:
    """Return what may be done about a parked saga, each with its command."""
    if view.state is not SagaState.PARKED:
        return []
    advice: list[tuple[str, str]] = []
    cause = "once the cause is gone, let it go on"
    step = next((step for step in view.steps if step.name == view.parked_step), None)
    if step is not None and not view.damage:
        name = f"--step={step.name}"
        to_undo = bool(view.error or step.undo_failures)
        said = _said(step, to_undo=to_undo)
        advice += [(what, _command(view, url, "resolve", name, option)) for what, option in said]
        if step.state is StepState.STARTED and not to_undo:
            cause = "after you gave the step a check= or idempotent=True (else it is parked again), let it go on"
        elif step.state is StepState.FAILED and not to_undo:
            cause = "once the cause is gone, let it go on: the step is called again, under its key"
    if not view.damage:
        advice.append((cause, _command(view, url, "retry")))
    advice.append(("or close it as it is, with the effects that it has", _command(view, url, "resolve", "--note=WHY")))
    return advice


def _said(step: StepView, *, to_undo: bool) -> list[tuple[str, str]]:
    """Return what a person may say of the step for which a saga is parked, each with its option."""
    name = one_line(step.name)
    match step.state:
        case StepState.STARTED | StepState.FAILED | StepState.DONE if to_undo:
            return [(f"step {name} could not be undone; if you have undone it by hand", "--undone")]
        case StepState.STARTED:
            key = f"look for the key {one_line(step.key)}"
            return [
                (f"step {name} began, and its outcome is unknown ({key}); if it is done", "--done=JSON"),
                ("if it is not done", "--not-done"),
            ]
        case StepState.FAILED if not to_undo:
            key = f"look for the key {one_line(step.key)}"
            return [(f"step {name} failed, and may have had its effect ({key}); if it is done", "--done=JSON")]
        case StepState.NOT_DONE if not to_undo:
            return [(f"step {name} failed; if you have done it by hand", "--done=JSON")]
        case _:
            return []


def _command(view: SagaView, url: str, verb: str, *options: str) -> str:
    """Return a command for a shell; a password in the URL is left out."""
    end = ["--", view.saga_id] if view.saga_id.startswith("-") else []
    words = ["forebay", "saga", verb, shown_url(url), *([] if end else [view.saga_id]), *options, *end]
    return " ".join(map(_shell_word, words))


def _shell_word(text: str) -> str:
    if one_line(text) == text:
        return shlex.quote(text)
    return "$'" + one_line(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"
