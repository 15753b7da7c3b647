"""The command ``forebay autoscale``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from forebay.cli.autoscale_config import AutoscaleSettings, StateLeaderTable, load_autoscale_settings
from forebay.cli.autoscale_metrics import render_metrics
from forebay.cli.listen_address import listen_address
from forebay.cli.store_command import USAGE_ERROR, fail
from forebay.cli.toml_document import InvalidConfiguration
from forebay.errors import ForebayError, InvalidOverflowUrl, InvalidSetting, InvalidShardUrl, StoreNotInstalled
from forebay.events import Event, Scaled, log
from forebay.scale import Autoscaler, AutoscalerStatistics, LeaderLease, PublishedTarget, StateLease
from forebay.state import ShardedState
from forebay.supervisor.overflow_demand import OverflowDemand
from forebay.supervisor.report_server import ReportServer

_MISTAKES = (InvalidConfiguration, InvalidSetting, InvalidOverflowUrl, InvalidShardUrl, StoreNotInstalled)


def autoscale(
    *,
    config: Annotated[
        Path, typer.Option(metavar="FILE", help="Configuration, such as autoscale.toml.", show_default=False)
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Print the configuration in a few lines, or its problems, and exit.")
    ] = False,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Answer /healthz, /readyz, /report and /metrics there."),
    ] = None,
) -> None:
    """Add workers while workers are the bottleneck, and remove them again, until SIGTERM or SIGINT.

    It reads what waits in an overflow, and runs no tasks itself. Several of them share a lease: one acts.
    """
    address = listen_address(listen)
    try:
        settings = load_autoscale_settings(config)
        if check:
            typer.echo("\n".join(_summary(settings)))
            return
        with _log_to_stderr():
            asyncio.run(_run(settings, address))
    except InvalidConfiguration as error:
        typer.echo(f"{error}", err=True)
        raise typer.Exit(USAGE_ERROR) from None
    except _MISTAKES as error:
        fail(str(error), status=USAGE_ERROR)
    except ForebayError as error:
        fail(str(error))


async def _run(settings: AutoscaleSettings, listen: tuple[str, int] | None) -> None:
    """Scale until a signal; a second one does not wait for what drains."""
    signals: asyncio.Queue[None] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, None)
    scaling = asyncio.ensure_future(_scale(settings, listen))
    while not scaling.done():
        stop = asyncio.ensure_future(signals.get())
        await asyncio.wait((scaling, stop), return_when=asyncio.FIRST_COMPLETED)
        if not stop.cancel():
            scaling.cancel()
    if not scaling.cancelled():
        scaling.result()


async def _scale(settings: AutoscaleSettings, listen: tuple[str, int] | None) -> None:
    """Scale until it is cancelled."""
    table, policy = settings.autoscaler, settings.autoscaler.policy()
    async with contextlib.AsyncExitStack() as stack:
        overflow = OverflowDemand(table.overflow_url(os.environ), on_event=_print)
        await stack.enter_async_context(overflow)
        target = settings.target.target()
        if table.publish_only:
            target = PublishedTarget(target)
        scaler = Autoscaler(
            overflow,
            target,
            task_types=table.task_types,
            seats=policy.seats,
            load=policy.load,
            minimum=policy.minimum,
            maximum=policy.maximum,
            interval=table.interval,
            window=policy.window,
            panic_window=policy.panic_window,
            stabilization=policy.stabilization,
            drain=policy.drain,
            tolerance=policy.tolerance,
            service=table.service,
            leader=await _leader(settings, stack),
        )
        running = asyncio.Event()
        if listen is not None:
            await _serve(listen, scaler, target.name, running, stack)
        await stack.enter_async_context(scaler)
        running.set()
        typer.echo(f"scaling {target.name}")
        await asyncio.Event().wait()


async def _serve(
    listen: tuple[str, int], scaler: Autoscaler, target: str, running: asyncio.Event, stack: contextlib.AsyncExitStack
) -> None:
    """Answer probes and scrapers until the stack is left."""

    async def report() -> AutoscalerStatistics:
        return scaler.statistics()

    server = ReportServer(
        *listen,
        ready=running.is_set,
        report=report,
        metrics=lambda: render_metrics(target, scaler.statistics()) if running.is_set() else "",
        owner="forebay autoscale",
    )
    await server.open()
    stack.push_async_callback(server.close)


async def _leader(settings: AutoscaleSettings, stack: contextlib.AsyncExitStack) -> LeaderLease | None:
    table = settings.leader
    if not isinstance(table, StateLeaderTable):
        return None if table is None else table.lease(settings.lease_target)
    table.check_shard(os.environ)
    name = table.lease_name(settings.lease_target)
    state = await ShardedState.connect(table.shard_url(os.environ))
    stack.push_async_callback(state.close)
    lease = StateLease(state.namespace(f"leader/{name}"), name)
    return LeaderLease(lease, duration=table.duration)


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show what is logged from INFO up: who leads, and what fails."""
    handler, level = logging.StreamHandler(), log.level
    handler.setFormatter(logging.Formatter("forebay: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _print(event: Event) -> None:
    if isinstance(event, Scaled):
        why = f"{event.asked:.1f} slots asked for"
        if event.limited_by is not None:
            why += f", short of {event.limited_by}"
        typer.echo(f"{event.target}: {event.before} -> {event.after} ({why})")


def _summary(settings: AutoscaleSettings) -> list[str]:
    """Return the configuration in words, a line each.

    Raises:
        Others: what is raised for a URL that cannot be used.
    """
    table, leader = settings.autoscaler, settings.leader
    table.check_overflow(os.environ)
    if isinstance(leader, StateLeaderTable):
        leader.check_shard(os.environ)
    where = "the overflow"
    if table.overflow_env is not None:
        missing = "" if os.environ.get(table.overflow_env) else ", which is not set"
        where = f"the overflow in ${table.overflow_env}{missing}"
    if table.publish_only:
        who = "their number is published, and something else sets it"
    elif leader is None:
        who = "no other autoscaler of it"
    else:
        who = f"the holder of the lease {leader.lease_name(settings.lease_target)} acts"
        variable = leader.url_env if isinstance(leader, StateLeaderTable) else None
        if variable is not None and not os.environ.get(variable):
            who += f", in ${variable}, which is not set"
    replicas = f"{table.minimum} to {table.maximum} replicas of {table.seats} slots"
    return [
        f"tasks of {', '.join(table.task_types)} in {where}",
        f"{settings.target.target().name}: {replicas}; {who}",
    ]
