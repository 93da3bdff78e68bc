"""The verb publish: a study's results in the repository, docs/results/NAME."""

import re
import shlex
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pandas as pd

from consistency.base.errors import UserError
from consistency.base.files import read_json, sha256, write_bytes, write_json
from consistency.config.job import Job
from consistency.provenance.archive import archive_of
from consistency.provenance.graph import FLOW_FILES, REPORT_FILES, artifacts, verb_of
from consistency.provenance.inputs import read_coefficients
from consistency.provenance.verification import SUMS, require_consistent
from consistency.report.blocks import blocks_of, figures_named, filled, first_page
from consistency.report.pictures import read_own_fits
from consistency.report.published import CARDS, PAGE, PublishedCard, PublishedCards, read_published

# Written if there is something to write; other files of the folder are left alone.
_GENERATED = {*REPORT_FILES, *FLOW_FILES, "ema.csv", "coefficients.csv", "own_fits.csv"}
# Of a machine: neither its name nor its jobs.
_FACTS = ("processor", "cores", "memory_gib", "gpus", "threads")


def publish(job: Job, pages: Path, archives: Path) -> None:
    """Write tables, figures, cards and digests of a finished study into its folder of pages, and fill its README.md.

    Raises UserError if `verify` finds a fault, or the page has an unknown block or names an unknown figure; then
    nothing is written.
    """
    root, folder = job.paths.root, pages / job.study.name
    require_consistent(root, job.study)
    page, cards = folder / PAGE, _cards(job, archives)
    text = page.read_text(encoding="utf-8") if page.exists() else None
    figures = {name for name in cards.copies if name[-4:] == ".png"}
    wanted = figures if text is None else figures_named(text)
    if missing := sorted(wanted - figures):
        raise UserError(f"{page} names {missing[0]}; the report has {', '.join(sorted(figures))}")
    blocks_of(text or "", page)
    copied = {name: path for name, path in cards.copies.items() if name in wanted or name not in figures}
    files = {name: (root / path).read_bytes() for name, path in copied.items()} | _tables(job)
    for path in folder.glob("*"):
        if path.name not in files and (path.suffix == ".png" or path.name in _GENERATED):
            path.unlink()
    for name, content in files.items():
        write_bytes(folder / name, content)
    write_json(folder / CARDS, cards.model_dump(mode="json"))
    paths = sorted(path for path in folder.glob("[!.]*") if path.name not in (PAGE, SUMS))
    write_bytes(folder / SUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in paths).encode())
    published = read_published(folder)
    write_bytes(page, filled(first_page(published, figures) if text is None else text, published).encode())
    print(f"{folder}: {len(paths) + 2} files, {sum(path.stat().st_size for path in paths) / 1024:,.0f} KiB")


def _tables(job: Job) -> dict[str, bytes]:
    """Return the coefficients of the teacher and of students, which the results hold as arrays, as CSV."""
    tables, columns = {}, ["times", "l", "s"]
    if job.study.needs_coefficients:
        fit = read_coefficients(job)
        names = [name for name, values in fit.items() if values.ndim == 1]
        tables["coefficients.csv"] = pd.DataFrame({name: fit[name] for name in names})
    own = [(run, step, fit) for run, fits in read_own_fits(job).items() for step, fit in fits.items()]
    if own:
        rows = [pd.DataFrame(fit.T, columns=columns).assign(run=run, step=step) for run, step, fit in own]
        tables["own_fits.csv"] = pd.concat(rows)[["run", "step", *columns]]
    return {name: table.to_csv(index=False).encode() for name, table in tables.items()}


def _cards(job: Job, archives: Path) -> PublishedCards:
    """Read all cards, without names of hosts and users; what they have in common stands once."""
    cards: dict[str, PublishedCard] = {}
    machines: list[dict[str, Any]] = []
    packages: list[dict[str, str]] = []
    for name, (stage, each) in artifacts(job).items():
        card = read_json(each.card(stage), verb_of(stage, each))
        folder = each.card(stage).parent.relative_to(job.paths.root)
        public = {
            "student": card["run"],
            "command": _without_folders(card["command"]),
            "outputs": {(folder / name).as_posix(): digest for name, digest in card["outputs"].items()},
            "machine": _place(machines, {fact: card["hardware"][fact] for fact in _FACTS}),
            "packages": _place(packages, card["versions"]),
        }
        cards[name] = PublishedCard.model_validate(card | card["git"] | public)
    study, archive = read_json(job.card("report"), "report")["resolved"], _archive(job, archive_of(job, archives))
    return PublishedCards(study=study, archive=archive, machines=machines, packages=packages, cards=cards)


def _archive(job: Job, path: Path) -> dict[str, str] | None:
    """Return name and sha256 of the archive, if it holds these results and not others of the same settings."""
    if not path.is_file():
        return None
    with ZipFile(path) as archive:
        packed = archive.read(f"results/{job.study.name}/report/card.json")
    return {"name": path.name, "sha256": sha256(path)} if packed == job.card("report").read_bytes() else None


def _place(known: list[Any], item: Any) -> int:
    """Return the place of an item in a list, to which it is added if it is new."""
    if item not in known:
        known.append(item)
    return known.index(item)


def _without_folders(command: str) -> str:
    """Cut the folders off paths that lead out of the working directory: they name users and machines."""
    return shlex.join(re.sub(r"(^|=)(?:~\w*|\.\.)?/.*/", r"\1", word) for word in shlex.split(command))
