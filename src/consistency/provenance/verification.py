"""Check of a study's results against their cards, one another and the study file."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from consistency.base.errors import UserError, one_line, user_error
from consistency.base.files import sha256
from consistency.config.explain import explain
from consistency.config.job import Job
from consistency.config.keys import settings_key
from consistency.config.paths import SHIPPED, StudyPaths
from consistency.config.reading import load_study
from consistency.config.study import Study
from consistency.provenance.card import first_difference
from consistency.provenance.graph import artifacts

#: the digests of an archive's files, beside its results/
SUMS = "SHA256SUMS"
# Receipts of uploads and DVC's plan are no results; no card names them.
_RECEIPTS = ("track", "plan")
_OF_A_SEED = re.compile(r"(?:students|samples|scores)/([^/]+)/seed(\d+)[./]")


class Finding(NamedTuple):
    """Faults of an artifact, none if it is consistent. said: its line without faults."""

    artifact: str
    faults: list[str]
    said: str = "consistent"


class CheckedCard(BaseModel):
    """The part of a card that is checked."""

    study: str
    key: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]


def verify(root: Path, study: Study) -> list[Finding]:
    """Check every artifact of the study in its folder of results. A file that no card names is a finding too. What was
    taken out of the study is not checked, and is counted.

    Raises UserError when root is no folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give a study's results, such as results/digits (unzip an archive)")
    files = hashes(root)
    expected = artifacts(Job(study, StudyPaths(root.name, root.parent)))
    places = {name: job.card(stage).relative_to(root) for name, (stage, job) in expected.items()}
    cards = {name: _read(root, place) for name, place in places.items()}
    made = {
        name: digest
        for card in cards.values()
        if isinstance(card, CheckedCard)
        for name, digest in card.outputs.items()
    }
    left_out = _left_out(root, made.keys() - files.keys())
    findings = []
    for name, card in cards.items():
        if isinstance(card, CheckedCard):
            faults = [*stale(card, *expected[name], made), *_damaged(card, files, left_out)]
            absent = len(left_out & card.outputs.keys())
            also = f" (left out of the archive: {absent} files)" if absent else ""
            findings.append(Finding(name, faults, f"consistent{also}"))
        else:
            findings.append(Finding(name, [card]))
    strays = sorted(files.keys() - made.keys() - {place.as_posix() for place in places.values()})
    former = {name: owner for name in strays if (owner := taken_out(name, study))}
    if former:
        owners = ", ".join(sorted(set(former.values())))
        findings.append(Finding("not in the study", [], f"not checked: {len(former)} files of {owners}"))
    strays = [name for name in strays if name not in former]
    return findings + [Finding(name, ["has no card: nothing in this study made it"]) for name in strays]


def taken_out(name: str, study: Study) -> str:
    """Return whose result a file is, if that is a student, seed or section that the study has no longer; else ''."""
    if found := _OF_A_SEED.match(name):
        return "" if (found[1], int(found[2])) in study.trainings else f"{found[1]} seed {found[2]}"
    folder = name.partition("/")[0]
    unneeded = {"coefficients": not study.needs_coefficients, "flows": not study.flows}
    return folder if unneeded.get(folder) else ""


def study_of(root: Path, study_file: Path | None) -> Study:
    """Read the study of a folder results/NAME or docs/results/NAME. The default file is the one in the same checkout or
    unzipped archive, then the one that the package ships. Raises UserError when there is none."""
    folder = root.resolve()
    places = [place / "config/studies" for place in folder.parents[1:3]] + [SHIPPED / "studies"]
    files = [place / f"{folder.name}.yaml" for place in places]
    path = study_file or next(filter(Path.is_file, files), None)
    if path is None:
        raise UserError(
            f"{root} has no study file {files[0]}: name it with --study, or give a folder like results/digits"
        )
    return load_study(path)


def require_consistent(root: Path, study: Study) -> None:
    """Print the findings of verify. Raises UserError unless everything is consistent."""
    require_none(root, verify(root, study))


def require_none(root: Path, findings: Sequence[Finding]) -> None:
    """Print findings. Raises UserError unless none has a fault."""
    width = max(len(finding.artifact) for finding in findings)
    for finding in findings:
        for said in finding.faults or [finding.said]:
            print(one_line(f"{finding.artifact:{width}}  {said}"))
    wrong = sum(bool(finding.faults) for finding in findings)
    if wrong:
        raise UserError(f"{root}: {wrong} of {len(findings)} are not consistent; the reasons are above")


def result_files(root: Path) -> list[str]:
    """List the results and cards in a study's folder by relative path, without hidden files."""

    def fail(error: OSError) -> None:
        raise error

    found = sorted(Path(place, name) for place, _, names in os.walk(root, onerror=fail) for name in names)
    paths = [path.relative_to(root) for path in found if path.is_file()]
    return [path.as_posix() for path in paths if path.parts[0] not in _RECEIPTS and not path.name.startswith(".")]


def stays_out(name: str, snapshots: bool = False) -> bool:
    """Tell whether an archive leaves a result out: arrays of images and features always, snapshots by default."""
    return name.endswith(".npy") or ("/snapshots/" in name and not snapshots)


def hashes(root: Path) -> dict[str, str]:
    """Return the sha256 of each result and card, or the reason why it cannot be read."""

    def digest(name: str) -> str:
        try:
            return sha256(root / name)
        except OSError as error:
            return f"unreadable ({error.strerror})"

    names = result_files(root)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _read(root: Path, place: Path) -> CheckedCard | str:
    """Read a card, its outputs named relative to the study's folder like its inputs. Returns the fault of a bad one."""
    try:
        card = CheckedCard.model_validate_json((root / place).read_bytes())
    except OSError as error:
        return str(user_error(error, f"missing: {place} ({error.strerror}); pull it, or run its stage"))
    except ValidationError as error:
        return f"damaged: {place}: {explain(error, CheckedCard):.200}; run its stage again"
    outputs = {(place.parent / name).as_posix(): digest for name, digest in card.outputs.items()}
    return card.model_copy(update={"outputs": outputs})


def _left_out(root: Path, absent: set[str]) -> set[str]:
    """Find the absent files that the archive of these results never held, as its SHA256SUMS says."""
    folder = root.resolve()
    sums, prefix = folder.parent.parent / SUMS, f"results/{folder.name}/"
    held = {line[66:] for line in sums.read_text(encoding="utf-8").splitlines()} if sums.is_file() else set()
    archived = any(name.startswith(prefix) for name in held)
    return {name for name in absent if archived and stays_out(name) and prefix + name not in held}


def stale(card: CheckedCard, stage: str, job: Job, made: dict[str, str]) -> Iterator[str]:
    """Compare a card with the study file, and its inputs with the outputs of all cards. made: output -> digest."""
    settings = job.depends_on(stage)
    if card.study != job.study.name:
        yield f"stale: made for study {card.study!r}; run its stage again"
    if card.key != settings_key(stage, job.seed, settings) or card.settings != settings:
        yield f"stale: made with other settings{first_difference(card.settings, settings)}; run its stage again"
    for name, digest in card.inputs.items():  # a foreign file's digest was taken when it was read
        if not name.startswith(("resources/", "given/")) and made.get(name) != digest:
            yield f"stale: no card names the {name} that it was made from; run its stage again"


def _damaged(card: CheckedCard, files: dict[str, str], left_out: set[str]) -> Iterator[str]:
    """Compare the files of a card with its digests."""
    for name, digest in card.outputs.items():
        if name in files and files[name] != digest:
            yield f"tampered with: {name} is {files[name]:.32}, its card says {digest:.32}"
        elif name not in files and name not in left_out:
            yield f"missing: {name}; pull it, or run its stage again"
