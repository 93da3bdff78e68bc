"""A server of one file on the loopback, with the faults that real ones have."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

CONTENT = bytes(range(256)) * 1000


@dataclass
class Server:
    """What the server does, and what it was asked."""

    content: bytes = CONTENT
    url: str = ""
    etag: str | None = '"1"'
    modified: str | None = None
    kind: str = "application/octet-stream"
    cut: int | None = None  # close the connection after so many bytes
    claimed: int | None = None  # a wrong Content-Length
    ranges: bool = True  # whether it knows Range
    conditions: bool = True  # whether it knows If-Range
    piece: int | None = None  # the most bytes it sends of a range
    chunked: bool = False
    statuses: list[int] = field(default_factory=list)  # of the next answers; then 200
    before: Callable[[], None] = lambda: None  # called before each answer
    requests: list[tuple[str | None, str | None]] = field(default_factory=list)  # Range and If-Range

    @property
    def asked(self) -> list[str | None]:
        """The Range of every request."""
        return [span for span, _ in self.requests]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        self.requests.append((wanted, condition))
        self.before()
        handler.close_connection = True
        status = self.statuses.pop(0) if self.statuses else 200
        if status != 200:
            handler.send_error(status)
            return
        changed = self.conditions and condition is not None and condition not in (self.etag, self.modified)
        resumed = wanted is not None and self.ranges and not changed
        start = int((wanted or "").removeprefix("bytes=").rstrip("-")) if resumed else 0
        if start >= len(self.content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = self.content[start:][: self.piece if resumed else None]
        handler.send_response(206 if resumed else 200)
        if resumed:
            handler.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(self.content)}")
        for name, value in {"ETag": self.etag, "Last-Modified": self.modified, "Content-Type": self.kind}.items():
            if value is not None:
                handler.send_header(name, value)
        if self.chunked:
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"%x\r\n" % len(body) + body[: self.cut])
            return
        handler.send_header("Content-Length", str(len(body) if self.claimed is None else self.claimed))
        handler.end_headers()
        handler.wfile.write(body[: self.cut])


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, file: str = "weights.pt") -> Iterator[Server]:
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
    told.url = f"http://127.0.0.1:{http.server_port}/{file}"
    try:
        yield told
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
