"""``python -m forebay.simulation``: the simulated provider as a process of its own, on the loopback interface.

Prints one line of JSON when it is ready, ``{"url": ..., "pid": ...}``, and serves until SIGTERM or SIGINT; with
``--attached`` also no longer than its standard input is open, so that it never outlives the program that started it.
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

from forebay.simulation.provider.provider_config import Dialect, InvalidProviderConfig, ProviderConfig


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m forebay.simulation", description="A simulated LLM provider over HTTP."
    )
    command.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 takes a free one (default)")
    command.add_argument("--seed", type=int, default=0, help="all chance comes from it")
    command.add_argument("--config", help="a ProviderConfig in JSON; the options below change it")
    command.add_argument("--dialect", choices=[*Dialect])
    command.add_argument("--slots", type=int, help="calls at full speed")
    command.add_argument("--ttft", type=float, help="seconds to the first token")
    command.add_argument("--tpot", type=float, help="seconds for each output token")
    command.add_argument("--rpm", type=int, help="requests a minute")
    command.add_argument("--tpm", type=int, help="tokens a minute")
    command.add_argument("--itpm", type=int, help="input tokens a minute")
    command.add_argument("--otpm", type=int, help="output tokens a minute")
    command.add_argument(
        "--traffic", choices=["conversation", "code"], default="conversation", help="how long answers are"
    )
    command.add_argument("--attached", action="store_true", help="end when standard input does")
    return command


def config_from_options(options: argparse.Namespace) -> ProviderConfig:
    """The provider that the command line describes.

    Raises:
        InvalidProvider: it describes none.
    """
    raw = json.loads(options.config) if options.config else {}
    raw |= {n: v for n in ("dialect", "slots", "ttft", "tpot") if (v := getattr(options, n)) is not None}
    units = {"rpm": "requests", "tpm": "tokens", "itpm": "input_tokens", "otpm": "output_tokens"}
    rates = [{"unit": units[n], "amount": v} for n in units if (v := getattr(options, n)) is not None]
    if rates:
        raw["rate_limits"] = [*raw.get("rate_limits", []), *rates]
    return ProviderConfig.from_json(json.dumps(raw))


async def serve(options: argparse.Namespace, config: ProviderConfig) -> None:
    """Serve until told to stop."""
    from forebay.simulation.provider.http_server import ProviderServer, start_server  # noqa: PLC0415 - a wrong option is told before a web server is loaded
    from forebay.simulation.provider.traffic import Traffic  # noqa: PLC0415

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    traffic = Traffic.code() if options.traffic == "code" else Traffic.conversation()
    runner, url = await start_server(ProviderServer(config, seed=options.seed, traffic=traffic), port=options.port)
    try:
        print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)  # noqa: T201 - the parent reads it
        if options.attached:
            loop.add_reader(sys.stdin.fileno(), _stop_at_end_of_input, stop)
        gc.freeze()
        await stop.wait()
    finally:
        await runner.cleanup()


def _stop_at_end_of_input(stop: asyncio.Event) -> None:
    """Standard input has something to say, or has ended."""
    if not os.read(sys.stdin.fileno(), 4096):
        stop.set()


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    command = parser()
    options = command.parse_args(arguments)
    try:
        config = config_from_options(options)
    except (InvalidProviderConfig, ValueError) as error:
        command.error(str(error))
    asyncio.run(serve(options, config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
