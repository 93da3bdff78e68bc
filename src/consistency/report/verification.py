"""Check of published results, docs/results/NAME, from that folder and the study file alone."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from pandas.testing import assert_frame_equal

from consistency.base.arrays import read_table
from consistency.base.errors import command_of
from consistency.base.files import reading
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.provenance.graph import artifacts
from consistency.provenance.verification import (
    SUMS,
    CheckedCard,
    Finding,
    hashes,
    require_none,
    stale,
    study_of,
    verify,
)
from consistency.report.blocks import blocks_of, figures_named, filled
from consistency.report.published import CARDS, PAGE, Published, read_published, tables_of
from consistency.report.results import TEXT

_AGAIN = f"run {command_of('publish')} again"


def print_verified(root: Path, study_file: Path | None) -> None:
    """Print the findings of verify, in results or, where there is a cards.json, in published ones.

    Raises UserError unless everything is consistent, and when there is no study file.
    """
    check = verify_published if (root / CARDS).is_file() else verify
    require_none(root, check(root, study_of(root, study_file)))


def verify_published(folder: Path, study: Study) -> list[Finding]:
    """Check published results against their digests and cards, the study file, and what follows from scores.csv.

    Raises UserError if cards.json or a table cannot be read although its digest is right.
    """
    files = {name: digest for name, digest in hashes(folder).items() if name not in (PAGE, SUMS)}
    findings = list(_sums(folder, files))
    if any(finding.faults for finding in findings):  # the rest would be judged by files that are not what they were
        return findings
    published = read_published(folder)
    study = study.model_copy(update={"seeds": published.study.seeds})  # more seeds than the file's are no other setting
    findings += [*_tables(folder, published, files), _page(folder, published, files), *_cards(published, study)]
    faults: dict[str, list[str]] = {}
    for finding in findings:
        faults.setdefault(finding.artifact, []).extend(finding.faults)
    return [Finding(name, found) for name, found in faults.items()]


def _sums(folder: Path, files: dict[str, str]) -> Iterator[Finding]:
    """Compare the files, name -> digest, with SHA256SUMS."""
    with reading(folder / SUMS, "publish"):
        listed = {line[66:]: line[:64] for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()}
    for name in sorted(files.keys() | listed.keys()):
        if name not in listed:
            yield Finding(name, [f"not in {SUMS}: {_AGAIN}"])
        elif files.get(name) != listed[name]:
            yield Finding(name, [f"tampered with: not the file of {SUMS}" if name in files else f"missing: {_AGAIN}"])
        else:
            yield Finding(name, [])


def _tables(folder: Path, published: Published, files: dict[str, str]) -> Iterator[Finding]:
    """Compare tables and figures with the digests of their cards, and tables with what follows from scores.csv."""
    made, copies = _made(published), published.cards.copies
    pictures = {name for name in files if name.endswith(".png")}
    for name in sorted(pictures | {name for name in copies if not name.endswith(".png")}):
        if name not in files:
            yield Finding(name, [f"missing: {_AGAIN}"])
        elif files[name] != made.get(copies.get(name, "")):
            yield Finding(name, ["tampered with: no card names this file"])
    for name, table in tables_of(published.again).items():
        numbers = {str(column): pd.to_numeric(table[column]) for column in table if column not in TEXT}
        try:
            written = read_table(folder / name, "publish", TEXT)
            again = table.assign(**numbers).reset_index(drop=True)
            assert_frame_equal(written, again, rtol=1e-9, atol=1e-12, check_dtype=False)
        except AssertionError as error:
            yield Finding(name, [f"does not follow from scores.csv: {' '.join(str(error).split()):.200}"])


def _page(folder: Path, published: Published, files: dict[str, str]) -> Finding:
    """Compare a page's blocks with what publish writes, and the figures that it names with those that are there."""
    page = folder / PAGE
    with reading(page, "publish"):
        text = page.read_text(encoding="utf-8")
    blocks, pictures = blocks_of(text, page), {name for name in files if name.endswith(".png")}
    again = blocks_of(filled(text, published), page)
    faults = [f"block {name!r} is not what publish writes" for name in blocks if blocks[name] != again[name]]
    faults += [f"{name} is missing" for name in sorted(figures_named(text) - pictures)]
    faults += [f"{name} is not named: {_AGAIN}" for name in sorted(pictures - figures_named(text))]
    return Finding(PAGE, faults)


def _cards(published: Published, study: Study) -> Iterator[Finding]:
    """Compare the cards with the study file, and their inputs with one another's outputs."""
    cards = published.cards.cards
    known, expected = (artifacts(Job(each, StudyPaths(each.name))) for each in (published.study, study))
    for name in dict.fromkeys([*cards, *expected]):
        if name not in cards.keys() & known.keys() & expected.keys():
            where = "the study file" if name in cards else CARDS
            yield Finding(name, [f"stale: made with other settings: {where} has no {name}"])
            continue
        stage, job = known[name]
        # The settings as this version reads them: a key that later versions added has its default, then as now.
        facts = {"study": published.study.name, "settings": job.depends_on(stage), "key": job.key(stage)}
        card = CheckedCard.model_validate(cards[name].model_dump() | facts)
        yield Finding(name, list(stale(card, *expected[name], _made(published))))


def _made(published: Published) -> dict[str, str]:
    return {name: digest for card in published.cards.cards.values() for name, digest in card.outputs.items()}
