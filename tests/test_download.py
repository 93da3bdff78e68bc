"""Downloads from a server on the loopback: whole, resumed, refused, and never asked for twice."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from consistency.download import download
from consistency.errors import UserError

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does, and the Range of every request it got."""

    url: str = ""
    content: bytes = CONTENT
    cut: int | None = None  # close the connection after so many bytes
    ranges: bool = True  # whether it knows how to resume
    chunked: bool = False
    status: int = 200
    requests: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            told.requests.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and told.ranges else 0
            if told.status != 200:
                self.send_error(told.status)
                return
            if start >= len(told.content):
                self.send_error(416)
                return
            body = told.content[start:]
            self.send_response(206 if start else 200)
            if told.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % len(body) + body[: told.cut])
            else:
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: told.cut])
            self.close_connection = True

        def log_message(self, *words: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    told.url = f"http://127.0.0.1:{http.server_port}/weights.pt"
    yield told
    http.shutdown()
    thread.join()
    http.server_close()


def mistake(server: Server, path: Path) -> str:
    with pytest.raises(UserError) as error:
        download(server.url, path, DIGEST)
    assert "\n" not in str(error.value)
    assert not path.exists()
    return str(error.value)


def test_a_whole_file_arrives_and_no_part_is_left(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "weights.pt"
    download(server.url, path, DIGEST)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.pt"]
    assert server.requests == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on_where_it_stopped(server: Server, tmp_path: Path, ranges: bool) -> None:
    """And starts over with a server that cannot resume."""
    path = tmp_path / "weights.pt"
    server.cut, server.ranges = 100_000, ranges
    message = mistake(server, path)
    assert "the connection closed after 100000 of 256000 bytes" in message
    assert "Run the same command again to go on" in message
    server.cut = None
    download(server.url, path, DIGEST)
    assert path.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-"]


def test_a_cut_in_a_chunked_answer_is_noticed(server: Server, tmp_path: Path) -> None:
    server.chunked, server.cut = True, 1000
    assert "cannot download" in mistake(server, tmp_path / "weights.pt")


def test_a_part_that_is_whole_already_is_used(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.with_name("weights.pt.part").write_bytes(CONTENT)
    download(server.url, path, DIGEST)
    assert path.read_bytes() == CONTENT


def test_a_file_of_another_digest_is_removed(server: Server, tmp_path: Path) -> None:
    server.content = b"something else" * 100
    found = hashlib.sha256(server.content).hexdigest()
    message = mistake(server, tmp_path / "weights.pt")
    assert f"gave a file of sha256 {found}, not {DIGEST}: it was removed" in message
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_is_not_asked_for(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(CONTENT)
    download(server.url, path, DIGEST)
    assert server.requests == []


def test_a_wrong_file_in_its_place_is_replaced(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"an older version")
    download(server.url, path, DIGEST)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [403, 404, 500])
def test_an_error_of_the_server_is_told(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    message = mistake(server, tmp_path / "weights.pt")
    assert f"cannot download {server.url}" in message


def test_without_a_network_the_file_and_its_digest_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "weights.pt"
    message = mistake(Server("http://127.0.0.1:9/weights.pt"), path)
    assert f"put the file with sha256 {DIGEST} at {path} by hand" in message
