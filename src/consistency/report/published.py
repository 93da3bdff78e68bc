"""Published results: the tables and cards in docs/results/NAME. All is read from that folder, not from the results."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ValidationError

from consistency.base.arrays import read_table
from consistency.base.errors import UserError, command_of
from consistency.base.files import read_json
from consistency.config.explain import explain
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.reading import build_study
from consistency.config.study import Study
from consistency.evaluation.analysis import Paired, SpeedUp, ema_table
from consistency.report.results import TEXT, Results, records, results_of

#: the page, and the cards of all artifacts, in the folder of a study
PAGE, CARDS = "README.md", "cards.json"


class PublishedCard(BaseModel):
    """The public part of a card. outputs: named relative to the study's folder, like the inputs; machine, packages:
    places in the lists of all."""

    stage: str
    student: str | None
    seed: int | None
    key: str
    code: str | None = None
    command: str
    commit: str | None
    dirty: bool | None
    created: str
    seconds: float
    measured: dict[str, float]
    inputs: dict[str, str]
    outputs: dict[str, str]
    machine: int
    packages: int


class PublishedCards(BaseModel):
    """The content of cards.json. study: with every default, as in the report's card; archive: name and sha256 of the
    zip with these results, if there was one."""

    format: Literal["consistency-published-1"] = "consistency-published-1"
    study: dict[str, Any]
    archive: dict[str, str] | None
    machines: list[dict[str, Any]]
    packages: list[dict[str, str]]
    cards: dict[str, PublishedCard]

    @property
    def copies(self) -> dict[str, str]:
        """Paths in the results of the tables and figures that are published as they are, by file name."""
        outputs = [name for card in self.cards.values() if card.stage in ("report", "flows") for name in card.outputs]
        return {PurePath(name).name: name for name in outputs if name.endswith((".csv", ".json", ".png"))}


@dataclass(frozen=True)
class Published:
    """The content of a folder. results: as its tables have them; again: computed again from its scores.csv."""

    study: Study
    cards: PublishedCards
    results: Results
    again: Results


def read_published(folder: Path) -> Published:
    """Read cards.json and the tables. Raises UserError if one is missing, damaged, or made by another version."""
    content = read_json(folder / CARDS, "publish")
    try:
        cards = PublishedCards.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"{folder / CARDS}: {explain(error, PublishedCards)}; run {command_of('publish')} again"
        ) from None
    scores, students = read_table(folder / "scores.csv", "report", TEXT), cards.study.get("students", {})
    # Cards sort their keys; the rows have the study's order, in which the report compares students.
    ordered = {run: students[run] for run in dict.fromkeys(scores[scores.kind != "calibration"].run) if run in students}
    study = build_study(cards.study | {"students": ordered})
    job = Job(study, StudyPaths(study.name))
    again = results_of(job, scores, lambda training: cards.cards[f"student {training.label}"].measured)
    found, paired = _items(folder / "speedup.csv", SpeedUp), _items(folder / "paired.csv", Paired)
    results = replace(again, table=read_table(folder / "table.csv", "report", TEXT), found=found, paired=paired)
    return Published(study, cards, results, again)


def tables_of(results: Results) -> dict[str, pd.DataFrame]:
    """Return the report's tables by file name; ema.csv only if a student has several EMA rates."""
    tables = {"scores.csv": results.scores, "table.csv": results.table}
    tables |= {"speedup.csv": _table(results.found, SpeedUp), "paired.csv": _table(results.paired, Paired)}
    return tables | ({"ema.csv": ema_table(results.scores)} if results.several_rates else {})


def _table(items: Sequence[Any], kind: Any) -> pd.DataFrame:
    return pd.DataFrame([asdict(item) for item in items], columns=[field.name for field in fields(kind)])


def _items(path: Path, kind: Any) -> list[Any]:
    """Read a table as objects of its rows. Raises UserError if it has other columns."""
    table = read_table(path, "report", TEXT)
    if list(table) != [column.name for column in fields(kind)]:
        raise UserError(f"{path} has other columns than this version's report: run {command_of('report')} again")
    return [kind(**row) for row in records(table)]
