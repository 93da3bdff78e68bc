"""Whether what lies in a study's folder, its cards and their parents agree: what `verify` says.

Only regular files inside the folder (or archive) are read. What a card names is looked up among them.
"""

import hashlib
import json
import os
import stat
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import IO, Any, Literal, Protocol, get_args
from zipfile import BadZipFile

from consistency.cards import STAGES, Card, OutsideError, is_card, label_of, parse_card, place_of
from consistency.errors import UserError
from consistency.progress import Progress
from consistency.provenance import CHECKPOINT, content_sha256, first_difference
from consistency.study import Study, settings_key

#: where `unpack` puts what came with an archive beside the results
ARCHIVE = "archive"
# Receipts of uploads, what DVC compares, and what Snakemake and DVC leave in folders: nothing in them is a result.
_RECEIPTS, _NOTES = ("track/", "plan/", "inputs/"), (".snakemake_timestamp", ".gitignore")
_TEXT = 16 << 20  # bytes of a card, a list of digests or a header of weights, at most
_CHUNK = 1 << 20
_QUICK = 256 << 20  # bytes that are read before anybody asks how long it takes
_UNREADABLE = (OSError, BadZipFile, ValueError, RecursionError)

#: from the worst on
State = Literal["refused", "damaged", "tampered", "missing", "no card", "stale", "consistent"]
_STATES: tuple[str, ...] = get_args(State)


@dataclass(frozen=True)
class Hashed:
    """A file's digest, or why there is none."""

    sha256: str
    fault: str = ""


@dataclass
class Finding:
    """What is said of an artifact: each thing that is not as it should be. left_out: files that were never packed."""

    artifact: str
    faults: list[tuple[State, str]] = field(default_factory=list)
    left_out: int = 0

    @property
    def state(self) -> State:
        """The worst fault's."""
        return min((state for state, _ in self.faults), key=_STATES.index, default="consistent")

    def add(self, state: State, note: str) -> None:
        """One more fault."""
        self.faults.append((state, note))

    def compare(self, name: str, found: Hashed, digest: str, witness: str) -> bool:
        """Whether a file has the digest that the witness says; the fault is added."""
        if found.fault:
            self.add("damaged", f"{name} {found.fault}")
        elif found.sha256 != digest:
            self.add("tampered", f"{name} has sha256 {found.sha256[:16]}..., {witness} says {digest[:16]}...")
        return not found.fault and found.sha256 == digest


# --- what is verified: a folder, or the members of an archive


class Tree(Protocol):
    """Regular files by their POSIX paths, with their sizes in bytes, and what is refused, with the reason."""

    name: str
    sizes: dict[str, int]
    refused: dict[str, str]

    def open(self, name: str) -> IO[bytes]:
        """A file for reading. Raises OSError."""


class Folder:
    """A folder's files. Links, and what is neither file nor folder, are refused. Raises UserError when it cannot be
    read."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name
        self.sizes: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        try:
            self._walk(path, "")
        except OSError as error:
            raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None

    def _walk(self, folder: Path, prefix: str) -> None:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                if entry.is_symlink():
                    self.refused[name] = f"is a link to {os.readlink(entry.path)!r}: put the file itself there"
                elif entry.is_dir():
                    self._walk(folder / entry.name, f"{name}/")
                elif stat.S_ISREG(entry.stat().st_mode):
                    self.sizes[name] = entry.stat().st_size
                else:
                    self.refused[name] = "is neither a file nor a folder"

    def open(self, name: str) -> IO[bytes]:
        """A file for reading. Raises OSError, for a link too."""
        return open(self.path / name, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW))


def read_text(tree: Tree, name: str) -> str:
    """A small text. Raises ValueError when it is large or no text, OSError or BadZipFile when it cannot be read."""
    if tree.sizes[name] > _TEXT:
        raise ValueError(f"{tree.sizes[name]:,} bytes are too many")
    with tree.open(name) as file:
        return file.read(_TEXT).decode()


def hash_files(tree: Tree, names: Iterable[str]) -> dict[str, Hashed]:
    """The digests of files of the tree, several at once; where it takes long, with progress in MiB."""
    chosen = sorted(names)
    size = sum(tree.sizes[name] for name in chosen)
    progress, lock = Progress(f"verify {tree.name}, MiB", size >> 20, shown=size > _QUICK), Lock()

    def one(name: str) -> Hashed:
        digest, done = hashlib.sha256(), 0
        try:
            with tree.open(name) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    with lock:
                        progress.advance((done + len(chunk) >> 20) - (done >> 20))
                    done += len(chunk)
        except (OSError, BadZipFile, EOFError) as error:
            return Hashed("", f"cannot be read ({getattr(error, 'strerror', None) or error})")
        return Hashed(digest.hexdigest())

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(chosen, pool.map(one, chosen), strict=True))
    progress.close()
    return found


# --- the judgement


def verify_tree(
    tree: Tree,
    study: Study | None = None,
    packed: Container[str] | None = None,
    hashed: Mapping[str, Hashed] | None = None,
) -> list[Finding]:
    """A finding for each artifact, in the workflow's order, then one for each thing that is nobody's.

    study: what the settings must be; without, they need only agree with one another. packed: what an archive
    holds; what cards name beside that may be absent. hashed: digests that need not be taken again.
    Raises UserError where there is no card at all.
    """
    cards, findings = read_cards(tree)
    if not cards and all(finding.state == "tampered" for finding in findings):  # none of them where it belongs
        raise UserError(f"{tree.name} holds no card of any stage: give a study's folder, such as results/digits")
    named = {name for card in cards for name in (*card.outputs, *card.inputs)} & tree.sizes.keys()
    judge = _Judge(tree, cards, hash_files(tree, named) if hashed is None else hashed, study, packed)
    found = {card.label: judge.artifact(card) for card in cards}
    judge.spread_staleness(found)
    findings += [*found.values(), *judge.absent(found)]
    return [*sorted(findings, key=lambda finding: _order(finding.artifact)), *judge.strays()]


def _order(artifact: str) -> int:
    stage = {"calibration": "scores"}.get(artifact, artifact.split()[0])
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def read_cards(tree: Tree) -> tuple[list[Card], list[Finding]]:
    """The cards in the workflow's order, and what is said of those that cannot be used."""
    cards, findings = [], []
    for name in tree.sizes:
        if not is_card(name) or name.startswith(f"{ARCHIVE}/"):
            continue
        try:
            card = parse_card(read_text(tree, name))
        except _UNREADABLE as error:
            state: State = "refused" if isinstance(error, OutsideError) else "damaged"
            findings.append(Finding(name, [(state, " ".join(str(error).split()) or "nested too deep")]))
            continue
        if card.place == name:
            cards.append(card)
        else:
            findings.append(Finding(name, [("tampered", f"is the card of {card.label}, which does not belong here")]))
    return sorted(cards, key=lambda card: (STAGES.index(card.stage), card.run or "", card.seed or 0)), findings


class _Judge:
    """All that the judgement of an artifact rests on."""

    def __init__(
        self,
        tree: Tree,
        cards: list[Card],
        hashed: Mapping[str, Hashed],
        study: Study | None,
        packed: Container[str] | None,
    ) -> None:
        self.tree, self.cards, self.hashed, self.study, self.packed = tree, cards, hashed, study, packed
        self.makers = {name: card for card in cards for name in card.outputs}

    def artifact(self, card: Card) -> Finding:
        """Everything about one card, but the staleness of its parents."""
        finding = Finding(card.label)
        try:
            self._own_words(card, finding)
            for parent in self._parents(card):
                self._parent(card, parent, finding)
        except RecursionError:
            finding.add("damaged", "its card's settings are nested too deep")
        for name, digest in card.outputs.items():
            self._output(card, name, digest, finding)
        for name, digest in card.inputs.items():
            self._input(name, digest, finding)
        if self.study is not None:
            self._against(self.study, card, finding)
        return finding

    def _own_words(self, card: Card, finding: Finding) -> None:
        """What a card says twice."""
        if card.key != settings_key(card.stage, card.seed, card.settings):
            finding.add("tampered", "the card's key is not that of the settings in it")
        if card.resolved is not None and card.resolved_sha256 != content_sha256(card.resolved):
            finding.add("tampered", "the card's resolved_sha256 is not that of the study in it")

    def _parents(self, card: Card) -> list[Card]:
        """The cards of what it was made from."""
        makers = {self.makers[name].label: self.makers[name] for name in card.inputs if name in self.makers}
        return list(makers.values())

    def _parent(self, card: Card, parent: Card, finding: Finding) -> None:
        """Settings that an artifact shares with what it was made from."""
        difference = first_difference(_settings(parent, card), _settings(card, parent), shared=True)
        if parent.study != card.study:
            finding.add("stale", f"is study {card.study!r}'s, and made from {parent.label} of study {parent.study!r}")
        elif difference:
            finding.add("stale", f"made with other settings than {parent.label}{difference}: run its stage again")

    def _output(self, card: Card, name: str, digest: str, finding: Finding) -> None:
        """A file that the card says was made."""
        found = self.hashed.get(name)
        if name in self.tree.refused:
            finding.add("refused", f"{name} {self.tree.refused[name]}")
        elif found is None and self.packed is not None and name not in self.packed:
            finding.left_out += 1
        elif found is None:
            finding.add("missing", f"{name} is not here: pull it, or run its stage again")
        elif finding.compare(name, found, digest, "its card"):
            for contradiction in _contradictions(self.tree, name, card):
                finding.add("tampered", f"{name} {contradiction}")

    def _input(self, name: str, digest: str, finding: Finding) -> None:
        """A file that it was made from: as its own card says it is now, or as it is where it has none."""
        maker, found = self.makers.get(name), self.hashed.get(name)
        now = maker.outputs[name] if maker else found.sha256 if found else digest
        if now != digest:
            finding.add("stale", f"was made from another {name} than there is now: run its stage again")

    def _against(self, study: Study, card: Card, finding: Finding) -> None:
        """What the study file asks for now."""
        if card.run is not None and (card.run not in study.students or card.seed not in study.seeds):
            finding.add("stale", f"the study file has no student {card.run!r} with seed {card.seed}")
        elif card.study != study.name:
            finding.add("stale", f"is study {card.study!r}'s, the study file's is {study.name!r}")
        elif card.key != study.key(card.stage, card.run, card.seed):
            difference = first_difference(card.settings, study.settings(card.stage, card.run))
            finding.add("stale", f"made with other settings than the study file's{difference}: run its stage again")

    def spread_staleness(self, found: dict[str, Finding]) -> None:
        """What is made from something stale is stale too."""
        # Parents stand before their children, but for students that were made from a student: hence several rounds.
        again = True
        while again:
            again = False
            for card in self.cards:
                faults = found[card.label].faults
                for parent in self._parents(card):
                    fault: tuple[State, str] = ("stale", f"was made from {parent.label}, which is stale")
                    stale = any(state == "stale" for state, _ in found[parent.label].faults)
                    if stale and parent is not card and fault not in faults:
                        faults.append(fault)
                        again = True

    def absent(self, found: Mapping[str, Finding]) -> list[Finding]:
        """Artifacts whose card is not here, and files that others were made from and nobody knows."""
        missing = {label: place for label, place in self._wanted().items() if label not in found}
        findings = [
            Finding(label, [("missing", f"{place} is not here: pull it, or run its stage")])
            for label, place in missing.items()
            if place not in self.tree.sizes
        ]
        folders = [PurePosixPath(place).parent for place in missing.values()]
        for name, user in {name: card.label for card in self.cards for name in card.inputs}.items():
            known = name in self.makers or name in self.tree.sizes or name.startswith("resources/")
            if not known and not any(PurePosixPath(name).is_relative_to(folder) for folder in folders):
                findings.append(Finding(name, [("missing", f"is not here, and {user} was made from it")]))
        return findings

    def _wanted(self) -> dict[str, str]:
        """The cards that a whole study has, by what they are of: this study's, or the one of the newest card."""
        newest = max(self.cards, key=lambda card: card.created, default=None)
        study = self.study or (newest and newest.study_then())
        if not study:
            return {}
        alone = ["dataset", "teacher", "extractor", *(["coefficients"] if study.needs_coefficients else [])]
        alone += [*(["flows"] if study.flows else []), "report"]
        students = [(run, seed) for run in study.students for seed in study.seeds]
        wanted: list[tuple[str, str | None, int | None]] = [(stage, None, None) for stage in alone]
        for stage in ("student", "samples", "scores"):
            wanted += [(stage, None, None)] if stage != "student" else []
            wanted += [(stage, run, seed) for run, seed in students]
        return {label_of(*what): place_of(*what) for what in wanted}

    def strays(self) -> list[Finding]:
        """Files that no card names, a finding a folder, and links."""
        by_folder: dict[str, list[str]] = {}
        for name in sorted(self.tree.sizes.keys() - self.makers.keys()):
            path = PurePosixPath(name)
            if not (is_card(name) or name.startswith((f"{ARCHIVE}/", *_RECEIPTS)) or path.name in _NOTES):
                by_folder.setdefault(str(path.parent), []).append(path.name)
        findings = []
        for folder, names in by_folder.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            said = f"{', '.join(names[:3])}{more}: no card names it; remove it, or run its stage again"
            findings.append(Finding(f"{folder}/", [("no card", said)]))
        unnamed = sorted(self.tree.refused.keys() - self.makers.keys())
        return findings + [Finding(name, [("refused", self.tree.refused[name])]) for name in unnamed]


def _settings(card: Card, other: Card) -> dict[str, Any]:
    """A card's settings as another's may be compared with them: a report's hold every student's, not yet resolved, and
    a student's those of the one that it was made from."""
    settings = card.settings
    if card.stage == other.stage == "student" and card.run != other.run and "predictor" in settings:
        predictor = _mapping(settings["predictor"])
        if _mapping(_mapping(settings.get("student")).get("predictor")).get("run") == other.run:
            return predictor
    if card.stage != "report":
        return settings
    own = _mapping(_mapping(settings.get("students")).get(other.run or ""))
    return settings | {"student": {**_mapping(settings.get("student")), **own}}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _contradictions(tree: Tree, name: str, card: Card) -> list[str]:
    """What a file says of itself otherwise than its card: the metadata of weights, the digest in dataset.json."""
    try:
        if name.endswith(".safetensors"):
            return _in_weights(_weights_metadata(tree, name), card)
        if name == "dataset/dataset.json":
            said = _mapping(json.loads(read_text(tree, name))).get("sha256")
            return ["holds another digest of images.npy"] if said != card.outputs.get("dataset/images.npy") else []
    except _UNREADABLE as error:
        return [f"cannot be read: {' '.join(str(error).split())[:200]}"]
    return []


def _weights_metadata(tree: Tree, name: str) -> dict[str, Any]:
    """The metadata of a safetensors file of ours, {} of another's. Raises ValueError when it is none."""
    with tree.open(name) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(_TEXT, tree.sizes[name]):
            raise ValueError("it is not a safetensors file")
        texts = _mapping(_mapping(json.loads(file.read(size))).get("__metadata__"))
    metadata = {key: json.loads(text) for key, text in texts.items()} if "format" in texts else {}
    return metadata if metadata.get("format") == CHECKPOINT else {}


def _in_weights(metadata: dict[str, Any], card: Card) -> list[str]:
    """Where the metadata of a checkpoint and its card differ."""
    said = card.model_dump(include={"key", "study", "stage", "run", "seed"})
    found = [
        f"says {key} {metadata[key]!r}, its card {said[key]!r}"
        for key in said
        if key in metadata and metadata[key] != said[key]
    ]
    inputs = {PurePosixPath(name).name: digest for name, digest in card.inputs.items()}
    parents = _mapping(metadata.get("parents"))
    return found + [f"names another parent {key} than its card" for key in parents if inputs.get(key) != parents[key]]


def print_findings(findings: list[Finding]) -> None:
    """A line an artifact, and one for each further fault."""
    width = max(len(_shown(finding.artifact)) for finding in findings)
    for finding in findings:
        left_out = [f"(not in the archive: {finding.left_out})"] if finding.left_out else []
        first, *more = [*(_shown(note) for _, note in finding.faults), *left_out] or [""]
        print(f"{_shown(finding.artifact):{width}}  {finding.state:10}  {first}".rstrip())
        for note in more:
            print(f"{'':{width}}  {'':10}  {note}")


def _shown(text: str) -> str:
    """A text that moves no cursor, whatever a file is called."""
    return text if text.isprintable() else repr(text)[1:-1]


def require_consistent(name: str, findings: list[Finding]) -> None:
    """Raises UserError, counting the faults, unless every artifact is consistent."""
    bad = [finding.state for finding in findings if finding.faults]
    if bad:
        counts = ", ".join(f"{bad.count(state)} {state}" for state in _STATES if state in bad)
        raise UserError(f"{name}: {counts} of {len(findings)}; the table says what and why")
