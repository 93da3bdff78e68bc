"""The page report.html: one file without scripts that loads nothing from elsewhere."""

import base64
from dataclasses import asdict
from importlib.resources import files
from io import BytesIO
from typing import Any

import jinja2
import pandas as pd

from consistency.base.files import read_json
from consistency.config.job import Job
from consistency.config.measures import MEASURES, OWN_SAMPLERS
from consistency.config.reading import dump_yaml
from consistency.config.study import Study
from consistency.evaluation.analysis import Comparison, ema_table, step_costs
from consistency.provenance.environment import git_state
from consistency.report import figures, wording
from consistency.report.pictures import Picture
from consistency.report.results import Cards, Results, records
from consistency.report.verdicts import verdicts


def write_page(
    job: Job, results: Results, cards: Cards, histories: dict[str, list[pd.DataFrame]], pictures: list[Picture]
) -> str:
    """Render the page as text. Raises UserError if the dataset's facts are missing."""
    study, extractor = job.study, results.extractor
    template = files("consistency.report").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    chapters: dict[str, list[dict[str, str]]] = {}
    for picture in pictures:
        entry = {"name": picture.name, "caption": picture.caption, "data": base64.b64encode(picture.png).decode()}
        chapters.setdefault(picture.chapter, []).append(entry)
    scored = _published(study)
    rows = [
        row | {"published": scored.get((row["run"], row["nfe"]), "") if row["sampler"] in OWN_SAMPLERS else ""}
        for row in _table_rows(results.table)
    ]
    return environment.from_string(template).render(
        study=study,
        teacher_line=wording.teacher_line(results.teacher, study),
        teacher_made=wording.teacher_made(study, int(cards["teacher"]["measured"]["parameters"])),
        beginning=wording.beginning(study),
        claims=wording.claims(study),
        aligned=results.aligned,
        students={name: wording.differs_in(study, name) for name in study.students},
        data=read_json(job.paths.facts, "dataset"),
        is_fid=extractor.startswith("inception"),
        fd_label=figures.measure_label("fd", extractor),
        accuracy=cards["extractor"]["measured"].get("held_out_accuracy"),
        calibration=results.calibration,
        rows=rows,
        published=any(row["published"] for row in rows),
        rates=_table_rows(ema_table(results.scores)) if results.several_rates else [],
        found=[_said(item) | {"text": wording.speed(item), "final": wording.final(item)} for item in results.found],
        paired=[_said(item) | {"text": wording.ratio(item)} for item in results.paired],
        verdicts=verdicts(study, results),
        varied=wording.varied(study),
        cost=_cost(job, cards),
        steps=_step_table(histories),
        times=_times(cards, study.taught),
        pictures=chapters,
        card=cards["teacher"],
        commits=sorted({wording.commit(state) for state in (git_state(), *(card["git"] for card in cards.values()))}),
        key=job.key("report"),
        commands=sorted({card["command"] for card in cards.values()}),
        resolved=dump_yaml(study.model_dump(mode="json")),
    )


def _said(item: Comparison) -> dict[str, Any]:
    """Return a comparison as a row of the page."""
    return asdict(item) | {"verdict": wording.verdict(item), "by": wording.by_unit(item.unit)}


def _table_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows, each measure as text."""
    return [
        row | {measure: wording.plus_minus(row[measure], row[f"{measure}_half_width"]) for measure in MEASURES}
        for row in records(table)
    ]


def _published(study: Study) -> dict[tuple[str, int], str]:
    """Return the FIDs that a paper reports, by student and number of jumps; "?" behind one that was read but once, ±:
    over samplings of one model."""
    table = pd.read_csv(BytesIO(files("consistency.report").joinpath("published.csv").read_bytes()), dtype={"run": str})
    return {
        (row["run"], row["nfe"]): wording.plus_minus(row["fid"], row["spread"])
        + ("" if row["read"] == "twice" else " ?")
        for row in records(table[table.study == study.name])
    }


def _step_table(histories: dict[str, list[pd.DataFrame]]) -> dict[str, Any] | None:
    """Return milliseconds per training step by part, and peak memory, as rows of text."""
    costs = step_costs(histories)
    if costs.empty:
        return None
    parts, rows = [str(name) for name in costs if name not in ("run", "peak_memory_mib")], []
    for row in records(costs):
        numbers = ["" if pd.isna(row[part]) else f"{1000 * row[part]:.1f}" for part in parts]
        rows.append([row["run"], *numbers, f"{row['peak_memory_mib']:,.0f}" if "peak_memory_mib" in row else ""])
    return {"parts": parts, "rows": rows}


def _cost(job: Job, cards: Cards) -> dict[str, Any] | None:
    """Compare the cost of the coefficient fit with one student's training and with all."""
    if "coefficients" not in cards:
        return None
    fit = cards["coefficients"]["measured"]
    trained = [(each, cards[f"student {each.label}"]["measured"]) for each in job.trainings]
    fitted = next(measured for each, measured in trained if each.settings.needs_coefficients)
    return {
        "evaluations": fit["network_evaluations"],
        "seconds": fit["seconds"],
        "of_one_evaluations": fit["network_evaluations"] / fitted["network_evaluations"],
        "of_one_seconds": fit["seconds"] / fitted["seconds"],
        "of_all_evaluations": fit["network_evaluations"] / sum(m["network_evaluations"] for _, m in trained),
        "of_all_seconds": fit["seconds"] / sum(m["seconds"] for _, m in trained),
    }


def _times(cards: Cards, taught: bool) -> list[tuple[str, float]]:
    """Return the wall time of each stage, students together, without the placeholders of a missing teacher."""
    times: dict[str, list[float]] = {}
    for name, card in cards.items():
        if taught or name not in ("teacher", "samples of the teacher"):
            # Only `measured` has the whole time of an interrupted training.
            times.setdefault(card["stage"], []).append(card["measured"].get("seconds", card["seconds"]))
    return [(f"{stage} ({len(each)})" if len(each) > 1 else stage, sum(each)) for stage, each in times.items()]
