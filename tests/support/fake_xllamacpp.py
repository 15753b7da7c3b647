"""A double of the library xllamacpp, to be found under its name. Its models are text files that say what to do.

"slow": a minute is taken to load it; "bad": it cannot be loaded. Any other one is the answer of the model.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class CommonParams:
    """The settings that are set; those of a part are not known before."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(path="")
        self.cpuparams, self.cpuparams_batch = SimpleNamespace(n_threads=0), SimpleNamespace(n_threads=0)
        self.sampling = SimpleNamespace(seed=0)
        self.n_parallel = 1
        self.n_ctx = 0
        self.api_keys: list[str] = []


class Server:
    """A server of its file. The answer begins with the slots, the context of all of them, the threads and the seed."""

    def __init__(self, params: CommonParams) -> None:
        text = Path(params.model.path).read_text()
        if text == "bad":
            raise RuntimeError
        if text == "slow":
            threading.Event().wait(60)
        answer = f"{params.n_parallel} {params.n_ctx} {params.cpuparams.n_threads} {params.sampling.seed} {text}"

        class Handler(BaseHTTPRequestHandler):
            """Answers each call that has the key."""

            def do_POST(self) -> None:
                """Answer a call."""
                self.rfile.read(int(self.headers["content-length"]))
                is_ours = self.headers["authorization"] == f"Bearer {params.api_keys[0]}"
                self.send_response(200 if is_ours else 401)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                choice = {"delta": {"content": answer}, "finish_reason": "stop"}
                self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\ndata: [DONE]\n\n")

            def log_message(self, *_: Any) -> None:
                """Write nothing to stderr."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.listening_address = f"http://127.0.0.1:{server.server_port}"
