"""Downloads from a server on the loopback: whole, resumed, refused, and never two versions in one file."""

import hashlib
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.loopback import CONTENT, Server, serving

from consistency import download as module
from consistency.download import download
from consistency.errors import UserError

NEWER = CONTENT[::-1] * 2
BY_HAND = "put it there by hand"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, and no pause before a second attempt."""
    monkeypatch.setattr(module, "_PAUSES", (0.0, 0.0))
    with serving(monkeypatch) as told:
        yield told


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "weights.pt"


def fetch(server: Server, path: Path, expected: bytes = CONTENT) -> None:
    """Download what must be `expected` in the end."""

    def fault(part: Path) -> str | None:
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        return None if digest == hashlib.sha256(expected).hexdigest() else f"has sha256 {digest}"

    download(server.url, path, fault, BY_HAND)


def arrives(server: Server, path: Path, expected: bytes = CONTENT) -> None:
    """The file is whole, and nothing lies beside it."""
    fetch(server, path, expected)
    assert path.read_bytes() == expected
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.pt"]


def mistake(server: Server, path: Path) -> str:
    """The download ends in an error of one line and leaves what stood at path."""
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(UserError) as error:
        fetch(server, path)
    assert "\n" not in str(error.value)
    assert (path.read_bytes() if path.exists() else None) == before
    return str(error.value)


def stopped(server: Server, path: Path, after: int = 100_000) -> None:
    """Every attempt of a first download breaks off; later ones go through."""
    server.cut, server.ranges = after, False
    assert f"the connection closed after {after} of 256000 bytes" in mistake(server, path)
    server.cut, server.ranges = None, True
    server.requests.clear()


# --- the plain way


def test_a_whole_file_arrives_and_no_part_is_left(server: Server, path: Path) -> None:
    arrives(server, path)
    assert server.requests == [(None, None)]


def test_a_wrong_file_in_its_place_is_replaced(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"an older version")
    arrives(server, path)


def test_a_faulty_file_is_removed(server: Server, path: Path) -> None:
    server.content = b"something else" * 100
    found = hashlib.sha256(server.content).hexdigest()
    message = mistake(server, path)
    assert f"gave a file that has sha256 {found}: it was removed" in message
    assert BY_HAND in message
    assert list(path.parent.iterdir()) == []


def test_a_proxy_of_the_environment_is_used(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loopback plays the proxy of a host that has no address."""
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/weights.pt"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.url = "http://nowhere.invalid/weights.pt"
    arrives(server, path)


# --- going on


@pytest.mark.parametrize("validator", [{"etag": '"1"'}, {"etag": None, "modified": "Wed, 21 Oct 2015 07:28:00 GMT"}])
def test_a_cut_download_goes_on_where_it_stopped(server: Server, path: Path, validator: dict[str, str | None]) -> None:
    for name, value in validator.items():
        setattr(server, name, value)
    stopped(server, path)
    arrives(server, path)
    assert server.requests == [("bytes=100000-", validator.get("modified", '"1"'))]


def test_a_cut_is_gone_on_from_in_the_same_run(server: Server, path: Path) -> None:
    """As often as it takes, as long as each attempt gets further."""
    server.cut = 30_000
    arrives(server, path)
    assert server.asked == [None, *(f"bytes={30_000 * k}-" for k in range(1, 9))]


def test_a_server_that_ignores_range_is_read_from_the_start(server: Server, path: Path) -> None:
    stopped(server, path)
    server.ranges = False
    arrives(server, path)
    assert server.asked == ["bytes=100000-"]


def test_a_server_that_sends_ranges_in_pieces_is_read_to_the_end(server: Server, path: Path) -> None:
    stopped(server, path)
    server.piece = 60_000
    arrives(server, path)
    assert server.asked == ["bytes=100000-", "bytes=160000-", "bytes=220000-"]


@pytest.mark.parametrize("conditions", [True, False])
def test_a_file_that_changed_is_fetched_afresh(server: Server, path: Path, conditions: bool) -> None:
    """Also from a server that knows no If-Range and would send the end of another version."""
    stopped(server, path)
    server.content, server.etag, server.conditions = NEWER, '"2"', conditions
    arrives(server, path, NEWER)


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
def test_without_a_name_for_its_version_a_file_is_fetched_afresh(server: Server, path: Path, etag: str | None) -> None:
    server.etag = etag
    stopped(server, path)
    arrives(server, path)
    assert server.asked == [None]


def test_a_part_from_another_address_is_not_continued(server: Server, path: Path) -> None:
    stopped(server, path)
    server.url = server.url.replace("weights.pt", "other/weights.pt")
    arrives(server, path)
    assert server.asked == [None]


def test_a_part_of_unknown_origin_is_not_continued(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.with_name("weights.pt.part").write_bytes(b"whatever")
    arrives(server, path)
    assert server.asked == [None]


def test_a_part_that_is_whole_already_is_used(server: Server, path: Path) -> None:
    stopped(server, path)
    path.with_name("weights.pt.part").write_bytes(CONTENT)
    arrives(server, path)
    assert server.asked == ["bytes=256000-"]


def test_a_part_longer_than_the_servers_file_is_given_up(server: Server, path: Path) -> None:
    stopped(server, path)
    path.with_name("weights.pt.part").write_bytes(CONTENT + b"more")
    arrives(server, path)
    assert server.asked == ["bytes=256004-", None]


# --- faults of servers and networks


def test_a_cut_in_a_chunked_answer_is_noticed(server: Server, path: Path) -> None:
    server.chunked, server.cut = True, 1000
    assert "cannot download" in mistake(server, path)


def test_a_content_length_too_large_does_not_hang(server: Server, path: Path) -> None:
    """The second attempt learns that nothing is missing."""
    server.claimed = len(CONTENT) + 1000
    arrives(server, path)
    assert server.asked == [None, "bytes=256000-"]


def test_a_content_length_too_small_is_a_faulty_file(server: Server, path: Path) -> None:
    server.claimed = 1000
    assert "it was removed" in mistake(server, path)


@pytest.mark.parametrize(
    ("kind", "content"),
    [("text/html; charset=utf-8", b"please log in"), ("application/octet-stream", b"\n<!DOCTYPE html><html>no</html>")],
)
def test_a_web_page_is_not_taken_for_the_file(server: Server, path: Path, kind: str, content: bytes) -> None:
    server.kind, server.content = kind, content
    message = mistake(server, path)
    assert "it answered with a web page instead of the file" in message
    assert len(server.requests) == 1


def test_an_empty_answer_is_not_taken_for_the_file(server: Server, path: Path) -> None:
    server.claimed, server.cut = 0, 0
    assert "it answered with an empty file" in mistake(server, path)


@pytest.mark.parametrize(("status", "attempts"), [(403, 1), (404, 1), (500, 3), (503, 3), (429, 3)])
def test_an_error_of_the_server_is_told(server: Server, path: Path, status: int, attempts: int) -> None:
    """At once, or after a few attempts when it may pass."""
    server.statuses = [status] * 10
    message = mistake(server, path)
    assert message.startswith(f"cannot download {server.url} (HTTP {status} ")
    assert message.endswith(f"Run the same command again to go on, or {BY_HAND}")
    assert len(server.requests) == attempts


def test_a_passing_error_passes(server: Server, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.statuses = [503, 502]
    arrives(server, path)
    assert "HTTP 503 Service Unavailable; trying again in 0 s" in capsys.readouterr().err


def test_a_connection_that_is_reset_is_tried_again(server: Server, path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hostile:
        hostile.settimeout(10)
        server.url = f"http://127.0.0.1:{hostile.getsockname()[1]}/weights.pt"

        def reset() -> None:
            for _ in range(3):
                connection, _address = hostile.accept()
                connection.recv(1000)
                # To linger for no time means to reset.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

        thread = threading.Thread(target=reset)
        thread.start()
        message = mistake(server, path)
        thread.join()
    assert "Connection reset by peer" in message


def test_silence_is_an_error(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(module, "_TIMEOUT", 0.05)
    server.before = lambda: bool(over.wait(10)) and None
    try:
        assert "timed out" in mistake(server, path)
    finally:
        over.set()
    assert len(server.requests) == 3


def test_without_a_network_it_is_said_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("it waited"))
    assert BY_HAND in mistake(Server(url="http://127.0.0.1:9/weights.pt"), path)


# --- faults of the disk


@pytest.fixture
def disk() -> Iterator[Callable[[int | None], None]]:
    """disk(n): files end at n bytes, as a full disk would end them; disk(None): no longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit(None)


def test_a_full_disk_is_not_the_networks_fault(
    server: Server, path: Path, disk: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when there is room, the download goes on from what the disk took."""
    monkeypatch.setattr(module, "_CHUNK", 40_000)
    disk(150_000)
    message = mistake(server, path)
    disk(None)
    assert message.startswith(f"cannot write {path}.part: File too large. Make room")
    assert len(server.requests) == 1
    arrives(server, path)
    assert server.asked == [None, "bytes=150000-"]


def test_a_folder_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "deep").write_bytes(b"a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write .*weights\.pt: (File exists|Not a directory)"):
        fetch(server, tmp_path / "deep" / "weights.pt")
    assert server.requests == []
