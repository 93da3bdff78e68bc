"""A server of one file on the loopback, with the faults that real ones have."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

CONTENT = bytes(range(256)) * 1000


@dataclass
class Server:
    """What the server does, and what it was asked."""

    content: bytes = CONTENT
    url: str = ""
    cuts: list[int | None] = field(default_factory=list)  # of the next answers: bytes before the connection closes
    chunked: bool = False
    statuses: list[int] = field(default_factory=list)  # of the next answers; then 200
    before: Callable[[], None] = lambda: None  # called before each answer
    requests: list[Message] = field(default_factory=list)  # their headers

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(handler.headers)
        self.before()
        handler.close_connection = True
        status = self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            handler.send_error(status)
            return
        cut = self.cuts.pop(0) if self.cuts else None
        handler.send_response(200)
        if self.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            end = b"\r\n0\r\n\r\n" if cut is None else b""
            handler.wfile.write(b"%x\r\n" % len(self.content) + self.content[:cut] + end)
            return
        handler.send_header("Content-Length", str(len(self.content)))
        handler.end_headers()
        handler.wfile.write(self.content[:cut])


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server at work, and no proxy in between."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            # A client that gave up waiting is no fault of the server's.
            with suppress(ConnectionError):
                told.answer(self)

        def log_message(self, *words: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    told.url = f"http://127.0.0.1:{http.server_port}/weights.pt"
    try:
        yield told
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
