"""The gateway in its own process: ``python -m bench.proxies.forebay_gateway URL [WORKERS]`` prints its port.

It has an access log, as the command has one by default, in a file that is always as fast: nobody reads its output.
"""

from __future__ import annotations

import os
import sys

from forebay.gateway import GatewaySettings, TargetSettings, serve

if __name__ == "__main__":
    openai = TargetSettings(name="openai", url=sys.argv[1], max_concurrent=100_000)
    settings = GatewaySettings(
        targets=(openai,),
        listen="127.0.0.1:0",
        drain_timeout=1.0,
        access_log="text",
        access_log_to=os.devnull,
        workers=int(sys.argv[2]) if len(sys.argv) > 2 else 1,
    )
    sys.exit(serve(settings, ready=lambda gateway: print(gateway.port, flush=True)))
