"""Downloads: a registry of files with their sources and digests.

The digest is checked at every use and not cached: sha256 reads 1 GB/s, and no file here is much larger.
"""

import re
import sys
import time
from pathlib import Path
from typing import Annotated
from urllib.request import getproxies

from pydantic import Field, TypeAdapter, ValidationError

from consistency.base.errors import UserError, suggestion, user_error
from consistency.base.files import atomic, sha256, write_bytes
from consistency.base.locks import held
from consistency.base.progress import Progress
from consistency.base.urls import masked, without_secrets
from consistency.config.explain import explain
from consistency.config.fields import Section
from consistency.config.paths import SHIPPED
from consistency.config.reading import parse_yaml

# relative to the working directory
REGISTRY = Path("config/resources.yaml")
RECORDED = Path("config/resources.lock")
FOLDER = Path("resources")
# opened by the stages, beside official teachers
INCEPTION = "inception-2015-12-05.pt"

Text = Annotated[str, Field(min_length=1)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

_HEADER = """\
# The sha256 of what was downloaded and whose own digest nobody publishes (config/resources.yaml): that of the first
# download, enforced ever after. Commit this file. A line goes away only by hand, when a file is known to have changed.
"""
_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte
_PAUSES = (1.0, 4.0, 15.0)  # seconds before each further attempt
_PASSING = (408, 429, 500, 502, 503, 504)


class Resource(Section):
    """A file: its source, licence and digest."""

    url: Annotated[str, Field(pattern=r"^https?://\S+$")]
    about: Text
    licence: Text
    digest_source: Text
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    size: Annotated[int, Field(gt=0)] | None = None


def registry_file() -> Path:
    """Return config/resources.yaml or, where there is none, the file that the package ships."""
    return REGISTRY if REGISTRY.exists() else SHIPPED / REGISTRY.name


def registry() -> dict[str, Resource]:
    """Return the resources by file name. Raises UserError with the file and the key if the registry is not valid."""
    file = registry_file()
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"), file)
        return TypeAdapter(dict[FileName, Resource]).validate_python(content)
    except (OSError, UnicodeDecodeError) as error:
        raise user_error(error, f"cannot read {file}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, Resource)}") from None


def find(name: str) -> Resource:
    """Return the resource of that file name. Raises UserError with the nearest name if there is none."""
    known = registry()
    if name not in known:
        raise UserError(f"there is no resource {name!r} in {registry_file()}{suggestion(name, known)}")
    return known[name]


def resource_path(name: str) -> Path:
    """Return the path of a resource, present or not."""
    return FOLDER / name


def fetch(name: str) -> Path:
    """Download a resource unless it is there with the right digest. Waits for another process that fetches it.

    If no sha256 is published, that of the first download is recorded in config/resources.lock. Raises UserError if the
    file cannot be downloaded or has another digest.
    """
    resource, path = find(name), resource_path(name)
    with held(path.with_name(f".{name}.lock"), f"is fetching {name}"):
        if path.exists():
            fault = _fault(name, resource, path)
            print(f"{path} {fault}: downloading it again" if fault else f"{path} is there already", flush=True)
            if fault is None:
                return path
        for stale in FOLDER.glob(f".{name}.*.tmp"):  # left by a killed process
            stale.unlink()
        with atomic(path) as part:
            _download(name, resource, part)
            if fault := _fault(name, resource, part):
                problem = f"{masked(resource.url)} gave a file that {fault}: it was removed. Do not use that source;"
                raise _error(name, resource, problem)
    return path


def open_resource(name: str) -> Path:
    """Check the digest of a resource and return its path. Downloads nothing.

    Without a published digest, that of a file placed by hand is recorded like a first download's. Raises UserError,
    saying how to get the file, if it is missing or has another digest.
    """
    resource, path = find(name), resource_path(name)
    if fault := _fault(name, resource, path) if path.is_file() else "is missing":
        command = f"run `python -m consistency fetch {name}` where there is a network"
        raise _error(name, resource, f"{path} {fault}: {command}, or get {masked(resource.url)} elsewhere and")
    return path


def fetch_all(names: list[str]) -> None:
    """Download those resources, if the registry has them all; without a name, print the state of every resource."""
    for name in names:
        find(name)
    for name in names:
        fetch(name)
    if names:
        return
    known = registry()
    for name in known:
        print(f"{name:{max(map(len, known))}}  {state_of(name)}")


def state_of(name: str) -> str:
    """Return 'missing', 'there...' or 'damaged: ...' for a file of the registry, recording nothing."""
    resource, path = find(name), resource_path(name)
    if not path.is_file():
        return "missing"
    if fault := _fault(name, resource, path, record=False):
        return f"damaged: {fault}"
    return "there" if _known(name, resource) else "there; its digest is recorded at its first use"


def _download(name: str, resource: Resource, part: Path) -> None:
    """Download the file in a few attempts. Raises UserError if the last one fails or another would fail too."""
    from pooch import HTTPDownloader
    from requests import RequestException

    # The digest is that of the file without a transfer encoding.
    options = {"timeout": _TIMEOUT, "headers": {"Accept-Encoding": "identity"}}
    for pause in (*_PAUSES, None):
        try:
            with Progress(f"download {name}", resource.size or 0, unit="B", unit_scale=True) as progress:
                return HTTPDownloader(progress, _CHUNK, **options)(resource.url, str(part), None)
        except (RequestException, ValueError) as error:  # ValueError: an invalid address or header
            reason, passing = _reason(error)
            reason = without_secrets(reason, resource.url, *getproxies().values())
        if pause is None or not passing:
            problem = f"cannot download {masked(resource.url)} ({reason}). Run the same command again, or"
            raise _error(name, resource, problem)
        print(f"download {name}: {reason}; trying again in {pause:g} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def _reason(error: Exception) -> tuple[str, bool]:
    """Return the reason in one line, and True if another attempt may succeed."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} {response.reason}", response.status_code in _PASSING
    cause = error.args[0] if error.args else error
    # urllib3's error has a reason if there was no connection: no network, or no such server.
    reason = getattr(cause, "reason", None)
    return " ".join(str(reason or cause).split()), reason is None and not isinstance(error, ValueError)


def _error(name: str, resource: Resource, problem: str) -> UserError:
    """Build the error for a missing or wrong file."""
    known = _known(name, resource)
    digest = f"sha256 {known}" if known else f"no sha256 is published; that of the first file goes to {RECORDED}"
    return UserError(f"{problem} put the file ({digest}) at {resource_path(name)} by hand")


# --- digests


def _known(name: str, resource: Resource) -> str | None:
    """Return the digest that the file must have, published or recorded."""
    return resource.sha256 or recorded().get(name)


def known_sha256(name: str) -> str:
    """Return the sha256 that a resource was checked against, or its own if there is none."""
    return _known(name, find(name)) or sha256(resource_path(name))


def _fault(name: str, resource: Resource, path: Path, record: bool = True) -> str | None:
    """Return a file's fault, or None. record: record the digest of a good file without a known one."""
    with path.open("rb") as file:
        start = file.read(100).lstrip().lower()
    if not start or start.startswith((b"<!doctype html", b"<html")):
        return "is empty or a web page (does the network ask for a login?)"
    size, found, known = path.stat().st_size, sha256(path), _known(name, resource)
    if resource.size not in (None, size):
        return f"has {size} bytes, not {resource.size}"
    if known and found != known:
        return f"has sha256 {found}, not {known}"
    if record and known is None:
        _record(name, found)
    return None


def recorded() -> dict[str, str]:
    """Read the recorded digests by file name. Raises UserError if config/resources.lock is damaged."""
    text = RECORDED.read_text(encoding="utf-8", errors="replace") if RECORDED.exists() else ""
    digests: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = re.fullmatch(r"([0-9a-f]{64})  (\S+)|#.*|\s*", line)
        if entry is None or entry[2] in digests:
            raise UserError(f"{RECORDED}, line {number}: not one `<sha256>  <file name>` per file; fix or remove it")
        if entry[2]:
            digests[entry[2]] = entry[1]
    return digests


def _record(name: str, digest: str | None) -> None:
    """Record a first digest; None removes it."""
    with held(FOLDER / ".recorded.lock", f"is writing {RECORDED}"):
        digests = recorded()
        if digest:
            digests.setdefault(name, digest)
        else:
            digests.pop(name, None)
        lines = [f"{digests[known]}  {known}\n" for known in sorted(digests)]
        write_bytes(RECORDED, (_HEADER + "".join(lines)).encode())
    done = f"recorded sha256 {digest} of {name}, the first one seen; commit that file"
    print(f"{RECORDED}: {done if digest else f'removed the sha256 of {name}'}", flush=True)


def forget(name: str) -> None:
    """Remove the recorded digest of a wrong file, so that the right one is not refused."""
    if name in recorded():
        _record(name, None)
