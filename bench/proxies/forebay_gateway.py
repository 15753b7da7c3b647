"""The gateway in its own process: ``python -m bench.proxies.forebay_gateway URL`` prints its port."""

from __future__ import annotations

import sys

from forebay.gateway import GatewaySettings, TargetSettings, serve

if __name__ == "__main__":
    openai = TargetSettings(name="openai", url=sys.argv[1], max_concurrent=100_000)
    settings = GatewaySettings(targets=(openai,), listen="127.0.0.1:0", drain_timeout=1.0)
    sys.exit(serve(settings, ready=lambda gateway: print(gateway.port, flush=True)))
