"""The report's numbers, as JSON and for a terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from consistency.base.errors import UserError, command_of
from consistency.base.files import read_json
from consistency.config.job import Job
from consistency.config.measures import MEASURES
from consistency.evaluation.analysis import Comparison
from consistency.report.figures import measure_label
from consistency.report.results import Results, read_results, records
from consistency.report.wording import by_unit, final, plus_minus, ratio, speed, teacher_line, varied, verdict


def print_summary(job: Job) -> None:
    """Print the scores of teacher and students, the speed-ups, and where the report and the MLflow page are. Raises
    UserError if a score is missing."""
    study = job.study
    if not job.paths.root.exists():
        raise UserError(f"{study.name} has no results yet, {job.paths.root}: run {command_of('reproduce')}")
    results = read_results(job)
    label = measure_label("fd", results.extractor)
    print(f"\n{teacher_line(results.teacher, study)}")
    print(f"\n{study.title or study.name}: mean ± half-width of the 95 % t interval over seeds")
    print(f"{varied(study)}\n")
    measures = ("fd", "alignment") if results.aligned else ("fd", "kid")
    other = "alignment error" if results.aligned else "KID"
    print(f"{'student':18} {'sampler':10} {'NFE':>3}  {label:>36}  {other:>24}")
    for row in results.table.itertuples():
        first, second = (plus_minus(getattr(row, m), getattr(row, f"{m}_half_width")) for m in measures)
        print(f"{row.run:18} {row.sampler:10} {row.nfe:3}  {first:>36}  {second:>24}")
    for known in results.calibration:
        scored = f"{known['run']} {known['sampler']}"
        print(f"{scored:29} {known['nfe'] or '':3}  {known['fd']:36.4g}  {'N = ' + format(known['images'], ','):>24}")
    if results.found:
        print("\nspeed-up, and iterations to the baseline's final score, its over the student's\n")
    for item in results.found:
        print(f"{_place(item)} {speed(item)}; {final(item)}; {verdict(item)}")
    if results.paired:
        print("\ndifference to the baseline over the second half of training, paired by seed\n")
    for pair in results.paired:
        print(f"{_place(pair)} {ratio(pair)}; {verdict(pair)}")
    print(f"\nreport: {job.paths.report / 'report.html'}")
    tracked = job.paths.track / "tracked.json"
    if tracked.exists():
        print(f"MLflow: {read_json(tracked, 'track')['url_hint']}")


def _place(item: Comparison) -> str:
    """Say which comparison a line is."""
    what = {"fd": "FD", "alignment": "alignment"}[item.measure]
    return f"{item.run:18} to {item.baseline:12} {what:10} NFE {item.nfe:<3}{by_unit(item.unit)}"


def summary_of(results: Results) -> dict[str, Any]:
    """Return the content of summary.json; unmeasured numbers are absent, since JSON has no NaN."""
    measures = [name for measure in MEASURES for name in (measure, f"{measure}_half_width")]
    tables: list[tuple[str, list[dict[str, Any]], str, Sequence[str]]] = [
        ("final", records(results.table), "sampler", measures),
        ("speed_up", [asdict(item) for item in results.found], "measure", ("value", "low", "high", "p", "reached")),
        ("paired", [asdict(item) for item in results.paired], "measure", ("value", "low", "high", "p")),
    ]
    summary: dict[str, Any] = {"extractor": results.extractor, "calibration": {}}
    for row in results.calibration:
        summary["calibration"][f"{row['run']} {row['sampler']}"] = _known(row, ("fd", "kid", "published"))
    for name, rows, label, columns in tables:
        students = summary.setdefault(name, {})
        for row in rows:
            students.setdefault(row["run"], {})[
                f"{row[label]} nfe{row['nfe']}{by_unit(row.get('unit', 'iterations'))}"
            ] = _known(row, columns)
    return summary


def _known(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the values that are words or finite numbers."""
    found = {name: row.get(name, np.nan) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, str) or np.isfinite(value)}
