"""A study's content in MLflow, read from its results without MLflow: runs, params, points and files."""

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

from consistency.base.files import read_history, read_json, read_lines
from consistency.config.job import Job
from consistency.provenance.card import read_card
from consistency.report.lines import line_of

MEASURES = ("fd", "kid", "alignment")
#: tag that identifies a run created during its training
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
    """The intended state of one MLflow run. started, ended: milliseconds since 1970; data: MLflow's description of the
    images; first: tags written only once, since a person may change them; digest: of its results, empty while it
    trains; files: file or folder, if it is there, and its artifact folder."""

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


def plan(job: Job) -> list[Record]:
    """Return every run of the study, parents before children. Raises UserError if results are missing or stale."""
    records = [_teacher(job)]
    for run in job.study.students:
        seeds = [_seed(job.of(run, seed)) for seed in job.study.seeds]
        records += [_student(job.of(run), seeds), *seeds]
    return [*records, _report(job)]


def plan_live(job: Job, made: dict[str, Any]) -> list[Record]:
    """Return the runs of a training that begins: a student's parent and its own; without a student, the teacher's.

    made: the command, git, hardware and training entries of its future card.
    """
    if job.student is None:
        return [_begun_teacher(job, made)]
    begun = _begun_seed(job, made)
    return [_begun_student(job, begun.started), begun]


# --- the teacher


def _begun_teacher(job: Job, made: dict[str, Any]) -> Record:
    # Its params are those of its samples: an official checkpoint depends on neither noise nor dataset.
    settings = job.of().depends_on("samples")
    return Record(
        "teacher",
        "teacher",
        started=_training_time(made)[0],
        data=_data(job),
        params=_flat(settings["teacher"]) | _sections(settings, "noise", "dataset"),
        tags=_origin(made),
        first={"mlflow.note.content": _TEACHER_NOTE if job.study.taught else _NO_TEACHER_NOTE},
    )


def _teacher(job: Job) -> Record:
    card = read_card(job, "teacher")
    record = _begun_teacher(job, card)
    _finish(record, job, card)
    for row in csv.DictReader(read_lines(job.scores, "calibration")):
        # The teacher's score is shown beside the students'; no sampler can beat the data's halves.
        own = row["run"] == "teacher"
        name = f"heun-nfe{row['nfe']}" if own else f"{row['run']}-{row['sampler']}"
        record.points += _measured(row, "final/" if own else "calibration/", name, record.ended, 0)
    return record


# --- a student


def _begun_seed(job: Job, made: dict[str, Any]) -> Record:
    differing, own = _settings(job)
    seed = {"seed": str(job.seed)}
    return Record(
        job.label,
        "seed",
        started=_training_time(made)[0],
        data=_data(job),
        params=own | seed,
        tags=_origin(made) | differing | seed,
        first=_first(job, f"seed {job.seed}"),
        parent=job.student,
    )


def _seed(job: Job) -> Record:
    card = read_card(job, "student")
    record = _begun_seed(job, card)
    record.params |= _sections(job.depends_on("scores"), "sampling", "scores")
    history = _finish(record, job, card)
    seconds = {line["step"]: line["seconds"] for line in history} | {0: 0.0}
    main = job.settings.ema_rate
    for row in csv.DictReader(read_lines(job.scores, f"scores{job.options}")):
        if row["kind"] == "curve":
            step = int(row["step"])
            # At the training time of the snapshot, so that the page's time axis is training time.
            at = record.started + round(1000 * seconds[step]) if step in seconds else record.ended
            record.points += _measured(row, "", _sampler(row, main), at, step)
        else:
            # A value without a curve stands at step 0: MLflow then draws bars, one a run.
            record.points += _measured(row, "final/", _sampler(row, main), record.ended, 0)
    return record


def _begun_student(job: Job, started: int) -> Record:
    differing, own = _settings(job)
    seeds, run = ", ".join(str(seed) for seed in job.study.seeds), str(job.student)
    return Record(
        run,
        "student",
        started=started,
        data=_data(job),
        params=own | {"seeds": seeds},
        tags=differing | {TRAINING: _digest([str(job.paths.root.resolve()), run, job.of(run).key("student")])},
        first=_first(job, f"means over seeds {seeds}"),
    )


def _student(job: Job, seeds: list[Record]) -> Record:
    """Return the mean over the seeds, at the points that all of them have."""
    record = _begun_student(job, min(seed.started for seed in seeds))
    record.params |= _sections(job.depends_on("scores"), "sampling", "scores")
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


def _first(job: Job, what: str) -> dict[str, str]:
    """Return the description and the colour of the report's figures, as tags that are written once."""
    colour = line_of(list(job.study.students), str(job.student))["color"]
    return {"mlflow.note.content": f"Student `{job.student}`, {what}.", "mlflow.runColor": colour}


def _settings(job: Job) -> tuple[dict[str, str], dict[str, str]]:
    """Return the keys in which the study's students differ, with this one's values, and all of its keys, those first: a
    run's page shows them in this order."""
    flat = {name: _flat(student.model_dump(mode="json")) for name, student in job.study.students.items()}
    own = flat[str(job.student)]
    keys = dict.fromkeys(key for student in flat.values() for key in student)
    # A section of another kind has other keys.
    differing = {k: own[k] for k in keys if k in own and any(other.get(k) != own[k] for other in flat.values())}
    return differing, differing | own


# --- the report


def _report(job: Job) -> Record:
    card, study, paths = read_card(job, "report"), job.study, job.paths
    ended = _milliseconds(card)
    files = [(paths.dataset / name, "dataset") for name in ("dataset.json", "card.json")]
    files += [(paths.report, ""), (paths.extractor / "card.json", "extractor")]
    files += [(paths.flows, "flows")] if study.flows else []
    files += [(paths.coefficients, "coefficients")] if study.needs_coefficients else []
    return Record(
        "report",
        "report",
        started=ended - round(1000 * card["seconds"]),
        ended=ended,
        data=_data(job),
        params={},
        tags=_origin(card),
        first={"mlflow.note.content": "Under Artifacts: `report.html` with its figures and tables."},
        digest=_digest([card["key"], card["outputs"]]),
        files=files,
    )


# --- parts of a run


def _finish(record: Record, job: Job, card: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the results of a finished training: its end, curves, cost and files. Returns its history."""
    trained = job.card(card["stage"])
    lines = trained.with_name("history.jsonl")
    history, scores = read_history(lines, card["stage"] + job.options), read_card(job, "scores")
    record.digest = _digest([card["key"], card["outputs"], scores["key"], scores["outputs"]])
    record.ended = _training_time(card)[1]
    cost = [Point(f"cost/{name}", float(value), record.ended, 0) for name, value in sorted(card["measured"].items())]
    record.points = history_points(history, record.started) + cost
    record.files = [(trained, ""), (lines, ""), (job.scores, ""), (job.card("samples"), "samples")]
    return history


def _digest(content: Any) -> str:
    """Return a digest of plain data that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _origin(card: dict[str, Any]) -> dict[str, str]:
    """Return an artifact's origin as tags: machine, commit, command and training."""
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


def _data(job: Job) -> dict[str, str]:
    """Describe the dataset from known facts, without reading its 16 GB."""
    facts = read_json(job.paths.facts, "dataset")
    shape = [facts["count"], facts["resolution"], facts["resolution"], facts["channels"]]
    profile = {"num_rows": facts["count"], "features_shape": shape, "dtype": "uint8", "sha256": facts["sha256"]}
    return {
        "name": job.study.dataset.path or job.study.dataset.kind,
        "digest": facts["sha256"][:32],  # MLflow takes 36 characters
        "source_type": "local",
        "source": json.dumps({"uri": str((job.paths.images).resolve())}),
        "profile": json.dumps(profile),
    }


def _milliseconds(card: dict[str, Any]) -> int:
    """Return the time at which a stage ended, in milliseconds since 1970."""
    return round(1000 * datetime.fromisoformat(card["created"]).timestamp())


def _training_time(card: dict[str, Any]) -> tuple[int, int]:
    """Return start and end of a training as if it had not been interrupted (so far, its start); for a teacher that was
    only converted, those of the conversion."""
    seconds = round(1000 * card.get("measured", {}).get("seconds", card.get("seconds", 0)))
    started = card["training"]["started"] if card.get("training") else _milliseconds(card) - seconds
    return started, started + seconds


def history_points(history: list[dict[str, Any]], started: int) -> list[Point]:
    """Return the curves of a training; times are its seconds, counted from its start (milliseconds since 1970)."""
    return [
        Point(f"training/{name}", float(value), started + round(1000 * line["seconds"]), line["step"])
        for line in history
        for name, value in line.items()
        if name not in ("step", "seconds")
    ]


def _sampler(row: dict[str, str], main: float) -> str:
    """Return nfe2 for the student's own sampler, gamma1-nfe2 for another, nfe2-ema0.9999 for a further EMA rate;
    MLflow's names may not hold an '='."""
    own = row["sampler"] in ("jumps", "multistep")
    rate = "" if float(row["ema"]) == main else f"-ema{row['ema']}"
    return ("" if own else re.sub(r"[^\w.-]", "", row["sampler"]) + "-") + f"nfe{row['nfe']}{rate}"


def _measured(row: dict[str, str], prefix: str, sampler: str, time: int, step: int) -> list[Point]:
    """Return the scores of a row as `<prefix>fd/<sampler>`; an empty cell was not measured."""
    return [Point(f"{prefix}{name}/{sampler}", float(row[name]), time, step) for name in MEASURES if row[name]]


def _sections(settings: dict[str, Any], *names: str) -> dict[str, str]:
    """Return sections of the settings as params."""
    return _flat({name: settings[name] for name in names})


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to dotted names; values as YAML would show them."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) and value else json.dumps(value)
    return flat
