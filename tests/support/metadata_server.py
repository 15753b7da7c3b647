"""The metadata service of an EC2 instance (IMDSv2), on the loopback interface."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class MetadataServer(ThreadingHTTPServer):
    """The service: its items, and the only token that it accepts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.items = {"placement/region": "eu-west-1"}
        self.token = "token-1"  # noqa: S105 - of a double
        self.requests: list[str] = []
        self.nonsense = b""  # sent instead of an answer

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self) -> None:
        asks = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if asks else 400, self.server.token)

    def do_GET(self) -> None:
        item = self.path.removeprefix("/latest/meta-data/")
        if self.headers["X-aws-ec2-metadata-token"] != self.server.token:
            self._answer(401, "")
        elif item in self.server.items:
            self._answer(200, self.server.items[item])
        else:
            self._answer(404, "not found")

    def _answer(self, status: int, text: str) -> None:
        if self.server.nonsense:
            self.wfile.write(self.server.nonsense)
            return
        self.server.requests.append(f"{self.command} {self.path} {status}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """Run the service in a thread."""
    with MetadataServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
