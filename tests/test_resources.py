"""What is downloaded: the registry, first digests and their enforcement, and the verb and the rule that fetch."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.loopback import CONTENT, Server, serving
from tests.workflow.checkout import fresh

from consistency import __main__ as cli
from consistency.errors import UserError
from consistency.resources import fetch, find, open_resource, recorded, registry, resource_path

ROOT = Path(__file__).parents[1]
NAME = "weights.pt"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OTHER = b"another file"
PATH = Path("resources") / NAME
LOCK = Path("config/resources.lock")
ENTRY = {"url": "http://127.0.0.1:9/weights.pt", "about": "w", "licence": "MIT", "digest_source": "us", "sha256": None}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project."""
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as told:
        yield told


def register(**entries: dict[str, Any]) -> None:
    """Write the registry, of names with '.' as '_'."""
    content = {name.replace("_", "."): ENTRY | entry for name, entry in entries.items()}
    Path("config/resources.yaml").write_text(yaml.safe_dump(content))


def by_hand(content: bytes = CONTENT, name: str = NAME) -> None:
    resource_path(name).parent.mkdir(exist_ok=True)
    resource_path(name).write_bytes(content)


def mistake(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the registry


def test_the_projects_registry_is_valid_and_has_what_the_studies_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    known = registry()
    teachers = [name for name in known if name.startswith("edm-")]
    pairs = [
        (data, arch)
        for data in ("cifar10-32x32-uncond", "cifar10-32x32-cond", "ffhq-64x64-uncond")
        for arch in ("vp", "ve")
    ]
    assert {f"edm-{data}-{arch}.pkl" for data, arch in pairs} | {"edm-imagenet-64x64-cond-adm.pkl"} == set(teachers)
    assert set(known) - set(teachers) == {"cifar-10-python.tar.gz", "inception-2015-12-05.pt", "vgg16-397923af.pth"}
    assert all(
        resource.url.startswith("https://") and resource.url.endswith(f"/{name}") for name, resource in known.items()
    )
    assert set(recorded()) <= {name for name, resource in known.items() if resource.sha256 is None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "F" * 64}, "key 'weights.pt.sha256': string should match pattern"),
        ({"sha256": "abc"}, "key 'weights.pt.sha256': string should match pattern"),
        ({"md5": "0" * 31}, "key 'weights.pt.md5': string should match pattern"),
        ({"size": "12"}, "key 'weights.pt.size': input should be a valid integer"),
        ({"url": "file:///etc/passwd"}, "key 'weights.pt.url': string should match pattern"),
        ({"licence": ""}, "key 'weights.pt.licence': string should have at least 1 character"),
        ({"sha265": None}, "unknown key 'weights.pt.sha265'; did you mean 'sha256'?"),
        ({"sha256": DIGEST, "sha256_prefix": "00000000"}, "weights.pt: sha256 does not begin with sha256_prefix"),
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
        ("- a", "config/resources.yaml must hold a file name and its keys"),
        ("a.pt: x", "config/resources.yaml: 'a.pt' must have keys and values"),
        ("a.pt: {url: 'http://a'}", "config/resources.yaml: key 'a.pt.about' is missing"),
        ("../a.pt: {}", "config/resources.yaml: '../a.pt' is not a file name"),
        (".hidden: {}", "config/resources.yaml: '.hidden' is not a file name"),
    ],
)
def test_a_registry_of_another_form_is_refused(text: str, message: str) -> None:
    Path("config/resources.yaml").write_text(text)
    assert mistake(registry).startswith(message)


def test_outside_a_project_it_is_said_where_to_run() -> None:
    assert "commands run in the project's root" in mistake(registry)


def test_an_unknown_name_gets_the_nearest() -> None:
    register(weights_pt={})
    assert mistake(lambda: find("weigths.pt")).endswith("did you mean weights.pt?")
    assert mistake(lambda: find("x")).endswith("there are weights.pt")


# --- fetching


def test_a_file_of_a_published_digest_arrives_and_is_not_asked_for_again(server: Server) -> None:
    register(weights_pt={"url": server.url, "sha256": DIGEST, "size": len(CONTENT)})
    assert fetch(NAME) == fetch(NAME) == open_resource(NAME) == PATH
    assert PATH.read_bytes() == CONTENT
    assert server.asked == [None]
    assert not LOCK.exists()


def test_a_damaged_file_is_fetched_again(server: Server) -> None:
    register(weights_pt={"url": server.url, "sha256": DIGEST})
    by_hand(OTHER)
    fetch(NAME)
    assert PATH.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "known",
    [
        {"sha256": "0" * 64},
        {"sha256_prefix": "00000000"},
        {"md5": "0" * 32},
        {"size": 5},
        {"sha256": DIGEST, "md5": "0" * 32},
    ],
)
def test_whatever_is_published_must_agree(server: Server, known: dict[str, Any]) -> None:
    register(weights_pt={"url": server.url} | known)
    assert "it was removed" in mistake(lambda: fetch(NAME))
    assert not PATH.exists()
    assert not LOCK.exists()
    by_hand()
    assert f"{PATH} has " in mistake(lambda: open_resource(NAME))


def test_the_first_digest_is_recorded_and_enforced_ever_after(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on another machine, which has the lock file from the repository."""
    md5 = hashlib.md5(CONTENT).hexdigest()
    register(weights_pt={"url": server.url, "sha256_prefix": DIGEST[:8], "md5": md5})
    fetch(NAME)
    assert f"{LOCK}: recorded sha256 {DIGEST} of {NAME}" in capsys.readouterr().out
    assert recorded() == {NAME: DIGEST}
    PATH.unlink()
    server.content, server.etag = OTHER, '"2"'
    register(weights_pt={"url": server.url})
    message = mistake(lambda: fetch(NAME))
    assert f"not {DIGEST}: it was removed" in message
    assert not PATH.exists()
    assert recorded() == {NAME: DIGEST}


def test_the_lock_file_is_sorted_and_readable(server: Server) -> None:
    names = ["b_pt", "a_pt", "c_pt"]
    register(**{name: {"url": server.url} for name in names})
    for name in names:
        fetch(name.replace("_", "."))
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert lines == [f"{DIGEST}  {name}.pt" for name in "abc"]
    done = subprocess.run(["sha256sum", "-c", "../config/resources.lock"], cwd="resources", capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", f"{DIGEST} a.pt", f"{DIGEST[:-1]}  a.pt", f"{DIGEST}  b.pt"])
def test_a_damaged_lock_file_is_named_with_its_line(line: str) -> None:
    register(weights_pt={})
    LOCK.write_text(f"# digests\n{DIGEST}  b.pt\n{line}\n")
    by_hand()
    assert mistake(lambda: open_resource(NAME)).startswith(f"{LOCK}, line 3: ")


# --- opening


def test_a_missing_file_is_named_with_how_to_get_it(no_network: None) -> None:
    register(weights_pt={"sha256": DIGEST})
    assert mistake(lambda: open_resource(NAME)) == (
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
    message = mistake(lambda: open_resource(NAME))
    assert f"{PATH} has sha256 " in message
    assert f"not {DIGEST}: run `python -m consistency fetch weights.pt`" in message


# --- several at once


def at_once(*actions: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_who_wants_a_file_that_another_fetches_waits_for_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers the first only when the second is at the lock."""
    register(weights_pt={"url": server.url})
    waiting = threading.Event()
    monkeypatch.setattr("builtins.print", lambda *words, **_: "waiting for it" in words[0] and waiting.set())
    server.before = lambda: bool(waiting.wait(10)) and None
    at_once(lambda: fetch(NAME), lambda: fetch(NAME))
    assert waiting.is_set()
    assert server.asked == [None]
    assert PATH.read_bytes() == CONTENT


def test_first_digests_of_several_files_are_all_recorded(server: Server) -> None:
    names = [f"f{k}.pt" for k in range(12)]
    register(**{name.replace(".", "_"): {"url": server.url} for name in names})
    at_once(*(lambda name=name: fetch(name) for name in names))
    assert recorded() == dict.fromkeys(names, DIGEST)


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
        "error: there is no resource 'wieghts.pt' in config/resources.yaml; did you mean weights.pt?\n"
    )
    assert server.requests == []
    assert cli.main(["fetch", NAME]) == 0
    assert PATH.exists()


def test_fetching_waits_for_no_heavy_import() -> None:
    register(weights_pt={"sha256": DIGEST})
    by_hand()
    code = (
        "import sys\n"
        "from consistency.__main__ import main\n"
        "assert main(['fetch', 'weights.pt']) == 0\n"
        "heavy = {'torch', 'numpy', 'scipy', 'mlflow', 'matplotlib', 'pandas', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
def test_the_rule_fetches_a_file_of_the_registry_and_no_other(server: Server, tmp_path: Path) -> None:
    checkout = fresh(tmp_path / "a checkout")
    (checkout.path / "config/resources.yaml").write_text(yaml.safe_dump({NAME: ENTRY | {"url": server.url}}))
    checkout.done(f"resources/{NAME}")
    assert (checkout.path / PATH).read_bytes() == CONTENT
    assert re.search(rf"recorded sha256 {DIGEST}", (checkout.path / f"logs/resources/{NAME}.log").read_text())
    assert "Nothing to be done" in checkout.done(f"resources/{NAME}")
    assert server.asked == [None]
    assert checkout.run("resources/other.pt") != 0
    assert "MissingRuleException" in checkout.output
