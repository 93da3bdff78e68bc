"""A server of one file on the loopback, with the faults that real ones have."""

from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any

CONTENT = bytes(range(256)) * 1000


class Server(ThreadingHTTPServer):
    """A server that says what it was asked, and does what it is told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/weights.pt"
        self.content, self.chunked = CONTENT, False
        self.cuts: list[int] = []  # of the next answers: bytes before the connection closes
        self.statuses: list[int] = []  # of the next answers; then 200
        self.before: Callable[[socket], Any] = lambda connection: None  # called before each answer
        self.requests: list[Message] = []  # their headers


class Handler(BaseHTTPRequestHandler):
    """One connection, which is closed after one answer."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.requests.append(self.headers)
        # A client that gave up waiting is no fault of the server's.
        with suppress(ConnectionError):
            self.server.before(self.connection)
            status = self.server.statuses.pop(0) if self.server.statuses else 200
            self.send_error(status) if status != 200 else self.send_content(self.server.content)

    def send_content(self, content: bytes) -> None:
        """The file or, where the next answer is cut, its beginning."""
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        self.send_response(200)
        if self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            end = b"\r\n0\r\n\r\n" if cut is None else b""
            self.wfile.write(b"%x\r\n" % len(content) + content[:cut] + end)
        else:
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:cut])

    def log_message(self, *words: Any) -> None:
        """Say nothing."""
