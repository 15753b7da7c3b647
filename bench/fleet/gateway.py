"""The gateway in its own process, with one provider: ``python -m bench.fleet.gateway NAME URL``."""

from __future__ import annotations

import sys

from bench.fleet.ways import settings
from forebay.gateway import serve

if __name__ == "__main__":
    sys.exit(serve(settings(sys.argv[1], sys.argv[2]), ready=lambda gateway: print(gateway.port, flush=True)))
