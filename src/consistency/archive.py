"""One checksummed file of a finished study: packed here, verified and opened again elsewhere.

An archive is a zip whose members are not compressed: the same results give the same bytes with any zlib, and nothing
in it grows when it is read.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from consistency.cards import Card, OutsideError, require_inside
from consistency.crate import crate_metadata
from consistency.errors import UserError
from consistency.files import atomic, sha256, write_bytes
from consistency.layout import Layout
from consistency.progress import Progress
from consistency.resources import registry
from consistency.study import OfficialTeacher, Study, load_study
from consistency.verification import (
    ARCHIVE,
    Finding,
    Folder,
    Hashed,
    Tree,
    hash_files,
    print_findings,
    read_cards,
    read_text,
    require_consistent,
    verify_tree,
)

MANIFEST, METADATA, README = "manifest.sha256", "ro-crate-metadata.json", "README.md"
# From the project's root: terms, environment, workflow and code, so that an unzipped archive is a checkout.
_FILES = (
    *("CITATION.cff", "LICENSE", "NOTICE", "Makefile", "Snakefile", "pyproject.toml"),
    *("environment.yml", "requirements.in", "requirements.lock", "config/config.yaml", "config/resources.yaml"),
)
_FILES_IF_THERE = ("config/resources.lock", "dvc.yaml", "dvc.lock")
_FOLDERS = ("src/consistency", "workflow", "profiles")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file of an archive: its name there, its digest and size, and where its bytes are."""

    name: str
    sha256: str
    size: int
    source: Path | bytes

    @classmethod
    def of(cls, name: str, source: Path | bytes, digest: str | None = None) -> "Member":
        """A member from a file, whose digest may be known, or from its content."""
        if isinstance(source, bytes):
            return cls(name, hashlib.sha256(source).hexdigest(), len(source), source)
        return cls(name, digest or sha256(source), source.stat().st_size, source)

    def open(self) -> IO[bytes]:
        """Its bytes for reading."""
        return BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")


# --- packing


class _Packed(Container[str]):
    """What an archive holds of a study's files: all but arrays of images and features, snapshots only if wanted."""

    def __init__(self, snapshots: bool) -> None:
        self.snapshots = snapshots

    def __contains__(self, name: object) -> bool:
        return not str(name).endswith(".npy") and (self.snapshots or "/snapshots/" not in str(name))


def make_archive(study: Study, layout: Layout, study_file: Path, folder: Path, snapshots: bool = False) -> Path:
    """Write folder/<study>-<key>.zip, with its sha256 beside it, and return its path; the same results give the same
    bytes.

    Raises UserError when results are missing, stale or tampered with, when this is not the project's root, and when
    the archive cannot be written.
    """
    if not layout.root.is_dir():
        raise UserError(f"{layout.root} is not there: run `snakemake --config studies={study.name}` first")
    tree, packed = Folder(layout.root), _Packed(snapshots)
    _require_packable(layout.root, verify_tree(tree, study, packed))
    cards = read_cards(tree)[0]
    members = [*_of_results(study, layout, cards, packed), *_of_project(study, study_file)]
    path = folder / f"{study.name}-{study.key('report')[:8]}.zip"
    members.append(Member.of(README, _readme(study, cards, members, path.name, snapshots).encode()))
    members.append(Member.of(METADATA, crate_metadata(study, cards, members, terms(study))))
    members.sort(key=lambda member: member.name)
    lines = "".join(f"{member.sha256}  {member.name}\n" for member in members)
    _write(path, [Member.of(MANIFEST, lines.encode()), *members])
    digest = sha256(path)
    write_bytes(_digest_file(path), f"{digest}  {path.name}\n".encode())
    size = sum(member.size for member in members)
    print(f"{path}: {len(members) + 1} files, {size / 2**20:.1f} MiB, sha256 {digest}")
    return path


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _require_packable(root: Path, findings: list[Finding]) -> None:
    """Raises UserError where anything that would be packed is not as it should be."""
    for finding in findings:
        if finding.state == "no card":
            print(f"left out: {finding.artifact} {finding.faults[0][1]}")
    wrong = [finding for finding in findings if finding.state not in ("consistent", "no card")]
    if wrong:
        print_findings(wrong)
    require_consistent(f"{root} is not packed", wrong)


def _of_results(study: Study, layout: Layout, cards: list[Card], packed: Container[str]) -> list[Member]:
    members = []
    for card in cards:
        known = {card.place: None, **{name: card.outputs[name] for name in card.outputs if name in packed}}
        for name, digest in known.items():
            members.append(Member.of(f"results/{study.name}/{name}", layout.root / name, digest))
    return members


def _of_project(study: Study, study_file: Path) -> list[Member]:
    """What lies in the project's root, where every command runs."""
    root, paths = Path(), []
    for name in _FILES:
        if not (root / name).is_file():
            raise UserError(f"{name} is not here: run `python -m consistency archive` in the project's root")
        paths.append(root / name)
    paths += [root / name for name in _FILES_IF_THERE if (root / name).is_file()]
    for name in _FOLDERS:
        found = sorted(path for path in (root / name).rglob("*") if path.is_file() and not path.is_symlink())
        paths += [path for path in found if path.suffix != ".pyc" and not path.name.startswith(".")]
    members = [Member.of(path.as_posix(), path) for path in paths]
    return [*members, Member.of(f"config/studies/{study.name}.yaml", study_file)]


def _readme(study: Study, cards: list[Card], members: list[Member], name: str, snapshots: bool) -> str:
    import jinja2

    held = {member.name for member in members}
    made = [output for card in cards for output in card.outputs]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = files("consistency").joinpath("templates/archive.md.j2").read_text()
    return environment.from_string(template).render(
        study=study,
        commits=sorted({_commit(card) for card in cards}),
        first=min(card.created for card in cards),
        last=max(card.created for card in cards),
        manifest=MANIFEST,
        name=name,
        run=next(iter(study.students)),
        seed=study.seeds[0],
        left_out=[output for output in made if f"results/{study.name}/{output}" not in held],
        snapshots=snapshots,
        terms=terms(study),
    )


def _commit(card: Card) -> str:
    return f"{card.git.get('commit') or 'unknown'}{' (with changes)' if card.git.get('dirty') else ''}"


def terms(study: Study) -> tuple[str, str] | None:
    """The official checkpoint that the networks come from, and its licence; None for a teacher of one's own."""
    if not isinstance(study.teacher, OfficialTeacher):
        return None
    known = registry().get(study.teacher.checkpoint)
    return study.teacher.checkpoint, known.licence if known else "its owner's terms"


def _write(path: Path, members: list[Member]) -> None:
    """Write the zip. Raises UserError when there is no room, and when a file is not what its digest says any more."""
    size = sum(member.size for member in members)
    progress, done = Progress(f"archive {path.name}, MiB", size >> 20, shown=size > 1 << 28), 0
    with atomic(path) as temporary, ZipFile(temporary, "w", ZIP_STORED) as archive:
        for member in members:
            digest = hashlib.sha256()
            with member.open() as source, archive.open(_entry(member), "w") as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
                    progress.advance((done + len(chunk) >> 20) - (done >> 20))
                    done += len(chunk)
            if digest.hexdigest() != member.sha256:
                raise UserError(f"{member.name} changed while it was packed: wait for what writes it, and pack again")
    progress.close()


def _entry(member: Member) -> ZipInfo:
    """A zip's entry that says nothing of when and by whom it was packed."""
    info = ZipInfo(member.name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr, info.file_size = 3, (stat.S_IFREG | 0o644) << 16, member.size
    return info


# --- reading


class Members:
    """The files of an archive, read from it. Raises UserError for what is none, or holds what none of ours does."""

    def __init__(self, path: Path, archive: ZipFile) -> None:
        self.name, self.archive = path.name, archive
        self.refused: dict[str, str] = {}
        infos = archive.infolist()
        self.sizes = {info.filename: info.file_size for info in infos}
        for info in infos:
            _require_plain(path, info)
        folders = {str(parent) for name in self.sizes for parent in PurePosixPath(name).parents}
        if len(self.sizes) < len(infos) or folders & self.sizes.keys():
            raise UserError(f"{path} is refused: it has two members of one name")
        if sum(self.sizes.values()) > path.stat().st_size:
            raise UserError(f"{path} is refused: its members would be larger than it is")

    def open(self, name: str) -> IO[bytes]:
        """A member for reading. Raises BadZipFile where its bytes are not those that were written."""
        return self.archive.open(name)


def _require_plain(path: Path, info: ZipInfo) -> None:
    """Raises UserError for a member that leads elsewhere, is no plain file, or is not stored as it is."""
    mode = info.external_attr >> 16
    try:
        require_inside(info.orig_filename)
    except OutsideError as error:
        raise UserError(f"{path} is refused: {error}") from None
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG) or info.is_dir():
        raise UserError(f"{path} is refused: its member {info.filename!r} is not a plain file")
    if info.compress_type != ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise UserError(
            f"{path} is refused: its member {info.filename!r} is compressed or encrypted, which archives of this "
            "project are not"
        )


@contextmanager
def open_archive(path: Path) -> Iterator[Members]:
    """The members of an archive. Raises UserError for a file that is none."""
    try:
        # Given an open file, ZipFile lets several threads read members at once.
        with path.open("rb") as file, ZipFile(file) as archive:
            yield Members(path, archive)
    except FileNotFoundError:
        raise UserError(f"{path} is not there: give an archive, or a study's folder such as results/digits") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (BadZipFile, NotImplementedError) as error:
        raise UserError(f"{path} is not a whole archive ({error}): fetch it again") from None


@dataclass(frozen=True)
class Manifest:
    """What an archive says it holds: the study and every file's digest."""

    study: str
    digests: dict[str, str]

    @property
    def prefix(self) -> str:
        """Where the study's files are in the archive."""
        return f"results/{self.study}/"

    @property
    def results(self) -> dict[str, str]:
        """The digests of the study's files, by their paths from its folder on."""
        length = len(self.prefix)
        return {name[length:]: self.digests[name] for name in self.digests if name.startswith(self.prefix)}


def read_manifest(tree: Tree, name: str = MANIFEST) -> Manifest:
    """The manifest in a tree. Raises UserError when there is none, or it is not one of ours."""
    try:
        lines = read_text(tree, name).splitlines()
        digests = {}
        for line in lines:
            entry = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
            if entry is None or entry[2] in digests:
                raise ValueError(f"not one `<sha256>  <name>` a file: {line[:80]!r}")
            require_inside(entry[2])
            digests[entry[2]] = entry[1]
    except KeyError:
        raise UserError(f"{tree.name} is not an archive of a study: it has no {name}") from None
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"{tree.name}: its {name} is damaged ({error})") from None
    studies = {place.split("/")[1] for place in digests if re.fullmatch(r"results/[a-z0-9][a-z0-9._-]*/.+", place)}
    if len(studies) != 1:
        raise UserError(f"{tree.name}: its {name} names the results of {len(studies)} studies, not of one")
    return Manifest(studies.pop(), digests)


class _Part:
    """Some files of a tree under other names."""

    def __init__(self, tree: Tree, names: dict[str, str]) -> None:
        """names: those in the tree by the new ones."""
        self.name, self.tree, self.names = tree.name, tree, names
        self.sizes = {new: tree.sizes[old] for new, old in names.items() if old in tree.sizes}
        self.refused = {new: tree.refused[old] for new, old in names.items() if old in tree.refused}

    def open(self, name: str) -> IO[bytes]:
        """A file for reading. Raises OSError or BadZipFile."""
        return self.tree.open(self.names[name])


def verify(path: Path, study: Study | None = None) -> list[Finding]:
    """A finding for each artifact of a study's folder, of an archive, or of the folder an archive was unzipped into.

    Raises UserError for what is none of these, and for an archive with hostile members.
    """
    if not path.is_dir():
        with open_archive(path) as members:
            return _verify_archive(path, members, study)
    tree = Folder(path)
    if MANIFEST in tree.sizes:
        manifest = read_manifest(tree)
        return [_the_rest(manifest, tree), *_verify_results(manifest, tree, study)]
    if f"{ARCHIVE}/{MANIFEST}" in tree.sizes:
        manifest = read_manifest(tree, f"{ARCHIVE}/{MANIFEST}")
        rest = _Part(tree, {name: f"{ARCHIVE}/{name}" for name in manifest.digests})
        return [_the_rest(manifest, rest), *verify_tree(tree, study, manifest.results)]
    return verify_tree(tree, study)


def _verify_archive(path: Path, members: Members, study: Study | None) -> list[Finding]:
    """Every member against the manifest, and then the results among themselves."""
    manifest = read_manifest(members)
    hashed = hash_files(members, members.sizes)
    finding = _compared("archive", manifest.digests, hashed)
    for name in sorted(members.sizes.keys() - manifest.digests.keys() - {MANIFEST}):
        finding.add("tampered", f"{name} is not in its {MANIFEST}")
    beside = _digest_file(path)
    if beside.is_file() and beside.read_bytes()[:64].decode(errors="replace") != sha256(path):
        finding.add("tampered", f"has sha256 {sha256(path)[:16]}..., {beside} says otherwise")
    length = len(manifest.prefix)
    of_results = {name[length:]: hashed[name] for name in hashed if name.startswith(manifest.prefix)}
    return [finding, *_verify_results(manifest, members, study, of_results)]


def _verify_results(
    manifest: Manifest, tree: Tree, study: Study | None, hashed: dict[str, Hashed] | None = None
) -> list[Finding]:
    """The study's files in an archive, packed or unzipped."""
    names = {*tree.sizes, *tree.refused, *manifest.digests}
    part = _Part(tree, {name[len(manifest.prefix) :]: name for name in names if name.startswith(manifest.prefix)})
    return verify_tree(part, study, manifest.results, hashed)


def _the_rest(manifest: Manifest, tree: Tree) -> Finding:
    """What came with the results, against the manifest; the results may have been made anew since."""
    digests = {name: manifest.digests[name] for name in manifest.digests if not name.startswith("results/")}
    return _compared("archive", digests, hash_files(tree, digests.keys() & tree.sizes.keys()))


def _compared(artifact: str, digests: dict[str, str], hashed: dict[str, Hashed]) -> Finding:
    finding = Finding(artifact)
    for name, digest in digests.items():
        found = hashed.get(name)
        if found is None:
            finding.add("missing", f"{name} is not here")
        else:
            finding.compare(name, found, digest, MANIFEST)
    return finding


# --- unpacking


def unpack(path: Path, results: Path) -> Path:
    """Put an archive's results where the workflow expects them, results/<study>, and all else into its folder
    archive/. Returns the study's folder.

    Raises UserError when the archive is not consistent, when there are results already, and when there is no room.
    """
    with open_archive(path) as members:
        findings = _verify_archive(path, members, None)
        if any(finding.faults for finding in findings):
            print_findings(findings)
        require_consistent(f"{path} is not unpacked", findings)
        manifest = read_manifest(members)
        target = results / manifest.study
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{target} is there already: move it away, or choose another --results")
        part = results / f".{manifest.study}.{os.getpid()}.unpacking"
        try:
            for name in (*manifest.digests, MANIFEST):
                inside = name.removeprefix(manifest.prefix)
                _extract(members, name, part / (inside if inside != name else f"{ARCHIVE}/{name}"), manifest)
            part.rename(target)
        except OSError as error:
            raise UserError(
                f"cannot write {target}: {error.strerror or error}. Make room (or mend the permission), and run the "
                "same command again"
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def _extract(members: Members, name: str, path: Path, manifest: Manifest) -> None:
    """Write one member. Raises UserError if it is not what was verified a moment ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with members.open(name) as source, path.open("xb") as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != manifest.digests.get(name, digest.hexdigest()):
        raise UserError(f"{members.name} changed while it was unpacked: wait for what writes it, and unpack again")


def print_verified(path: Path, against: str | None) -> None:
    """Print the findings of `verify`; against: a study file. Raises UserError when anything is wrong."""
    findings = verify(path, load_study(against) if against else None)
    print_findings(findings)
    require_consistent(str(path), findings)


def print_unpacked(path: Path, results: Path) -> None:
    """Unpack an archive and say where its report is."""
    folder = unpack(path, results)
    print(f"{folder}: open {folder / 'report/report.html'}; `python -m consistency verify {folder}` checks it any time")
