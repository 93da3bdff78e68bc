"""What of a study goes to MLflow, read from its results without MLflow: its runs, params, points, files."""

import csv
import hashlib
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from zipfile import BadZipFile

from consistency.errors import UserError
from consistency.files import read_json, sha256
from consistency.history import read_history
from consistency.layout import Layout
from consistency.lines import line_of
from consistency.provenance import read_card
from consistency.study import Study

MEASURES = ("fd", "kid", "alignment")
# The tags by which a live run is found again: by its training, by its student's settings.
TRAINING, STUDENT = "consistency.training", "consistency.student"

_TEACHER_NOTE = "The EDM teacher. `final/*/heun-*`: its samples; `calibration/*/data-halves`: real against real."
_NO_TEACHER_NOTE = "No teacher: the network of the students. `calibration/*/data-halves`: real against real."


class Point(NamedTuple):
    """A metric's value at a step; time in milliseconds since 1970."""

    key: str
    value: float
    time: int
    step: int


@dataclass(frozen=True)
class Data:
    """The dataset that a run used: its name, where its images lie, their sha256, how many, and [H, W, C] of each."""

    name: str
    path: str
    sha256: str
    count: int
    shape: list[int]


@dataclass
class Upload:
    """One run as it shall stand in MLflow. started, ended: milliseconds since 1970; files: path and artifact folder;
    texts: artifact path and content of what is no file of the results; color: that of its curves, if it has one."""

    name: str
    role: str
    data: Data
    started: int
    ended: int
    params: dict[str, str]
    tags: dict[str, str]
    note: str
    points: list[Point] = field(default_factory=list)
    files: list[tuple[Path, str]] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    parent: str | None = None
    color: str | None = None

    def __post_init__(self) -> None:
        """Values that are not finite cannot be drawn: they are left out, and a tag says which."""
        bad = [f"{point.key} at step {point.step}" for point in self.points if not math.isfinite(point.value)]
        self.points = [point for point in self.points if math.isfinite(point.value)]
        if bad:
            self.tags["not_finite"] = ", ".join(bad[:20]) + (f" and {len(bad) - 20} more" if len(bad) > 20 else "")

    @cached_property
    def digest(self) -> str:
        """What the run holds, in 16 hex digits: the same for the same results."""
        files = [(folder, path.name, sha256(path)) for path, folder in self.files]
        content = json.dumps([self.name, self.params, self.points, files, self.texts], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def plan(study: Study, layout: Layout) -> list[Upload]:
    """Every run of the study, a parent before its children. Raises UserError when results are missing or stale."""
    differing = _differing(study)
    uploads = [_teacher(study, layout)]
    for run in study.students:
        seeds = [_seed(study, layout, run, seed, differing) for seed in study.seeds]
        uploads += [_student(study, run, seeds, differing), *seeds]
    return [*uploads, _report(study, layout)]


def plan_live(study: Study, layout: Layout, run: str | None, seed: int | None, made: dict[str, Any]) -> list[Upload]:
    """The runs of a training that begins, without points: a student's parent and its own; the teacher's without a run.

    made: what its card will say of command, git, hardware and training.
    """
    started = made["training"]["started"]
    common: dict[str, Any] = {"data": _data(study, layout), "started": started, "ended": started}
    if run is None or seed is None:
        params = _teacher_params(study)
        return [Upload("teacher", "teacher", params=params, tags=_origin(made), note=_teacher_note(study), **common)]
    differing = _differing(study)
    own = _flat(study.students[run].model_dump(mode="json"))
    tags = _those(own, differing)
    note = f"Student `{run}`: the mean over its seeds comes with `track`."
    common["color"] = _color(study, run)
    parent = Upload(run, "student", params={}, tags=tags | {STUDENT: study.key("student", run)}, note=note, **common)
    child = Upload(
        f"{run} seed {seed}",
        "seed",
        params=_own_params(study, run, differing) | {"seed": str(seed)},
        tags=_origin(made) | tags | {"seed": str(seed)},
        note=_seed_note(run, seed),
        parent=run,
        **common,
    )
    return [parent, child]


def _teacher(study: Study, layout: Layout) -> Upload:
    card = read_card(layout.teacher, study, "teacher")
    table = layout.scores(None, None)
    history = read_history(layout.teacher / "history.jsonl", "teacher")
    started, ended = _training_time(card)
    points = history_points(history, started) + _cost(card, ended)
    for row in _rows(table, "calibration"):
        # The teacher's score stands beside the students'; real against real is what no sampler can beat.
        own = row["run"] == "teacher"
        name = f"heun-nfe{row['nfe']}" if own else f"{row['run']}-{row['sampler']}"
        points += _measured(row, "final/" if own else "calibration/", name, ended, 0)
    return Upload(
        name="teacher",
        role="teacher",
        data=_data(study, layout),
        started=started,
        ended=ended,
        params=_teacher_params(study),
        tags=_origin(card),
        note=_teacher_note(study),
        points=points,
        files=[
            *_files(layout.teacher, "card.json", "history.jsonl"),
            (table, ""),
            *_files(layout.samples(None, None), "card.json", to="samples"),
        ],
        texts=[_checkpoint(layout, layout.teacher / "teacher.safetensors", card)],
    )


def _teacher_note(study: Study) -> str:
    return _TEACHER_NOTE if study.taught else _NO_TEACHER_NOTE


def _teacher_params(study: Study) -> dict[str, str]:
    """Those of its samples: an official checkpoint depends on neither noise nor dataset."""
    settings = study.settings("samples")
    return _flat(settings["teacher"]) | _flat(settings["noise"], "noise.") | _flat(settings["dataset"], "dataset.")


def _seed(study: Study, layout: Layout, run: str, seed: int, differing: list[str]) -> Upload:
    folder, table = layout.student(run, seed), layout.scores(run, seed)
    verb = f"--run {run} --seed {seed}"
    card = read_card(folder, study, "student", run, seed)
    history = read_history(folder / "history.jsonl", f"student {verb}")
    started, ended = _training_time(card)
    seconds = {line["step"]: line["seconds"] for line in history} | {0: 0.0}
    points = history_points(history, started) + _cost(card, ended)
    main = study.students[run].ema_rate
    for row in _rows(table, f"scores {verb}"):
        if row["kind"] == "curve":
            step = int(row["step"])
            # At the training time of the snapshot, so that the page's time axis is training time.
            at = started + round(1000 * seconds[step]) if step in seconds else ended
            points += _measured(row, "", _sampler(row, main), at, step)
        else:
            # A value without a curve stands at step 0: MLflow then draws bars, one a run.
            points += _measured(row, "final/", _sampler(row, main), ended, 0)
    return Upload(
        name=f"{run} seed {seed}",
        role="seed",
        data=_data(study, layout),
        started=started,
        ended=ended,
        params=_student_params(study, run, differing) | {"seed": str(seed)},
        tags=_origin(card) | _student_tags(study, run, differing, seed) | {"seed": str(seed)},
        note=_seed_note(run, seed),
        points=points,
        files=[
            *_files(folder, "card.json", "history.jsonl"),
            (table, ""),
            *_files(layout.samples(run, seed), "card.json", to="samples"),
        ],
        texts=[_checkpoint(layout, layout.student_file(run, seed), card)],
        parent=run,
        color=_color(study, run),
    )


def _seed_note(run: str, seed: int) -> str:
    return f"Student `{run}`, seed {seed}."


def _student(study: Study, run: str, seeds: list[Upload], differing: list[str]) -> Upload:
    """The mean over the seeds, at the points that all of them have."""
    started = min(upload.started for upload in seeds)
    values: dict[tuple[str, int], list[Point]] = defaultdict(list)
    for upload in seeds:
        for point in upload.points:
            values[point.key, point.step].append(point._replace(time=point.time - upload.started))
    points = [
        Point(key, fmean(p.value for p in found), started + round(fmean(p.time for p in found)), step)
        for (key, step), found in values.items()
        if len(found) == len(seeds)
    ]
    names = ", ".join(str(seed) for seed in study.seeds)
    return Upload(
        name=run,
        role="student",
        data=seeds[0].data,
        started=started,
        ended=started + round(fmean(upload.ended - upload.started for upload in seeds)),
        params=_student_params(study, run, differing) | {"seeds": names},
        tags=_in_all([upload.tags for upload in seeds])
        | _student_tags(study, run, differing)
        | {STUDENT: study.key("student", run)},
        note=f"Student `{run}`: means over seeds {names}.\n\n{_final_table(values)}",
        points=points,
        color=_color(study, run),
    )


def _report(study: Study, layout: Layout) -> Upload:
    card = read_card(layout.report, study, "report")
    settings, ended, fitted = study.settings("report"), _milliseconds(card), study.needs_coefficients
    params: dict[str, str] = {}
    for part in ("dataset", "noise", "coefficients", "sampling", "calibration", "scores", "report"):
        params |= _flat(settings[part], f"{part}.")
    return Upload(
        name="report",
        role="report",
        data=_data(study, layout),
        started=ended - round(1000 * card["seconds"]),
        ended=ended,
        params=params,
        tags=_origin(card),
        note="Under Artifacts: `report.html` with its figures and tables, and the fitted coefficients.",
        files=_tree(layout.report)
        + _files(layout.dataset, "dataset.json", "card.json", to="dataset")
        + _files(layout.extractor, "card.json", to="extractor")
        + [(path, "flows") for path, _ in (_tree(layout.flows) if study.flows else [])]
        + (_files(layout.coefficients, "coefficients.npz", "card.json", to="coefficients") if fitted else []),
        texts=_coefficient_table(layout) if fitted else [],
    )


def _checkpoint(layout: Layout, path: Path, card: dict[str, Any]) -> tuple[str, str]:
    """What and where the final checkpoint is, as JSON: MLflow keeps no copy of it."""
    reference = {
        "file": path.name,
        "path": path.relative_to(layout.results).as_posix(),
        "sha256": card["outputs"][path.name],
        "bytes": path.stat().st_size if path.exists() else None,
    }
    return "checkpoint.json", json.dumps(reference, indent=2) + "\n"


def _coefficient_table(layout: Layout) -> list[tuple[str, str]]:
    """The fitted coefficients as CSV: one line a time."""
    import numpy as np

    path = layout.coefficients / "coefficients.npz"
    try:
        with np.load(path) as arrays:
            columns = {name: arrays[name].tolist() for name in arrays if arrays[name].ndim == 1}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): run `python -m consistency coefficients` again") from None
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    return [("coefficients/coefficients.csv", "\n".join(lines) + "\n")]


def _color(study: Study, run: str) -> str:
    """That of the report's figures."""
    return line_of(list(study.students), run)["color"]


def _differing(study: Study) -> list[str]:
    """The keys in which the study's students differ."""
    own = [_flat(student.model_dump(mode="json")) for student in study.students.values()]
    keys = dict.fromkeys(key for flat in own for key in flat)
    return [key for key in keys if any(flat.get(key) != own[0].get(key) for flat in own)]


def _those(own: dict[str, str], differing: list[str]) -> dict[str, str]:
    """Those of the keys that a student has: a section of another kind has others."""
    return {key: own[key] for key in differing if key in own}


def _own_params(study: Study, run: str, differing: list[str]) -> dict[str, str]:
    """The student's keys, those that differ first: a run's page shows them in this order."""
    own = _flat(study.students[run].model_dump(mode="json"))
    return _those(own, differing) | own


def _student_params(study: Study, run: str, differing: list[str]) -> dict[str, str]:
    """The student's keys, then how it was sampled and scored."""
    settings = study.settings("scores", run)
    measured = _flat(settings["sampling"], "sampling.") | _flat(settings["scores"], "scores.")
    return _own_params(study, run, differing) | measured


def _student_tags(study: Study, run: str, differing: list[str], seed: int | None = None) -> dict[str, str]:
    own = _flat(study.students[run].model_dump(mode="json"))
    return _those(own, differing) | {"consistency.key": study.key("scores", run, seed)}


def _in_all(tags: list[dict[str, str]]) -> dict[str, str]:
    """The tags that all have with the same value, but for those of one training."""
    common = {name: value for name, value in tags[0].items() if all(other.get(name) == value for other in tags)}
    return {name: value for name, value in common.items() if name not in (TRAINING, "seed")}


def _origin(card: dict[str, Any]) -> dict[str, str]:
    """Tags of where, from which commit, by which command and in which training an artifact was made."""
    git, hardware = card["git"], card["hardware"]
    training = card.get("training") or {}
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": card["command"],
        "mlflow.source.git.commit": git["commit"],
        "git_commit": git["commit"],
        "git_dirty": None if git["dirty"] is None else str(git["dirty"]).lower(),
        "host": hardware["host"],
        "gpus": ", ".join(hardware["gpus"]),
        "slurm_job": hardware["slurm_job"],
        "consistency.card": card.get("key"),
        TRAINING: training.get("id"),
    }
    return {name: value for name, value in tags.items() if value}


def _data(study: Study, layout: Layout) -> Data:
    facts = read_json(layout.dataset / "dataset.json", "dataset")
    shape = [facts["resolution"], facts["resolution"], facts["channels"]]
    images = str((layout.dataset / "images.npy").resolve())
    return Data(study.dataset.path or study.dataset.kind, images, facts["sha256"], facts["count"], shape)


def _milliseconds(card: dict[str, Any]) -> int:
    """When a stage ended."""
    return round(1000 * datetime.fromisoformat(card["created"]).timestamp())


def _training_time(card: dict[str, Any]) -> tuple[int, int]:
    """Start and end of a training as if it had not been interrupted; of a teacher that was only converted, of that."""
    seconds = round(1000 * card["measured"].get("seconds", card["seconds"]))
    if card.get("training"):
        return card["training"]["started"], card["training"]["started"] + seconds
    ended = _milliseconds(card)
    return ended - seconds, ended


def _cost(card: dict[str, Any], ended: int) -> list[Point]:
    return [Point(f"cost/{name}", float(value), ended, 0) for name, value in sorted(card["measured"].items())]


def history_points(history: list[dict[str, Any]], started: int) -> list[Point]:
    """The curves of a training; the seconds are their time, counted from its start (milliseconds since 1970)."""
    return [
        Point(f"training/{name}", float(value), started + round(1000 * line["seconds"]), line["step"])
        for line in history
        for name, value in line.items()
        if name not in ("step", "seconds")
    ]


def _rows(path: Path, made_by: str) -> list[dict[str, str]]:
    return list(csv.DictReader(_text(path, made_by).splitlines()))


def _text(path: Path, made_by: str) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): run `python -m consistency {made_by}` first") from None


def _sampler(row: dict[str, str], main: float) -> str:
    """nfe2 for the student's own sampler, gamma1-nfe2 for another, nfe2-ema0.9999 for an EMA rate that is not the main
    one; MLflow's names may not hold an '='."""
    own = row["sampler"] in ("jumps", "multistep")
    rate = "" if float(row["ema"]) == main else f"-ema{row['ema']}"
    return ("" if own else re.sub(r"[^\w.-]", "", row["sampler"]) + "-") + f"nfe{row['nfe']}{rate}"


def _measured(row: dict[str, str], prefix: str, sampler: str, time: int, step: int) -> list[Point]:
    """The scores of a row, as `<prefix>fd/<sampler>`; an empty cell was not measured."""
    return [Point(f"{prefix}{name}/{sampler}", float(row[name]), time, step) for name in MEASURES if row[name]]


def _final_table(values: dict[tuple[str, int], list[Point]]) -> str:
    """The final scores as Markdown: mean, and the range over the seeds."""
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for (key, _), points in values.items():
        if key.startswith("final/"):
            _, measure, sampler = key.split("/")
            numbers = [point.value for point in points]
            spread = f" ({min(numbers):.4g} to {max(numbers):.4g})" if len(numbers) > 1 else ""
            cells[sampler][measure] = f"{fmean(numbers):.4g}{spread}"
    lines = [f"| {sampler} | " + " | ".join(row.get(name, "") for name in MEASURES) for sampler, row in cells.items()]
    return "\n".join(["| final | " + " | ".join(MEASURES), "|---" * (1 + len(MEASURES)), *lines])


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names; values as YAML would show them."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) and value else json.dumps(value)
    return flat


def _files(folder: Path, *names: str, to: str = "") -> list[tuple[Path, str]]:
    """Those of the named files that are there, and the artifact folder they go to."""
    return [(folder / name, to) for name in names if (folder / name).is_file()]


def _tree(folder: Path) -> list[tuple[Path, str]]:
    """All files below a folder but hidden ones, each to the artifact folder of the same name."""
    inside = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [(path, path.parent.relative_to(folder).as_posix().removeprefix(".")) for path in inside]
