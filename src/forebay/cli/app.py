"""The commands of the command line, for typer."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from forebay.cli.autoscale import autoscale
from forebay.cli.gateway import gateway
from forebay.cli.keys import keys
from forebay.cli.overflow import overflow
from forebay.cli.saga import saga
from forebay.cli.spend_command import spend
from forebay.cli.worker import worker

app = typer.Typer(
    help="Backpressure for fleets of AI agents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        typer.echo(f"forebay {version('forebay')}")
        raise typer.Exit


@app.callback()
def _forebay(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Backpressure for fleets of AI agents."""


app.command()(gateway)
app.command()(worker)
app.command()(autoscale)
app.command()(spend)
app.add_typer(keys, name="keys")
app.add_typer(overflow, name="overflow")
app.add_typer(saga, name="saga")
