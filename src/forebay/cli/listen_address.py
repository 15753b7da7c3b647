"""The option ``--listen`` of commands that answer probes."""

from __future__ import annotations

from forebay.cli.store_command import USAGE_ERROR, fail
from forebay.gateway.address import parse_address


def listen_address(text: str | None) -> tuple[str, int] | None:
    """Return the host and the port of ``HOST:PORT``; exit if it is something else."""
    if text is None:
        return None
    address = parse_address(text)
    if address is None:
        fail("--listen: it must be HOST:PORT, such as 0.0.0.0:9000", status=USAGE_ERROR)
    return address.host, address.port
