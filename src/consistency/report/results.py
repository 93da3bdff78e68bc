"""Inputs of the report: score tables, cards and histories of a finished study."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from consistency.base.errors import UserError
from consistency.base.files import read_history, require_output, sha256
from consistency.config.job import Job
from consistency.evaluation.analysis import (
    Pair,
    Paired,
    SpeedUp,
    final_table,
    of_main_rate,
    paired_ratios,
    speed_ups,
)
from consistency.provenance.card import read_card
from consistency.provenance.graph import artifacts, verb_of

Cards = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """Numbers of a study. scores: every EMA rate's; main: the main rate's, the source of all else.

    table: at the end of training; found, paired: students against their baselines.
    """

    scores: pd.DataFrame
    main: pd.DataFrame
    table: pd.DataFrame
    found: list[SpeedUp]
    paired: list[Paired]

    @property
    def extractor(self) -> str:
        """Name of the features in the score files."""
        return str(self.scores.extractor.iloc[0])

    @property
    def several_rates(self) -> bool:
        """True if a student was scored at more than one EMA rate."""
        return len(self.main) < len(self.scores)

    @property
    def aligned(self) -> bool:
        """True if a student was compared with a teacher's endpoints."""
        return bool(self.scores.alignment.notna().any())

    @property
    def calibration(self) -> list[dict[str, Any]]:
        """Rows of the calibration, scored before any student."""
        return records(self.scores[self.scores.kind == "calibration"])

    @property
    def teacher(self) -> dict[str, Any] | None:
        """The teacher's row of the calibration, if there is a teacher."""
        return next((row for row in self.calibration if row["run"] == "teacher"), None)


def read_results(job: Job) -> Results:
    """Read all score tables of the study, the calibration first.

    Raises UserError, naming the verb, if one is missing, damaged or of other settings.
    """
    scores = pd.concat([_table(each) for each in (job.of(), *job.trainings)], ignore_index=True)
    return results_of(job, scores, lambda training: read_card(training, "student")["measured"])


def results_of(job: Job, scores: pd.DataFrame, measured: Callable[[Job], Mapping[str, Any]]) -> Results:
    """Compute the numbers of a study from its score rows, the calibration's and every student's. measured: what a
    training's card says."""
    study = job.study
    main = of_main_rate(scores, {name: student.ema_rate for name, student in study.students.items()})
    pairs, nfes = _pairs(job, measured), study.scores.curve_nfe
    return Results(scores, main, final_table(main), speed_ups(main, pairs, nfes), paired_ratios(main, pairs, nfes))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _table(job: Job) -> pd.DataFrame:
    verb = verb_of("scores", job)
    path = require_output(job.scores, verb)
    if read_card(job, "scores")["outputs"].get(path.name) != sha256(path):
        raise UserError(f"{path} was changed after it was written: run `python -m consistency {verb}` again")
    return pd.read_csv(path)


def _pairs(job: Job, measured: Callable[[Job], Mapping[str, Any]]) -> list[Pair]:
    """Return the students that have a baseline, by themselves or by their objective. An iteration of another objective
    costs something else, so such a pair is compared by network evaluations and by wall time."""
    students, report, pairs = job.study.students, job.study.report, []

    def cost(student: str, unit: str) -> float:
        """Return the mean cost of an iteration over a student's trainings."""
        spent = [measured(job.of(student, seed))[unit] for seed in job.study.seeds]
        return float(np.mean(spent)) / students[student].steps

    for name, student in students.items():
        baseline = report.against.get(name) or report.baseline.get(student.objective)
        if baseline is None or baseline == name:
            continue
        costs = {"iterations": (1.0, 1.0)}
        if students[baseline].objective != student.objective:
            costs = {unit: (cost(baseline, unit), cost(name, unit)) for unit in ("network_evaluations", "seconds")}
        pairs.append(Pair(name, baseline, costs))
    return pairs


def read_histories(job: Job) -> dict[str, list[pd.DataFrame]]:
    """Read the histories of each student's trainings, one table per seed."""
    histories: dict[str, list[pd.DataFrame]] = {name: [] for name in job.study.students}
    for each in job.trainings:
        lines = read_history(each.folder / "history.jsonl", f"student{each.options}")
        histories[str(each.student)].append(pd.DataFrame(lines))
    return histories


def read_cards(job: Job) -> Cards:
    """Read the cards of all artifacts by name, except those of the scores, which belong to the tables."""
    found = artifacts(job).items()
    return {name: read_card(each, stage) for name, (stage, each) in found if stage not in ("scores", "report")}
