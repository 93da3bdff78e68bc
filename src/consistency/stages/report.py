"""Stage report: tables, figures and one self-contained page from all results of the study."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from consistency.analysis import MEASURES, ema_table
from consistency.figures import measure_label
from consistency.files import read_json, write_bytes, write_json
from consistency.job import Job
from consistency.layout import sampler_name
from consistency.provenance import Card
from consistency.stages.flows import FILES
from consistency.stages.page import write_page
from consistency.stages.pictures import carried, draw_pictures
from consistency.stages.results import Results, read_cards, read_histories, read_results, records
from consistency.wording import coarse, plus_minus, ratio, speed, teacher_line


def make_report(job: Job) -> None:
    """Write report.html, figures/, scores.csv, table.csv, speedup.csv, paired.csv, summary.json and card.json; ema.csv
    if a student has several EMA rates.

    Raises UserError if a stage's results are missing or belong to another study.
    """
    card, folder = Card(job, "report"), job.paths.report
    results, cards, histories = read_results(job), read_cards(job), read_histories(job)
    pictures = draw_pictures(job, results, histories)
    texts = {
        "scores.csv": results.scores.to_csv(index=False),
        "table.csv": results.table.to_csv(index=False),
        "speedup.csv": pd.DataFrame([asdict(item) for item in results.found]).to_csv(index=False),
        "paired.csv": pd.DataFrame([asdict(item) for item in results.paired]).to_csv(index=False),
        "report.html": write_page(job, results, cards, histories, pictures),
    }
    if results.several_rates:
        texts["ema.csv"] = ema_table(results.scores).to_csv(index=False)
    else:
        (folder / "ema.csv").unlink(missing_ok=True)
    for stale in (folder / "figures").glob("*"):
        if stale.stem not in {picture.name for picture in pictures}:
            stale.unlink()
    for picture in pictures:
        write_bytes(folder / "figures" / f"{picture.name}.png", picture.png)
        write_bytes(folder / "figures" / f"{picture.name}.svg", picture.svg)
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
    write_json(folder / "summary.json", summary_of(results))
    figures = [f"figures/{picture.name}.{kind}" for picture in pictures for kind in ("png", "svg")]
    card.write(_inputs(job), [folder / name for name in (*texts, "summary.json", *figures)])


def _inputs(job: Job) -> list[Path]:
    """Return the files that a report is made from."""
    study, paths, students = job.study, job.paths, job.trainings
    shown = [f"{sampler_name(nfe)}.npy" for nfe in study.report.grid_nfe]
    return [
        *(paths.dataset / name for name in ("images.npy", "dataset.json")),
        *([paths.coefficients / "coefficients.npz"] if study.needs_coefficients else []),
        *(paths.flows / name for name in FILES if study.flows),
        *(path for snapshots in carried(job).values() for path in snapshots.values()),
        job.samples / "heun.npy",
        *(job.of(run, study.seeds[0]).samples / name for run in study.students for name in shown),
        *(each.folder / "history.jsonl" for each in students),
        *(each.scores for each in (job, *students)),
    ]


def print_summary(job: Job) -> None:
    """Print the teacher's score, the students', the speed-ups, and the places of the report and the MLflow page."""
    study, results = job.study, read_results(job)
    label = measure_label("fd", results.extractor)
    print(f"\n{teacher_line(results.teacher, study)}")
    print(f"\n{study.title or study.name}: mean ± half-width of the 95 % t interval over seeds{coarse(study)}\n")
    measures = ("fd", "alignment") if results.aligned else ("fd", "kid")
    other = "alignment error" if results.aligned else "KID"
    print(f"{'student':18} {'sampler':10} {'NFE':>3}  {label:>36}  {other:>24}")
    for row in results.table.itertuples():
        first, second = (plus_minus(getattr(row, m), getattr(row, f"{m}_half_width")) for m in measures)
        print(f"{row.run:18} {row.sampler:10} {row.nfe:3}  {first:>36}  {second:>24}")
    for known in results.calibration:
        print(f"{known['run']:18} {known['sampler']:10} {known['nfe'] or '':3}  {known['fd']:36.4g}")
    if results.found:
        print(f"\nspeed-up: the baseline's iterations to its own final score over the student's{coarse(study)}\n")
    for item in results.found:
        what = "FD" if item.measure == "fd" else item.measure
        print(f"{item.run:18} over {item.baseline:12} {what:10} NFE {item.nfe:<3} {speed(item)}")
    if results.paired:
        print(f"\ndifference to the baseline over the second half of training, paired by seed{coarse(study)}\n")
    for pair in results.paired:
        what = "FD" if pair.measure == "fd" else pair.measure
        print(f"{pair.run:18} to   {pair.baseline:12} {what:10} NFE {pair.nfe:<3} {ratio(pair)}")
    print(f"\nreport: {job.paths.report / 'report.html'}")
    tracked = job.paths.track / "tracked.json"
    if tracked.exists():
        print(f"MLflow: {read_json(tracked, 'track')['url_hint']}")


def summary_of(results: Results) -> dict[str, Any]:
    """Return the numbers of the report for machines; unmeasured ones are absent, since JSON has no NaN."""
    measures = [name for measure in MEASURES for name in (measure, f"{measure}_half_width")]
    interval = ("low", "high")
    tables: list[tuple[str, list[dict[str, Any]], str, Sequence[str]]] = [
        ("final", records(results.table), "sampler", measures),
        ("speed_up", [asdict(item) for item in results.found], "measure", ("bound", "value", *interval)),
        ("paired", [asdict(item) for item in results.paired], "measure", ("ratio", *interval)),
    ]
    summary: dict[str, Any] = {"extractor": results.extractor, "calibration": {}}
    for row in results.calibration:
        summary["calibration"][f"{row['run']} {row['sampler']}"] = _known(row, ("fd", "kid", "published"))
    for name, rows, label, columns in tables:
        students = summary.setdefault(name, {})
        for row in rows:
            students.setdefault(row["run"], {})[f"{row[label]} nfe{row['nfe']}"] = _known(row, columns)
    return summary


def _known(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return those of the values that are words or finite numbers."""
    found = {name: row.get(name, np.nan) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, str) or np.isfinite(value)}
