"""The demo's command line: its options, read by typer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from demo.provider import provider_from, warning
from demo.runner import resume as resume_surge
from demo.runner import run as run_surge
from demo.settings import ENDLESS, Settings
from forebay.errors import ForebayError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def surge(  # noqa: PLR0913 - one parameter for each option
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Run what the last demo left in the overflow.")] = False,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Size of the surge: 10,000; 60 with a real provider.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=2.0, help="Wall time of each side, 90; with --resume no limit.")
    ] = None,
    seed: Annotated[int, typer.Option(envvar="SEED", help="Repeats the tasks and the simulated faults.")] = 7,
    memory: Annotated[int, typer.Option(min=64, help="Resident megabytes at which a side is killed.")] = 512,
    workers: Annotated[int, typer.Option(min=1, help="Workers.")] = 10,
    slots: Annotated[int, typer.Option(min=1, help="Agents at a time on each worker.")] = 5,
    speed: Annotated[
        float,
        typer.Option(min=0.01, help="Of the simulated provider: 10 is ten times the rate and a tenth of the latency."),
    ] = 1.0,
    out: Annotated[Path, typer.Option(help="Directory for the report, the picture and the spilled tasks.")] = Path(
        "build/demo"
    ),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Spend real money without asking.")] = False,
) -> None:
    """Run the surge: fifty agents, one key, ten thousand tasks; a classic supervisor, one with semaphores, and Forebay.

    PROVIDER_URL, a key in PROVIDER_API_KEY or OPENAI_API_KEY, and PROVIDER_MODEL point it at a real OpenAI-compatible
    server instead of the simulated one. OVERFLOW is the URL of a store for what Forebay spills, such as
    redis://localhost:6379/0, instead of a file in the demo's directory.
    """
    console = Console()
    try:
        real = provider_from(os.environ)
        settings = Settings(
            tasks=tasks or (10_000 if real is None else 60),
            seconds=seconds or (ENDLESS if resume else Settings().seconds),
            seed=seed,
            workers=workers,
            slots=slots,
            memory_mb=memory,
            speed=speed,
            folder=str(out),
        )
        if real is not None and not yes:
            typer.echo(warning(real[0], settings), err=True)
            typer.confirm("Go on?", abort=True, err=True)
        status = (resume_surge if resume else run_surge)(settings, console, real=real)
    except ForebayError as error:
        typer.echo(f"demo: {error}", err=True)
        raise typer.Exit(1) from None
    raise typer.Exit(status)
