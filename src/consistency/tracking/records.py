"""Runs of a study as MLflow will hold them: params, tags, points and files, read from the results without MLflow."""

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
from consistency.config.measures import HEUN, MEASURES, OWN_SAMPLERS
from consistency.provenance.card import read_card
from consistency.report.lines import line_of

#: tag that identifies a run created during its training
TRAINING = "consistency.training"


class Point(NamedTuple):
    """A metric's value at a step; time in milliseconds since 1970."""

    key: str
    value: float
    time: int
    step: int


@dataclass
class Record:
    """The intended state of one MLflow run. started, ended: milliseconds since 1970; data: MLflow's description of the
    images; first: tags written once, since a person may change them; digest: of its results, '' while it trains; files:
    (file or folder, artifact folder), skipped if absent."""

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
    for name in job.study.students:
        seeds = [_seed(job.of(name, seed)) for seed in job.study.seeds]
        records += [_student(job.of(name), seeds), *seeds]
    return [*records, _report(job)]


def plan_live(job: Job, made: dict[str, Any]) -> list[Record]:
    """Return the runs of a starting training: a student's parent and its own, or the teacher's without a student.

    made: the command, git, hardware and training entries of its future card.
    """
    if job.student is None:
        return [_begun_teacher(job, made)]
    begun = _begun_seed(job, made)
    return [_begun_student(job, begun.started), begun]


# --- the teacher


def _begun_teacher(job: Job, made: dict[str, Any]) -> Record:
    # Params of its samples: an official checkpoint depends on neither noise nor dataset.
    settings = job.of().depends_on("samples")
    taught = "The EDM teacher. `final/*/heun-*`: its samples;"
    what = taught if job.study.taught else "No teacher: the network of the students."
    alike = ", `calibration/*/teacher-heun-against-half`: the teacher at the same N" if job.study.taught else ""
    return Record(
        "teacher",
        "teacher",
        started=_times(made)[0],
        data=_data(job),
        params=_flat(settings["teacher"]) | _flat({name: settings[name] for name in ("noise", "dataset")}),
        tags=_origin(made),
        first={"mlflow.note.content": f"{what} `calibration/*/data-halves`: real against real{alike}."},
    )


def _teacher(job: Job) -> Record:
    card = read_card(job, "teacher")
    record = _begun_teacher(job, card)
    _finish(record, job, card)
    for row in csv.DictReader(read_lines(job.scores, "calibration")):
        # The teacher's scores stand beside the students'.
        own = row["sampler"] == HEUN
        name = f"heun-nfe{row['nfe']}" if own else f"{row['run']}-{row['sampler']}".replace(" ", "-")
        record.points += _measured(row, "final/" if own else "calibration/", name, record.ended, 0)
    return record


# --- a student


def _begun(job: Job, role: str, about: str, started: int, params: dict[str, str], tags: dict[str, str]) -> Record:
    """Return the run of one of a student's seeds, or of the mean over them, without results.

    The settings in which the study's students differ are tags too, and the first params, as a run's page shows them.
    """
    flat = {name: _flat(student.model_dump(mode="json")) for name, student in job.study.students.items()}
    own, name = flat[str(job.student)], str(job.student)
    # A section of another kind has other keys.
    keys = dict.fromkeys(key for settings in flat.values() for key in settings if key in own)
    differing = {key: own[key] for key in keys if any(other.get(key) != own[key] for other in flat.values())}
    colour = line_of(list(flat), name)["color"]
    return Record(
        job.label if role == "seed" else name,
        role,
        started=started,
        data=_data(job),
        params=differing | own | params,
        tags=tags | differing,
        first={"mlflow.note.content": f"Student `{name}`, {about}.", "mlflow.runColor": colour},
        parent=name if role == "seed" else None,
    )


def _begun_seed(job: Job, made: dict[str, Any]) -> Record:
    seed = {"seed": str(job.seed)}
    return _begun(job, "seed", f"seed {job.seed}", _times(made)[0], seed, _origin(made) | seed)


def _seed(job: Job) -> Record:
    card = read_card(job, "student")
    record = _begun_seed(job, card)
    record.params |= _scored_with(job)
    history = _finish(record, job, card)
    seconds = {line["step"]: line["seconds"] for line in history} | {0: 0.0}
    main = job.settings.ema_rate
    for row in csv.DictReader(read_lines(job.scores, f"scores{job.options}")):
        curve = row["kind"] == "curve"
        step = int(row["step"]) if curve else 0  # a single point at step 0 is drawn as a bar
        # MLflow's time axis shows training time.
        at = record.started + round(1000 * seconds[step]) if curve and step in seconds else record.ended
        record.points += _measured(row, "" if curve else "final/", _sampler(row, main), at, step)
    return record


def _begun_student(job: Job, started: int) -> Record:
    seeds = ", ".join(map(str, job.study.seeds))
    identity = digest_of([str(job.paths.root.resolve()), job.student, job.of(job.student).key("student")])
    return _begun(job, "student", f"means over seeds {seeds}", started, {"seeds": seeds}, {TRAINING: identity})


def _student(job: Job, seeds: list[Record]) -> Record:
    """Return the mean over the seeds, at the points that all of them have."""
    record = _begun_student(job, min(seed.started for seed in seeds))
    record.params |= _scored_with(job)
    record.ended = record.started + round(fmean(seed.ended - seed.started for seed in seeds))
    record.digest = digest_of([seed.digest for seed in seeds])
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


# --- the report


def _report(job: Job) -> Record:
    card, study, paths = read_card(job, "report"), job.study, job.paths
    started, ended = _times(card)
    files = [(paths.dataset / name, "dataset") for name in ("dataset.json", "card.json")]
    files += [(paths.report, ""), (paths.extractor / "card.json", "extractor")]
    files += [(paths.flows, "flows")] if study.flows else []
    files += [(paths.coefficients, "coefficients")] if study.needs_coefficients else []
    return Record(
        "report",
        "report",
        started=started,
        ended=ended,
        data=_data(job),
        params={},
        tags=_origin(card),
        first={"mlflow.note.content": "Under Artifacts: `report.html` with its figures and tables."},
        digest=digest_of([card["key"], card["outputs"]]),
        files=files,
    )


# --- parts of a run


def _finish(record: Record, job: Job, card: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the end, curves, cost and files of a finished training. Returns its history."""
    trained = job.card(card["stage"])
    lines = trained.with_name("history.jsonl")
    history, scores = read_history(lines, card["stage"] + job.options), read_card(job, "scores")
    record.digest = digest_of([card["key"], card["outputs"], scores["key"], scores["outputs"]])
    record.ended = _times(card)[1]
    cost = [Point(f"cost/{name}", float(value), record.ended, 0) for name, value in sorted(card["measured"].items())]
    record.points = history_points(history, record.started) + cost
    record.files = [(trained, ""), (lines, ""), (job.scores, ""), (job.card("samples"), "samples")]
    return history


def digest_of(content: Any) -> str:
    """Return the sha256 of plain data, whatever the order of its keys."""
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


def _times(card: dict[str, Any]) -> tuple[int, int]:
    """Return start and end of a stage, milliseconds since 1970. Interruptions of a training are left out. While it
    runs, both are its start."""
    duration = round(1000 * card.get("measured", {}).get("seconds", card.get("seconds", 0)))
    if card.get("training"):
        started: int = card["training"]["started"]
    else:
        started = round(1000 * datetime.fromisoformat(card["created"]).timestamp()) - duration
    return started, started + duration


def history_points(history: list[dict[str, Any]], started: int) -> list[Point]:
    """Return the curves of a training; started: milliseconds since 1970, from which the history counts seconds."""
    return [
        Point(f"training/{name}", float(value), started + round(1000 * line["seconds"]), line["step"])
        for line in history
        for name, value in line.items()
        if name not in ("step", "seconds")
    ]


def _sampler(row: dict[str, str], main: float) -> str:
    """Return nfe2 for the student's own sampler, gamma1-nfe2 for another, nfe2-ema0.9999 for a further EMA rate. Names
    in MLflow may not contain '='."""
    own = row["sampler"] in OWN_SAMPLERS
    rate = "" if float(row["ema"]) == main else f"-ema{row['ema']}"
    return ("" if own else re.sub(r"[^\w.-]", "", row["sampler"]) + "-") + f"nfe{row['nfe']}{rate}"


def _measured(row: dict[str, str], prefix: str, sampler: str, time: int, step: int) -> list[Point]:
    """Return the measured scores of a row as `<prefix>fd/<sampler>`."""
    return [Point(f"{prefix}{name}/{sampler}", float(row[name]), time, step) for name in MEASURES if row[name]]


def _scored_with(job: Job) -> dict[str, str]:
    """Return the settings of a student's samples and scores as params."""
    settings = job.depends_on("scores")
    return _flat({name: settings[name] for name in ("sampling", "scores")})


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to dotted names; values as YAML would show them."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) and value else json.dumps(value)
    return flat
