"""Inputs of the report: score tables, cards and histories of a finished study."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consistency.base.arrays import read_table, text_columns
from consistency.base.errors import UserError, command_of
from consistency.base.files import read_history, require_output, sha256
from consistency.config.job import Job
from consistency.config.measures import HEUN, MEASURES
from consistency.evaluation.analysis import (
    Pair,
    Paired,
    SpeedUp,
    final_table,
    of_main_rate,
    paired_ratios,
    speed_ups,
)
from consistency.evaluation.scores import Score
from consistency.provenance.card import read_card
from consistency.provenance.graph import artifacts, verb_of

Cards = dict[str, dict[str, Any]]

#: columns of the tables of scores, report and flows that hold text
TEXT = text_columns(Score, SpeedUp, Paired) | {"coupling"}


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
        """The calibration's row of all the teacher's images, if there is a teacher."""
        return next((row for row in self.calibration if row["sampler"] == HEUN), None)


def read_results(job: Job) -> Results:
    """Read all score tables of the study, the calibration first.

    Raises UserError, naming the verb, if one is missing, damaged or of other settings, if it has rows of another study,
    student or seed, and if a score is missing or no finite number.
    """
    scores = pd.concat([_table(each) for each in (job.of(), *job.trainings)], ignore_index=True)
    _require_all_measured(scores)
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
        raise UserError(f"{path} was changed after it was written: run {command_of(verb)} again")
    table = read_table(path, verb, TEXT)
    _require_own(table, job, path)
    return table


def _require_own(table: pd.DataFrame, job: Job, path: Path) -> None:
    """Raise UserError if a table has a row of another study, student or seed: it would be in no figure."""
    runs = ("data", "teacher") if job.student is None else (job.student,)
    own = (table.study == job.study.name) & table.run.isin(runs)
    if job.seed is not None:
        own &= table.seed == job.seed
    if not own.all():
        row = table[~own].iloc[0]
        seed = "" if pd.isna(row.seed) else f" seed {row.seed:g}"
        raise UserError(
            f"{path} has a row of study {row.study!r}, run {row.run!r}{seed}, but it belongs to {job.label} of study "
            f"{job.study.name!r}: delete it and run {command_of(verb_of('scores', job))} again"
        )


def _require_all_measured(scores: pd.DataFrame) -> None:
    """Raise UserError for a score that is no finite number, and for an alignment error that some seeds or steps have
    and others lack: means over the rest would pass for means over all seeds."""
    aligned = scores.groupby(["kind", "run", "sampler", "nfe"]).alignment.transform("count") > 0
    for measure in MEASURES:
        wanted = aligned if measure == "alignment" else True
        wrong = scores[wanted & ~np.isfinite(scores[measure])]
        if len(wrong):
            row = wrong.iloc[0]
            value = "missing" if pd.isna(row[measure]) else f"{row[measure]}"
            trained = row.kind != "calibration"
            who = f"student {row.run}, seed {row.seed:g}, step {row.step:g}" if trained else f"calibration, {row.run}"
            again = f"scores --student {row.run} --seed {row.seed:g}" if trained else "calibration"
            advice = "; if it stays so, train that student with another learning rate, or take it or the seed out of "
            raise UserError(
                f"{who}, {row.sampler}, NFE {row.nfe}: {measure} is {value}, so no mean over the seeds is right: run "
                f"{command_of(again)} again{f'{advice}the study' if trained else ''}"
            )


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
