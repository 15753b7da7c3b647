"""The command ``forebay worker``."""

from __future__ import annotations

from typing import Annotated

import typer

from forebay.cli.listen_address import listen_address
from forebay.supervisor.worker_process import run_at


def worker(
    supervisor: Annotated[
        str, typer.Argument(metavar="MODULE:NAME", help="Import path of a supervisor, or of a function that makes one.")
    ],
    *,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            min=0.0, metavar="SECONDS", help="How long running tasks may take to end after SIGTERM; default no limit."
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Answer /healthz, /readyz and /report there, for probes and an autoscaler of pods.",
        ),
    ] = None,
) -> None:
    """Run a supervisor as a worker of its overflow until SIGTERM or SIGINT; then drain it, and exit.

    It takes tasks that other processes have stored there. A second signal cancels what runs.
    """
    raise typer.Exit(run_at(supervisor, drain_timeout=drain_timeout, listen=listen_address(listen)))
