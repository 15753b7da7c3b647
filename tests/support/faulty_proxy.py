"""A proxy in front of a service of AWS, which answers some requests itself: as a service does that is in trouble."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import parse_qs, urlsplit

THROTTLING: Final = (400, "Throttling")
UNAVAILABLE: Final = (503, "ServiceUnavailable")
HTML: Final = (200, "<html><body><h1>Proxy<br></body>")  # a page of a proxy on the way; other statuses have it too
XHTML: Final = (200, "<html><body/></html>")
CUT: Final = (0, "")  # the connection is closed without an answer
LOST: Final = (-1, "")  # the same, after the service has done it


class FaultyProxy(ThreadingHTTPServer):
    """The proxy.

    Attributes:
        faults: by action: what happens to its next requests.
        actions: those that were asked for, in order.
        before_answer: called with each request, before it is answered.
    """

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(endpoint).netloc
        self.faults: dict[str, list[tuple[int, str]]] = {}
        self.actions: list[str] = []
        self.before_answer: Callable[[], object] = lambda: None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        action = parse_qs(body.decode())["Action"][0]
        self.server.actions.append(action)
        self.server.before_answer()
        faults = self.server.faults.get(action)
        status, code = faults.pop(0) if faults else (None, "")
        if status is None or (status, code) == LOST:
            answered, content = self._forward(body)
            if status is None:
                self._answer(answered, content)
                return
        if not code:
            self.close_connection = True
            return
        if code.startswith("<"):
            self._answer(status or 500, code.encode())
            return
        error = f"<ErrorResponse><Error><Code>{code}</Code><Message>try later</Message></Error></ErrorResponse>"
        self._answer(status or 500, error.encode())

    def _forward(self, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30.0)
        with contextlib.closing(connection):
            connection.request("POST", self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            return answer.status, answer.read()

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def faulty_proxy(endpoint: str) -> Iterator[FaultyProxy]:
    """Run a proxy in a thread."""
    with FaultyProxy(endpoint) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
