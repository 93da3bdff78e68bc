"""What is downloaded: a registry of files with where they come from, and the digest each has before it is used.

Digests are checked at every use and not remembered: sha256 reads 1 GB/s, and no file here is larger than about that.
"""

import difflib
import hashlib
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from consistency.download import download
from consistency.errors import UserError
from consistency.files import sha256, write_bytes
from consistency.locks import held
from consistency.study import Section, explain, parse_yaml

# Relative to the project's root, where every command runs.
REGISTRY = Path("config/resources.yaml")
RECORDED = Path("config/resources.lock")
FOLDER = Path("resources")

Text = Annotated[str, Field(min_length=1)]

_HEADER = """\
# The sha256 of what was downloaded and whose own digest nobody publishes (config/resources.yaml): that of the first
# download, enforced ever after. Commit this file. A line goes away only by hand, when a file is known to have changed.
"""


class Resource(Section):
    """One file: where it comes from, on whose terms, and how it is known."""

    url: Annotated[str, Field(pattern=r"^https?://\S+$")]
    about: Text
    licence: Text
    digest_source: Text
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    sha256_prefix: Annotated[str, Field(pattern=r"^[0-9a-f]{8,63}$")] | None = None
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    size: Annotated[int, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.sha256 and self.sha256_prefix and not self.sha256.startswith(self.sha256_prefix):
            raise ValueError("sha256 does not begin with sha256_prefix")
        return self


def registry() -> dict[str, Resource]:
    """The resources by file name. Raises UserError with the file and the key when the registry is not valid."""
    try:
        content = parse_yaml(REGISTRY.read_text(), REGISTRY)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {REGISTRY}: {error}; commands run in the project's root") from None
    if not isinstance(content, dict):
        raise UserError(f"{REGISTRY} must hold a file name and its keys for each resource")
    return {name: _resource(name, entry) for name, entry in content.items()}


def _resource(name: object, entry: object) -> Resource:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{REGISTRY}: {name!r} is not a file name of letters, digits, '.', '_' and '-'")
    if not isinstance(entry, dict):
        raise UserError(f"{REGISTRY}: '{name}' must have keys and values, such as `url: https://...`")
    try:
        return Resource.model_validate(entry)
    except ValidationError as error:
        problem = explain(error, Resource, f"{name}.")
        raise UserError(f"{REGISTRY}: {problem if name in problem else f'{name}: {problem}'}") from None


def find(name: str) -> Resource:
    """The resource of that file name. Raises UserError with the nearest name when there is none."""
    known = registry()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"there is no resource {name!r} in {REGISTRY}; {hint}")
    return known[name]


def resource_path(name: str) -> Path:
    """Where a resource lies, whether it is there or not."""
    return FOLDER / name


def fetch(name: str) -> Path:
    """Download a resource unless it is there with the right digest. Another process that fetches it is waited for.

    Where no sha256 is published, that of the first file is recorded in config/resources.lock. Raises UserError when the
    file cannot be had or is not the right one.
    """
    resource, path = find(name), resource_path(name)
    with held(path.with_name(f".{name}.lock"), f"another process is fetching {name}: waiting for it"):
        if path.exists():
            fault = _admit(name, resource, path)
            if fault is None:
                print(f"{path} is there already", flush=True)
                return path
            print(f"{path} {fault}: fetching it again", flush=True)
        download(resource.url, path, lambda part: _admit(name, resource, part), _by_hand(name, resource))
    return path


def open_resource(name: str) -> Path:
    """The path of a resource whose digest was just checked; nothing is downloaded.

    A file put there by hand whose digest nobody publishes is recorded like a first download. Raises UserError that says
    how to get the file when it is missing or not the right one.
    """
    resource, path = find(name), resource_path(name)
    fault = _admit(name, resource, path) if path.is_file() else "is missing"
    if fault is not None:
        raise UserError(
            f"{path} {fault}: run `python -m consistency fetch {name}` where there is a network, "
            f"or get {resource.url} elsewhere and {_by_hand(name, resource)}"
        )
    return path


def fetch_all(names: list[str]) -> None:
    """Download those resources, each once all names are known; without a name, print which are there."""
    for name in names:
        find(name)
    for name in names:
        fetch(name)
    if not names:
        print_states()


def print_states() -> None:
    """Print of each resource whether it is there, missing or damaged."""
    resources = registry()
    width = max(map(len, resources), default=0)
    for name, resource in resources.items():
        print(f"{name:{width}}  {_state(name, resource)}")


def _state(name: str, resource: Resource) -> str:
    path = resource_path(name)
    if not path.is_file():
        return "missing"
    known = _known(name, resource)
    fault = _fault(resource, path, known)
    if fault is not None:
        return f"damaged: {fault}"
    return "there" if known else "there; its digest is recorded at its first use"


def _by_hand(name: str, resource: Resource) -> str:
    known = _known(name, resource)
    digest = f"sha256 {known}" if known else f"its sha256 is not published: the first one's goes to {RECORDED}"
    return f"put the file ({digest}) at {resource_path(name)} by hand"


# --- digests


def _known(name: str, resource: Resource) -> str | None:
    """The digest that the file must have, published or recorded."""
    return resource.sha256 or recorded().get(name)


def known_sha256(name: str) -> str:
    """The sha256 of a resource that was opened: the one it was checked against, or its own where there is none."""
    return _known(name, find(name)) or sha256(resource_path(name))


def _fault(resource: Resource, path: Path, known: str | None) -> str | None:
    """What speaks against a file, or None."""
    size = path.stat().st_size
    if resource.size is not None and size != resource.size:
        return f"has {size} bytes, not {resource.size}"
    found = sha256(path)
    if known and found != known:
        return f"has sha256 {found}, not {known}"
    if resource.sha256_prefix and not found.startswith(resource.sha256_prefix):
        return f"has sha256 {found}, which does not begin with {resource.sha256_prefix}"
    if resource.md5 and (md5 := _md5(path)) != resource.md5:
        return f"has md5 {md5}, not {resource.md5}"
    return None


def _admit(name: str, resource: Resource, path: Path) -> str | None:
    """What speaks against a file, or None; the first digest of a file that nobody publishes one for is recorded."""
    known = _known(name, resource)
    fault = _fault(resource, path, known)
    if fault is None and known is None:
        return _fault(resource, path, _record(name, sha256(path)))
    return fault


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def recorded() -> dict[str, str]:
    """The digests of first downloads, by file name. Raises UserError when the lock file is damaged."""
    try:
        lines = RECORDED.read_text().splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {RECORDED}: {error}") from None
    digests = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        entry = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if entry is None or entry[2] in digests:
            raise UserError(f"{RECORDED}, line {number}: not one `<sha256>  <file name>` a file; mend or remove it")
        digests[entry[2]] = entry[1]
    return digests


def _record(name: str, digest: str) -> str:
    """Record a first digest, unless another process was faster. Returns what stands in the file."""
    with held(FOLDER / ".recorded.lock", f"another process is writing {RECORDED}: waiting for it"):
        digests = recorded()
        if name not in digests:
            digests[name] = digest
            _write_recorded(digests)
            print(f"{RECORDED}: recorded sha256 {digest} of {name}, the first one seen; commit that file", flush=True)
        return digests[name]


def forget(name: str) -> None:
    """Take back the digest of a file that proved to be no such thing: the right file must not be refused for it."""
    with held(FOLDER / ".recorded.lock", f"another process is writing {RECORDED}: waiting for it"):
        digests = recorded()
        if digests.pop(name, None):
            _write_recorded(digests)
            print(f"{RECORDED}: took back the sha256 of {name}", flush=True)


def _write_recorded(digests: dict[str, str]) -> None:
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests)]
    write_bytes(RECORDED, (_HEADER + "".join(lines)).encode())
