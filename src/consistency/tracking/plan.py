"""What of a study goes to MLflow, read from its results without MLflow: its runs, params, points, files."""

import csv
import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from consistency.files import read_history, read_json, read_lines
from consistency.layout import Layout
from consistency.lines import line_of
from consistency.provenance import read_card
from consistency.study import Study

MEASURES = ("fd", "kid", "alignment")
#: the tag by which a run is found again that was made while its training went on
TRAINING = "consistency.training"

_TEACHER_NOTE = "The EDM teacher. `final/*/heun-*`: its samples; `calibration/*/data-halves`: real against real."
_NO_TEACHER_NOTE = "No teacher: the network of the students. `calibration/*/data-halves`: real against real."


class Point(NamedTuple):
    """A metric's value at a step; time in milliseconds since 1970."""

    key: str
    value: float
    time: int
    step: int


@dataclass
class Record:
    """One MLflow run as it shall stand there. started, ended: milliseconds since 1970; data: MLflow's description of
    the images; first: tags that are written once, since a person may change them; digest: of its results,
    empty while it trains; files: file or folder, if it is there, and the artifact folder it goes to."""

    name: str
    role: str
    started: int
    data: dict[str, str]
    params: dict[str, str]
    tags: dict[str, str]
    first: dict[str, str]
    parent: str | None = None
    ended: int = 0
    digest: str = ""
    points: list[Point] = field(default_factory=list)
    files: list[tuple[Path, str]] = field(default_factory=list)


def plan(study: Study, layout: Layout) -> list[Record]:
    """Every run of the study, a parent before its children. Raises UserError when results are missing or stale."""
    records = [_teacher(study, layout)]
    for run in study.students:
        seeds = [_seed(study, layout, run, seed) for seed in study.seeds]
        records += [_student(study, layout, run, seeds), *seeds]
    return [*records, _report(study, layout)]


def plan_live(study: Study, layout: Layout, run: str | None, seed: int | None, made: dict[str, Any]) -> list[Record]:
    """The runs of a training that begins: a student's parent and its own; the teacher's without a run.

    made: what its card will say of command, git, hardware and training.
    """
    if run is None or seed is None:
        return [_begun_teacher(study, layout, made)]
    begun = _begun_seed(study, layout, run, seed, made)
    return [_begun_student(study, layout, run, begun.started), begun]


# --- the teacher


def _begun_teacher(study: Study, layout: Layout, made: dict[str, Any]) -> Record:
    # Its params are those of its samples: an official checkpoint depends on neither noise nor dataset.
    settings = study.settings("samples")
    return Record(
        "teacher",
        "teacher",
        started=_training_time(made)[0],
        data=_data(study, layout),
        params=_flat(settings["teacher"]) | _sections(settings, "noise", "dataset"),
        tags=_origin(made),
        first={"mlflow.note.content": _TEACHER_NOTE if study.taught else _NO_TEACHER_NOTE},
    )


def _teacher(study: Study, layout: Layout) -> Record:
    card = read_card(layout.teacher, study, "teacher")
    record = _begun_teacher(study, layout, card)
    _finish(record, study, layout, card)
    for row in csv.DictReader(read_lines(layout.scores(None, None), "calibration")):
        # The teacher's score stands beside the students'; real against real is what no sampler can beat.
        own = row["run"] == "teacher"
        name = f"heun-nfe{row['nfe']}" if own else f"{row['run']}-{row['sampler']}"
        record.points += _measured(row, "final/" if own else "calibration/", name, record.ended, 0)
    return record


# --- a student


def _begun_seed(study: Study, layout: Layout, run: str, seed: int, made: dict[str, Any]) -> Record:
    differing, own = _settings(study, run)
    return Record(
        f"{run} seed {seed}",
        "seed",
        started=_training_time(made)[0],
        data=_data(study, layout),
        params=own | {"seed": str(seed)},
        tags=_origin(made) | differing | {"seed": str(seed)},
        first=_first(study, run, f"seed {seed}"),
        parent=run,
    )


def _seed(study: Study, layout: Layout, run: str, seed: int) -> Record:
    card = read_card(layout.student(run, seed), study, "student", run, seed)
    record = _begun_seed(study, layout, run, seed, card)
    record.params |= _sections(study.settings("scores", run), "sampling", "scores")
    history = _finish(record, study, layout, card, run, seed)
    seconds = {line["step"]: line["seconds"] for line in history} | {0: 0.0}
    main = study.students[run].ema_rate
    for row in csv.DictReader(read_lines(layout.scores(run, seed), f"scores --run {run} --seed {seed}")):
        if row["kind"] == "curve":
            step = int(row["step"])
            # At the training time of the snapshot, so that the page's time axis is training time.
            at = record.started + round(1000 * seconds[step]) if step in seconds else record.ended
            record.points += _measured(row, "", _sampler(row, main), at, step)
        else:
            # A value without a curve stands at step 0: MLflow then draws bars, one a run.
            record.points += _measured(row, "final/", _sampler(row, main), record.ended, 0)
    return record


def _begun_student(study: Study, layout: Layout, run: str, started: int) -> Record:
    differing, own = _settings(study, run)
    seeds = ", ".join(str(seed) for seed in study.seeds)
    return Record(
        run,
        "student",
        started=started,
        data=_data(study, layout),
        params=own | {"seeds": seeds},
        tags=differing | {TRAINING: _digest([str(layout.root.resolve()), run, study.key("student", run)])},
        first=_first(study, run, f"means over seeds {seeds}"),
    )


def _student(study: Study, layout: Layout, run: str, seeds: list[Record]) -> Record:
    """The mean over the seeds, at the points that all of them have."""
    record = _begun_student(study, layout, run, min(seed.started for seed in seeds))
    record.params |= _sections(study.settings("scores", run), "sampling", "scores")
    record.ended = record.started + round(fmean(seed.ended - seed.started for seed in seeds))
    record.digest = _digest([seed.digest for seed in seeds])
    values: dict[tuple[str, int], list[Point]] = defaultdict(list)
    for seed in seeds:
        for point in seed.points:
            values[point.key, point.step].append(point._replace(time=point.time - seed.started))
    record.points = [
        Point(key, fmean(p.value for p in found), record.started + round(fmean(p.time for p in found)), step)
        for (key, step), found in values.items()
        if len(found) == len(seeds)
    ]
    return record


def _first(study: Study, run: str, what: str) -> dict[str, str]:
    """Description, and the colour of the report's figures."""
    colour = line_of(list(study.students), run)["color"]
    return {"mlflow.note.content": f"Student `{run}`, {what}.", "mlflow.runColor": colour}


def _settings(study: Study, run: str) -> tuple[dict[str, str], dict[str, str]]:
    """The keys in which the study's students differ, as this one has them, and all of its keys, those first: a run's
    page shows them in this order."""
    flat = {name: _flat(student.model_dump(mode="json")) for name, student in study.students.items()}
    own = flat[run]
    keys = dict.fromkeys(key for student in flat.values() for key in student)
    # A section of another kind has other keys.
    differing = {k: own[k] for k in keys if k in own and any(other.get(k) != own[k] for other in flat.values())}
    return differing, differing | own


# --- the report


def _report(study: Study, layout: Layout) -> Record:
    card = read_card(layout.report, study, "report")
    ended = _milliseconds(card)
    files = [(layout.dataset / name, "dataset") for name in ("dataset.json", "card.json")]
    files += [(layout.report, ""), (layout.extractor / "card.json", "extractor")]
    files += [(layout.flows, "flows")] if study.flows else []
    files += [(layout.coefficients, "coefficients")] if study.needs_coefficients else []
    return Record(
        "report",
        "report",
        started=ended - round(1000 * card["seconds"]),
        ended=ended,
        data=_data(study, layout),
        params={},
        tags=_origin(card),
        first={"mlflow.note.content": "Under Artifacts: `report.html` with its figures and tables."},
        digest=_digest([card["key"], card["outputs"]]),
        files=files,
    )


# --- parts of a run


def _finish(
    record: Record, study: Study, layout: Layout, card: dict[str, Any], run: str | None = None, seed: int | None = None
) -> list[dict[str, Any]]:
    """Add what a finished training left: its end, curves, cost and files. Returns its history."""
    folder = layout.teacher if run is None or seed is None else layout.student(run, seed)
    options = "" if run is None else f" --run {run} --seed {seed}"
    history = read_history(folder / "history.jsonl", card["stage"] + options)
    scores = read_card(layout.scores(run, seed), study, "scores", run, seed)
    record.digest = _digest([card["key"], card["outputs"], scores["key"], scores["outputs"]])
    record.ended = _training_time(card)[1]
    cost = [Point(f"cost/{name}", float(value), record.ended, 0) for name, value in sorted(card["measured"].items())]
    record.points = history_points(history, record.started) + cost
    record.files = [(path, "") for path in (folder / "card.json", folder / "history.jsonl", layout.scores(run, seed))]
    record.files.append((layout.samples(run, seed) / "card.json", "samples"))
    return history


def _digest(content: Any) -> str:
    """Name plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _origin(card: dict[str, Any]) -> dict[str, str]:
    """Tags of where, from which commit, by which command and in which training an artifact was made."""
    git, hardware = card["git"], card["hardware"]
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": card["command"],
        "mlflow.source.git.commit": git["commit"],
        "git_commit": git["commit"],
        "git_dirty": None if git["dirty"] is None else str(git["dirty"]).lower(),
        "host": hardware["host"],
        "gpus": ", ".join(hardware["gpus"]),
        "slurm_job": hardware["slurm_job"],
        TRAINING: (card.get("training") or {}).get("id"),
    }
    return {name: value for name, value in tags.items() if value}


def _data(study: Study, layout: Layout) -> dict[str, str]:
    """The dataset, described from what is known of it: nobody reads 16 GB for that."""
    facts = read_json(layout.dataset / "dataset.json", "dataset")
    shape = [facts["count"], facts["resolution"], facts["resolution"], facts["channels"]]
    profile = {"num_rows": facts["count"], "features_shape": shape, "dtype": "uint8", "sha256": facts["sha256"]}
    return {
        "name": study.dataset.path or study.dataset.kind,
        "digest": facts["sha256"][:32],  # MLflow takes 36 characters
        "source_type": "local",
        "source": json.dumps({"uri": str((layout.dataset / "images.npy").resolve())}),
        "profile": json.dumps(profile),
    }


def _milliseconds(card: dict[str, Any]) -> int:
    """When a stage ended."""
    return round(1000 * datetime.fromisoformat(card["created"]).timestamp())


def _training_time(card: dict[str, Any]) -> tuple[int, int]:
    """Start and end of a training as if it had not been interrupted (so far, its start); of a teacher that was only
    converted, of that."""
    seconds = round(1000 * card.get("measured", {}).get("seconds", card.get("seconds", 0)))
    started = card["training"]["started"] if card.get("training") else _milliseconds(card) - seconds
    return started, started + seconds


def history_points(history: list[dict[str, Any]], started: int) -> list[Point]:
    """The curves of a training; the seconds are their time, counted from its start (milliseconds since 1970)."""
    return [
        Point(f"training/{name}", float(value), started + round(1000 * line["seconds"]), line["step"])
        for line in history
        for name, value in line.items()
        if name not in ("step", "seconds")
    ]


def _sampler(row: dict[str, str], main: float) -> str:
    """nfe2 for the student's own sampler, gamma1-nfe2 for another, nfe2-ema0.9999 for an EMA rate that is not the main
    one; MLflow's names may not hold an '='."""
    own = row["sampler"] in ("jumps", "multistep")
    rate = "" if float(row["ema"]) == main else f"-ema{row['ema']}"
    return ("" if own else re.sub(r"[^\w.-]", "", row["sampler"]) + "-") + f"nfe{row['nfe']}{rate}"


def _measured(row: dict[str, str], prefix: str, sampler: str, time: int, step: int) -> list[Point]:
    """The scores of a row, as `<prefix>fd/<sampler>`; an empty cell was not measured."""
    return [Point(f"{prefix}{name}/{sampler}", float(row[name]), time, step) for name in MEASURES if row[name]]


def _sections(settings: dict[str, Any], *names: str) -> dict[str, str]:
    """Sections of the settings as params."""
    return _flat({name: settings[name] for name in names})


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names; values as YAML would show them."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) and value else json.dumps(value)
    return flat
