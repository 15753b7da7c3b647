"""``python -m forebay.simulation``: the simulated LLM provider as a process of its own, on the loopback interface.

When it is ready it prints one line of JSON, ``{"url": ..., "pid": ...}``. It serves until SIGTERM or SIGINT; with
``--attached`` it also ends when its standard input is closed, so that it never outlives the program that started it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence

from forebay.simulation.provider.provider_config import UNITS_BY_NAME, Dialect, ProviderConfig


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    command = argparse.ArgumentParser(
        prog="python -m forebay.simulation", description="Serve a simulated LLM provider over HTTP."
    )
    command.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one (default)")
    command.add_argument("--seed", type=int, default=0, help="seed of all randomness (default 0)")
    command.add_argument("--config", help="a ProviderConfig as JSON; the options below change it")
    command.add_argument("--dialect", choices=[*Dialect])
    command.add_argument("--slots", type=int, help="calls at full speed")
    command.add_argument("--ttft", type=float, help="seconds to the first token")
    command.add_argument("--tpot", type=float, help="seconds per output token")
    for name, unit in UNITS_BY_NAME.items():
        command.add_argument(f"--{name}", type=int, help=f"{unit.replace('_', ' ')} a minute")
    command.add_argument(
        "--traffic",
        choices=["conversation", "code"],
        default="conversation",
        help="traffic whose output lengths are drawn (default conversation)",
    )
    command.add_argument("--attached", action="store_true", help="end when standard input is closed")
    return command


def config_from_options(options: argparse.Namespace) -> ProviderConfig:
    """Return the configuration that the command line describes.

    Raises:
        InvalidProviderConfig: a value is unknown or out of range.
        json.JSONDecodeError: ``--config`` is not JSON.
    """
    raw = json.loads(options.config) if options.config else {}
    raw |= {n: v for n in ("dialect", "slots", "ttft", "tpot") if (v := getattr(options, n)) is not None}
    units = UNITS_BY_NAME.items()
    limits = [{"unit": unit, "amount": v} for n, unit in units if (v := getattr(options, n)) is not None]
    if limits:
        raw["rate_limits"] = [*raw.get("rate_limits", []), *limits]
    return ProviderConfig.from_json(json.dumps(raw))


async def serve(options: argparse.Namespace, config: ProviderConfig) -> None:
    """Serve until a signal, or until standard input is closed."""
    # imported here, so that an invalid option is reported before a web server is loaded
    from forebay.simulation.provider.http_server import ProviderServer, start_server  # noqa: PLC0415
    from forebay.simulation.provider.traffic import Traffic  # noqa: PLC0415

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    traffic = Traffic.code() if options.traffic == "code" else Traffic.conversation()
    server = ProviderServer(config, seed=options.seed, traffic=traffic)
    runner, url = await start_server(server, port=options.port)
    try:
        print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)  # noqa: T201 - the parent reads it
        if options.attached:
            loop.add_reader(sys.stdin.fileno(), _stop_at_end_of_input, stop)
        gc.freeze()
        await stop.wait()
    finally:
        await runner.cleanup()


def _stop_at_end_of_input(stop: asyncio.Event) -> None:
    """Read standard input, which is ready; set `stop` if it is closed."""
    if not os.read(sys.stdin.fileno(), 4096):
        stop.set()


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parser()
    options = command.parse_args(arguments)
    try:
        config = config_from_options(options)
    except ValueError as error:  # InvalidProviderConfig is one, too
        command.error(str(error))
    asyncio.run(serve(options, config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
