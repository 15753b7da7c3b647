"""The command ``forebay worker``."""

from __future__ import annotations

from typing import Annotated

import typer

from forebay.cli.listen_address import listen_address
from forebay.supervisor.worker_process import PROTECTIONS, run_at


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
            help="Answer /healthz, /readyz and /report there, for probes and an autoscaler.",
        ),
    ] = None,
    protect: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(PROTECTIONS),
            help="Protect the EC2 instance from scale-in while it takes tasks; drain when it is to go.",
        ),
    ] = None,
    drain_hook: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Lifecycle hook that keeps the EC2 instance until it has drained."),
    ] = None,
) -> None:
    """Run a supervisor as a worker of its overflow until SIGTERM or SIGINT; then drain it, and exit.

    It takes tasks that other processes have stored there. A second signal cancels what runs, but not a
    SIGTERM within a second of the first.
    """
    status = run_at(
        supervisor,
        drain_timeout=drain_timeout,
        listen=listen_address(listen),
        protect=protect,
        drain_hook=drain_hook,
    )
    raise typer.Exit(status)
