"""Downloads: the registry, digests and their enforcement, and the verb and the rule that fetch."""

import hashlib
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tests.addresses import LOGINS, hidden
from tests.conftest import mistake
from tests.dangers import file_size_limit
from tests.loopback import CONTENT, Server
from tests.processes import PROXIES, ROOT, run_light
from tests.workflow.checkout import fresh

from consistency import __main__ as cli
from consistency.data import resources as module
from consistency.data.resources import fetch, find, open_resource, recorded, registry, resource_path

NAME = "weights.pt"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = b"another file"
PATH = Path("resources") / NAME
LOCK = Path("config/resources.lock")
ENTRY = {"url": "http://127.0.0.1:9/weights.pt", "about": "w", "licence": "MIT", "digest_source": "us", "sha256": None}


@pytest.fixture(autouse=True)
def empty_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is a project without a file."""
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before further attempts; they take no time."""
    made: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=made.append))
    return made


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> Iterator[Server]:
    """A server at work, and no proxy in between."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    with Server() as http:
        threading.Thread(target=http.serve_forever, args=(0.01,)).start()
        yield http
        http.shutdown()


def register(**entries: dict[str, Any]) -> None:
    """Write the registry, of names with '.' as '_'."""
    content = {name.replace("_", "."): ENTRY | entry for name, entry in entries.items()}
    Path("config/resources.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def by_hand(content: bytes = CONTENT, name: str = NAME) -> None:
    resource_path(name).parent.mkdir(exist_ok=True)
    resource_path(name).write_bytes(content)


# --- the registry


def test_the_projects_registry_is_valid_and_has_what_the_studies_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    known = registry()
    teachers = [name for name in known if name.startswith("edm-")]
    data = ("cifar10-32x32-uncond", "cifar10-32x32-cond", "ffhq-64x64-uncond")
    assert set(teachers) == {f"edm-{each}-{arch}.pkl" for each in data for arch in ("vp", "ve")} | {
        "edm-imagenet-64x64-cond-adm.pkl"
    }
    others = {"cifar-10-python.tar.gz", "inception-2015-12-05.pt", "vgg16-397923af.pth", "edm_imagenet64_ema.pt"}
    assert set(known) - set(teachers) == others
    assert all(
        resource.url.startswith("https://") and resource.url.endswith(f"/{name}") for name, resource in known.items()
    )
    assert set(recorded()) <= {name for name, resource in known.items() if resource.sha256 is None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "F" * 64}, "key 'weights.pt.sha256': string should match pattern"),
        ({"sha256": "abc"}, "key 'weights.pt.sha256': string should match pattern"),
        ({"size": "12"}, "key 'weights.pt.size': input should be a valid integer"),
        ({"url": "file:///etc/passwd"}, "key 'weights.pt.url': string should match pattern"),
        ({"licence": ""}, "key 'weights.pt.licence': string should have at least 1 character"),
        ({"sha265": None}, "unknown key 'weights.pt.sha265'; did you mean 'sha256'?"),
    ],
)
def test_a_mistake_in_the_registry_is_named(change: dict[str, Any], message: str) -> None:
    register(weights_pt=change)
    assert mistake(registry).startswith(f"config/resources.yaml: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "config/resources.yaml is not valid YAML: "),
        ("a.pt: {}\na.pt: {}", "config/resources.yaml is not valid YAML: found duplicate key"),
        ("- a", "config/resources.yaml: key '': input should be a valid dictionary"),
        ("a.pt: x", "config/resources.yaml: key 'a.pt': input should be a valid dictionary"),
        ("a.pt: {url: 'http://a'}", "config/resources.yaml: key 'a.pt.about' is missing"),
        ("../a.pt: {}", "config/resources.yaml: key '../a.pt': string should match pattern"),
        (".hidden: {}", "config/resources.yaml: key '.hidden': string should match pattern"),
    ],
)
def test_a_registry_of_another_form_is_refused(text: str, message: str) -> None:
    Path("config/resources.yaml").write_text(text, encoding="utf-8")
    assert mistake(registry).startswith(message)


def test_without_a_registry_the_shipped_one_is_read() -> None:
    assert "inception-2015-12-05.pt" in registry()
    register(weights_pt={})
    assert list(registry()) == ["weights.pt"]


def test_an_unknown_name_gets_the_nearest() -> None:
    register(weights_pt={})
    assert mistake(find, "weigths.pt").endswith("did you mean 'weights.pt'?")
    assert mistake(find, "x").endswith("there are weights.pt")


# --- fetching


def refused(server: Server) -> str:
    """The download ends in an error of one line, and leaves neither a file nor a digest."""
    message = mistake(fetch, NAME)
    assert {path.name for path in PATH.parent.iterdir()} == {f".{NAME}.lock"}
    assert not LOCK.exists()
    return message


def test_a_file_of_a_published_digest_arrives_and_is_not_asked_for_again(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    register(weights_pt={"url": server.url, "sha256": DIGEST, "size": len(CONTENT)})
    by_hand(b"of a killed process", f".{NAME}.1.tmp")
    by_hand(b"damaged")
    assert fetch(NAME) == fetch(NAME) == open_resource(NAME) == PATH
    assert PATH.read_bytes() == CONTENT
    assert [headers["Accept-Encoding"] for headers in server.requests] == ["identity"]
    assert {path.name for path in PATH.parent.iterdir()} == {NAME, f".{NAME}.lock"}
    assert not LOCK.exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"download {NAME}: 100%")
    assert "256k/256k" in line


def test_a_proxy_of_the_environment_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loopback plays the proxy of a host that has no address."""
    monkeypatch.setenv("http_proxy", server.url.removesuffix(f"/{NAME}"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    register(weights_pt={"url": f"http://nowhere.invalid/{NAME}", "sha256": DIGEST})
    assert fetch(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("chunked", [False, True])
def test_no_piece_is_taken_for_the_file_and_what_passes_is_tried_again(
    server: Server, chunked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server.chunked, server.cuts = chunked, [100_000, 1000, 100_000, 0]
    register(weights_pt={"url": server.url})
    assert f"cannot download {server.url} (" in refused(server)
    assert len(server.requests) == 4
    server.statuses, server.cuts = [503], [100_000]
    assert fetch(NAME).read_bytes() == CONTENT
    assert "HTTP 503 Service Unavailable; trying again in 1 s" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\n<!DOCTYPE html><html>please log in</html>", b""])
def test_a_web_page_is_not_taken_for_the_file(server: Server, content: bytes) -> None:
    server.content = content
    register(weights_pt={"url": server.url})
    assert "is empty or a web page (does the network ask for a login?): it was removed" in refused(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (503, 4), (429, 4)])
def test_an_error_of_the_server_is_told(server: Server, pauses: list[float], status: int, attempts: int) -> None:
    """It is told at once, or after a few attempts when it may pass."""
    server.statuses = [status] * 10
    register(weights_pt={"url": server.url, "sha256": DIGEST})
    message = refused(server)
    assert message.startswith(f"cannot download {server.url} (HTTP {status} ")
    assert message.endswith(f"Run the same command again, or put the file (sha256 {DIGEST}) at {PATH} by hand")
    assert len(server.requests) == attempts
    assert pauses == [1, 4, 15][: attempts - 1]


def test_a_connection_that_is_reset_is_tried_again(server: Server) -> None:
    def reset(connection: socket.socket) -> None:
        # To linger for no time means to reset.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(connection.detach())
        raise ConnectionResetError

    server.before = reset
    register(weights_pt={"url": server.url})
    assert "Connection reset by peer" in refused(server)
    assert len(server.requests) == 4


def test_silence_is_an_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(module, "_TIMEOUT", 0.05)
    server.before = lambda connection: over.wait(10)
    register(weights_pt={"url": server.url})
    try:
        assert "timed out" in refused(server)
    finally:
        over.set()
    assert len(server.requests) == 4


def test_without_a_network_it_is_said_at_once(server: Server, pauses: list[float]) -> None:
    register(weights_pt={})
    message = refused(server)
    assert message.startswith(f"cannot download {ENTRY['url']} (")
    assert "Connection refused" in message
    assert pauses == []


def test_a_password_in_an_address_is_not_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    url = server.url.replace("http://", "http://me:secret@")
    register(weights_pt={"url": url, "sha256": "0" * 64}, nowhere_pt={"url": "http://me:secret@127.0.0.1:9/x"})
    server.statuses = [503, 404]
    messages = [mistake(fetch, NAME), mistake(fetch, NAME), mistake(open_resource, NAME)]
    messages += [mistake(fetch, "nowhere.pt"), *capsys.readouterr()]
    assert f"cannot download {server.url} (HTTP 404 Not Found)" in messages[0]
    assert not [message for message in messages if "secret" in message or "me:" in message]
    assert "Authorization" in server.requests[0]


@pytest.mark.parametrize("login", LOGINS)
def test_no_message_about_a_download_tells_a_secret(
    login: str, pauses: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither that of its address, at a closed port, nor that of a proxy."""
    register(weights_pt={"url": f"http://{login}"})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    hidden(mistake(fetch, NAME) + mistake(open_resource, NAME))
    register(weights_pt={"url": "http://nowhere.invalid/x"})
    monkeypatch.setenv("http_proxy", f"http://{login}")
    hidden(mistake(fetch, NAME) + "".join(capsys.readouterr()))


def test_a_full_disk_is_not_the_networks_fault(server: Server) -> None:
    register(weights_pt={"url": server.url, "sha256": DIGEST})
    with file_size_limit(150_000):
        message = refused(server)
    assert message.startswith(f"cannot write {PATH}: File too large. ")
    assert "free disk space" in message
    assert len(server.requests) == 1


# --- digests


@pytest.mark.parametrize("known", [{"sha256": "0" * 64}, {"size": 5}, {"sha256": DIGEST, "size": 5}])
def test_whatever_is_published_must_agree(server: Server, known: dict[str, Any]) -> None:
    register(weights_pt={"url": server.url} | known)
    assert "it was removed" in mistake(fetch, NAME)
    assert not PATH.exists()
    assert not LOCK.exists()
    by_hand()
    assert f"{PATH} has " in mistake(open_resource, NAME)


def test_the_first_digest_is_recorded_and_enforced_ever_after(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is enforced on another machine too, which has the lock file from the repository."""
    register(weights_pt={"url": server.url})
    fetch(NAME)
    assert f"{LOCK}: recorded sha256 {DIGEST} of {NAME}" in capsys.readouterr().out
    assert recorded() == {NAME: DIGEST}
    PATH.unlink()
    server.content = OTHER
    register(weights_pt={"url": server.url})
    message = mistake(fetch, NAME)
    assert f"not {DIGEST}: it was removed" in message
    assert not PATH.exists()
    assert recorded() == {NAME: DIGEST}


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", f"{DIGEST} a.pt", f"{DIGEST[:-1]}  a.pt", f"{DIGEST}  b.pt"])
def test_a_damaged_lock_file_is_named_with_its_line(line: str) -> None:
    register(weights_pt={})
    LOCK.write_text(f"# digests\n{DIGEST}  b.pt\n{line}\n", encoding="utf-8")
    by_hand()
    assert mistake(open_resource, NAME).startswith(f"{LOCK}, line 3: ")


# --- opening


def test_a_missing_file_is_named_with_how_to_get_it(no_network: None) -> None:
    register(weights_pt={"sha256": DIGEST})
    assert mistake(open_resource, NAME) == (
        f"resources/weights.pt is missing: run `python -m consistency fetch weights.pt` where there is a network, "
        f"or get {ENTRY['url']} elsewhere and put the file (sha256 {DIGEST}) at resources/weights.pt by hand"
    )


def test_a_file_put_by_hand_is_as_good_as_a_download(no_network: None, capsys: pytest.CaptureFixture[str]) -> None:
    register(weights_pt={})
    by_hand()
    assert fetch(NAME) == open_resource(NAME) == PATH
    assert capsys.readouterr().out.count("recorded sha256") == 1
    assert recorded() == {NAME: DIGEST}


def test_a_changed_file_is_noticed_whatever_its_size_and_time_say() -> None:
    register(weights_pt={})
    by_hand()
    open_resource(NAME)
    before = PATH.stat()
    by_hand(CONTENT[:-1] + b"?")
    os.utime(PATH, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = mistake(open_resource, NAME)
    assert f"{PATH} has sha256 " in message
    assert f"not {DIGEST}: run `python -m consistency fetch weights.pt`" in message


# --- several at once


def test_who_wants_a_file_that_another_fetches_waits_for_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers the first only when the second is at the lock."""
    register(weights_pt={"url": server.url})
    waiting = threading.Event()
    monkeypatch.setattr("builtins.print", lambda *words, **_: "waiting for it" in words[0] and waiting.set())
    server.before = lambda connection: waiting.wait(10)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(fetch, [NAME, NAME])) == [PATH, PATH]
    assert waiting.is_set()
    assert len(server.requests) == 1
    assert PATH.read_bytes() == CONTENT


def test_first_digests_of_several_files_are_all_recorded_in_order(server: Server) -> None:
    names = [f"{letter}.pt" for letter in "abcdefghijkl"]
    register(**{name.replace(".", "_"): {"url": server.url} for name in names})
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(fetch, reversed(names)))
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines == [f"{DIGEST}  {name}" for name in names]
    subprocess.run(["sha256sum", "-c", "--quiet", "../config/resources.lock"], cwd="resources", check=True)


# --- the verb and the rule


def test_the_verb_lists_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    register(a_pt={"sha256": DIGEST}, b_pt={"sha256": DIGEST}, c_pt={"sha256": DIGEST}, longer_pt={})
    by_hand(name="a.pt")
    by_hand(OTHER, "b.pt")
    by_hand(name="longer.pt")
    assert cli.main(["fetch"]) == 0
    found = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert found == {
        "a.pt": "there",
        "b.pt": f"damaged: has sha256 {hashlib.sha256(OTHER).hexdigest()}, not {DIGEST}",
        "c.pt": "missing",
        "longer.pt": "there; its digest is recorded at its first use",
    }
    assert not LOCK.exists()


def test_the_verb_fetches_nothing_when_a_name_is_wrong(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    register(weights_pt={"url": server.url})
    assert cli.main(["fetch", NAME, "wieghts.pt"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no resource 'wieghts.pt' in config/resources.yaml; did you mean 'weights.pt'?\n"
    )
    assert server.requests == []
    assert cli.main(["fetch", NAME]) == 0
    assert PATH.exists()


def test_fetching_waits_for_no_heavy_import() -> None:
    register(weights_pt={"sha256": DIGEST})
    by_hand()
    run_light("fetch", "weights.pt")


@pytest.mark.slow
def test_the_rule_fetches_a_file_of_the_registry_and_no_other(server: Server, tmp_path: Path) -> None:
    checkout = fresh(tmp_path / "a checkout")
    (checkout.path / "config/resources.yaml").write_text(yaml.safe_dump({NAME: ENTRY | {"url": server.url}}))
    checkout.done(f"resources/{NAME}")
    assert (checkout.path / PATH).read_bytes() == CONTENT
    assert f"recorded sha256 {DIGEST}" in (checkout.path / f"logs/resources/{NAME}.log").read_text()
    assert "Nothing to be done" in checkout.done(f"resources/{NAME}")
    assert len(server.requests) == 1
    assert checkout.run("resources/other.pt") != 0
    assert "MissingRuleException" in checkout.output
