"""A finished study as runs in MLflow, for browsing. history.jsonl and the score tables stay the truth.

One experiment a study: a run `teacher`, one run a student (the mean over its seeds) with a nested run a seed, and a
run `report`. What is uploaded is first written down without MLflow (`plan`); a digest of it names the run, so the
same results are uploaded once, however often and from wherever this runs.
"""

import csv
import fcntl
import getpass
import hashlib
import json
import logging
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from urllib.parse import unquote

from consistency.errors import UserError
from consistency.files import read_json, sha256, write_json
from consistency.layout import Layout
from consistency.progress import Progress
from consistency.provenance import read_card
from consistency.study import Study

MEASURES = ("fd", "kid", "alignment")
BATCH = 900  # metrics a call; MLflow takes 1000 entities
LOCK_PATIENCE = 600.0  # seconds to wait for another upload into the same place

# Nothing phones home, no address (it may hold a password) is printed, an absent server is given up in about a minute.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class Point(NamedTuple):
    """A metric's value at a step; time in milliseconds since 1970."""

    key: str
    value: float
    time: int
    step: int


class Data(NamedTuple):
    """The dataset that a run used: its name, and the digest of its images."""

    name: str
    digest: str


@dataclass
class Upload:
    """One run as it shall stand in MLflow. started, ended: milliseconds since 1970; files: path and artifact folder."""

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
    parent: str | None = None

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
        content = json.dumps([self.name, self.params, self.points, files], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def pieces(self) -> int:
        """Calls that its upload takes, for the progress."""
        return 1 + len(self.files) + math.ceil(len(self.points) / BATCH)


def track_study(study: Study, layout: Layout) -> None:
    """Upload the finished study to MLFLOW_TRACKING_URI (default: mlflow.db here) and write tracked.json.

    Run again it uploads only what is new, and completes what was interrupted; runs of older results are kept and
    marked superseded. Raises UserError when results are missing or stale, or the server cannot be used.
    """
    uploads = plan(study, layout)
    uri = tracking_uri()
    with _one_at_a_time(_lock_file(uri, layout)), _readable_errors(uri):
        client = _client(uri)
        experiment = _experiment(client, study, uri)
        common = {"consistency.study": study.key("report"), "consistency.folder": str(layout.root.resolve())}
        runs, new = _send(client, experiment, uploads, common, f"track {study.name}")
    clean = without_credentials(uri)
    # Without the last word MLflow 3 opens its page for language models.
    page = f"/#/experiments/{experiment}/runs?workflowType=machine_learning"
    hint = clean.rstrip("/") + page if clean.startswith("http") else f"`make ui`, then http://127.0.0.1:5000{page}"
    content = {"tracking_uri": clean, "experiment": study.name, "experiment_id": experiment}
    write_json(layout.track / "tracked.json", content | {"runs": runs, "url_hint": hint})
    done = f"{new} of {len(runs)} runs uploaded" if new else f"all {len(runs)} runs were there already"
    print(f"track {study.name}: {done}; see {hint}", flush=True)


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or mlflow.db in the working directory; a SQLite path is made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    if not uri.startswith("sqlite:"):
        return uri
    path = uri.removeprefix("sqlite:///")
    if path in ("", uri, ":memory:"):
        raise UserError(f"MLFLOW_TRACKING_URI {uri} names no file: write sqlite:///mlflow.db")
    return f"sqlite:///{Path.cwd() / path}"


def without_credentials(uri: str) -> str:
    """The URI without user, password and query."""
    return uri if uri.startswith("sqlite:") else re.sub(r"://.*@", "://", uri).partition("?")[0]


# What is uploaded: read from the results, without MLflow.


def plan(study: Study, layout: Layout) -> list[Upload]:
    """Every run of the study, a parent before its children. Raises UserError when results are missing or stale."""
    differing = _differing(study)
    uploads = [_teacher(study, layout)]
    for run in study.students:
        seeds = [_seed(study, layout, run, seed, differing) for seed in study.seeds]
        uploads += [_student(study, run, seeds, differing), *seeds]
    return [*uploads, _report(study, layout)]


def _teacher(study: Study, layout: Layout) -> Upload:
    card = read_card(layout.teacher, study, "teacher")
    table = layout.scores(None, None)
    history = _history(layout.teacher / "history.jsonl", "teacher")
    started, ended = _training_time(card)
    points = _history_points(history, started) + _cost(card, ended)
    for row in _rows(table, "calibration"):
        # The teacher's score stands beside the students'; real against real is what no sampler can beat.
        own = row["run"] == "teacher"
        name = f"heun-nfe{row['nfe']}" if own else f"{row['run']}-{row['sampler']}"
        points += _measured(row, "final/" if own else "calibration/", name, ended, 0)
    settings = study.settings("teacher")
    return Upload(
        name="teacher",
        role="teacher",
        data=_data(study, layout),
        started=started,
        ended=ended,
        params=_flat(settings["teacher"]) | _flat(settings["noise"], "noise.") | _flat(settings["dataset"], "dataset."),
        tags=_origin(card),
        note="The EDM teacher. `final/*/heun-*`: its samples; `calibration/*/data-halves`: real against real.",
        points=points,
        files=[
            *_files(layout.teacher, "card.json", "history.jsonl"),
            (table, ""),
            *_files(layout.samples(None, None), "card.json", to="samples"),
        ],
    )


def _seed(study: Study, layout: Layout, run: str, seed: int, differing: list[str]) -> Upload:
    folder, table = layout.student(run, seed), layout.scores(run, seed)
    verb = f"--run {run} --seed {seed}"
    card = read_card(folder, study, "student", run, seed)
    history = _history(folder / "history.jsonl", f"student {verb}")
    started, ended = _training_time(card)
    seconds = {line["step"]: line["seconds"] for line in history} | {0: 0.0}
    points = _history_points(history, started) + _cost(card, ended)
    for row in _rows(table, f"scores {verb}"):
        if row["kind"] == "curve":
            step = int(row["step"])
            # At the training time of the snapshot, so that the page's time axis is training time.
            at = started + round(1000 * seconds[step]) if step in seconds else ended
            points += _measured(row, "", _sampler(row), at, step)
        else:
            # A value without a curve stands at step 0: MLflow then draws bars, one a run.
            points += _measured(row, "final/", _sampler(row), ended, 0)
    return Upload(
        name=f"{run} seed {seed}",
        role="seed",
        data=_data(study, layout),
        started=started,
        ended=ended,
        params=_student_params(study, run, differing) | {"seed": str(seed)},
        tags=_origin(card) | _student_tags(study, run, differing, seed) | {"seed": str(seed)},
        note=f"Student `{run}`, seed {seed}.",
        points=points,
        files=[
            *_files(folder, "card.json", "history.jsonl"),
            (table, ""),
            *_files(layout.samples(run, seed), "card.json", to="samples"),
        ],
        parent=run,
    )


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
        tags=_in_all([upload.tags for upload in seeds]) | _student_tags(study, run, differing),
        note=f"Student `{run}`: means over seeds {names}.\n\n{_final_table(values)}",
        points=points,
    )


def _report(study: Study, layout: Layout) -> Upload:
    card = read_card(layout.report, study, "report")
    settings, ended = study.settings("report"), _milliseconds(card)
    params: dict[str, str] = {}
    for part in ("dataset", "noise", "coefficients", "sampling", "scores", "report"):
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
        + _files(layout.coefficients, "coefficients.npz", "card.json", to="coefficients"),
    )


def _differing(study: Study) -> list[str]:
    """The keys in which the study's students differ."""
    dumps = [study.resolved(run).model_dump(mode="json") for run in study.students]
    return [key for key in dumps[0] if any(dump[key] != dumps[0][key] for dump in dumps)]


def _student_params(study: Study, run: str, differing: list[str]) -> dict[str, str]:
    """The student's keys, those that differ first, then how it was sampled and scored."""
    own = _flat(study.resolved(run).model_dump(mode="json"))
    settings = study.settings("scores", run)
    measured = _flat(settings["sampling"], "sampling.") | _flat(settings["scores"], "scores.")
    return {key: own[key] for key in differing} | own | measured


def _student_tags(study: Study, run: str, differing: list[str], seed: int | None = None) -> dict[str, str]:
    own = _flat(study.resolved(run).model_dump(mode="json"))
    return {key: own[key] for key in differing} | {"consistency.key": study.key("scores", run, seed)}


def _in_all(tags: list[dict[str, str]]) -> dict[str, str]:
    """The tags that all have with the same value."""
    return {name: value for name, value in tags[0].items() if all(other.get(name) == value for other in tags)}


def _origin(card: dict[str, Any]) -> dict[str, str]:
    """Tags of where, from which commit and by which command an artifact was made."""
    git, hardware = card["git"], card["hardware"]
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": card["command"],
        "mlflow.source.git.commit": git["commit"],
        "git.dirty": None if git["dirty"] is None else str(git["dirty"]).lower(),
        "host": hardware["host"],
        "gpus": ", ".join(hardware["gpus"]),
        "slurm_job": hardware["slurm_job"],
        "consistency.card": card["key"],
    }
    return {name: value for name, value in tags.items() if value}


def _data(study: Study, layout: Layout) -> Data:
    facts = read_json(layout.dataset / "dataset.json", "dataset")
    return Data(study.dataset.path or study.dataset.kind, facts["sha256"][:16])


def _milliseconds(card: dict[str, Any]) -> int:
    """When a stage ended."""
    return round(1000 * datetime.fromisoformat(card["created"]).timestamp())


def _training_time(card: dict[str, Any]) -> tuple[int, int]:
    """Start and end of a training as if it had not been interrupted."""
    ended = _milliseconds(card)
    return ended - round(1000 * card["measured"]["seconds"]), ended


def _cost(card: dict[str, Any], ended: int) -> list[Point]:
    return [Point(f"cost/{name}", float(value), ended, 0) for name, value in sorted(card["measured"].items())]


def _history(path: Path, made_by: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in _text(path, made_by).splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run `{made_by}` again") from None


def _history_points(history: list[dict[str, Any]], started: int) -> list[Point]:
    """The curves of a training; the seconds are their time."""
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


def _sampler(row: dict[str, str]) -> str:
    """nfe2 for the student's own sampler, gamma1-nfe2 for another; MLflow's names may not hold an '='."""
    own = row["sampler"] in ("jumps", "multistep")
    return ("" if own else re.sub(r"[^\w.-]", "", row["sampler"]) + "-") + f"nfe{row['nfe']}"


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


# How it is uploaded.


def _client(uri: str) -> Any:
    """An MlflowClient that is quiet about itself; it makes the schema of a fresh database."""
    os.environ.update(_ENVIRONMENT)
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.telemetry import set_telemetry_client

    set_telemetry_client()  # ends it where mlflow had been imported before
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:"):
        _sqlite_file(uri).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(uri)


def _experiment(client: Any, study: Study, uri: str) -> str:
    """The id of the study's experiment, made if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(study.name)
    if found is None:
        tags = {"mlflow.note.content": study.title or study.name, "mlflow.experimentKind": "custom_model_development"}
        try:
            return client.create_experiment(study.name, _artifact_location(study, uri), tags)
        except MlflowException:
            # Another process may have made it since.
            found = client.get_experiment_by_name(study.name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {study.name!r} was deleted: bring it back with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`, and run track again"
        )
    return found.experiment_id


def _artifact_location(study: Study, uri: str) -> str | None:
    """mlruns beside the database, absolute; a server knows its own."""
    if uri.startswith("http"):
        return None
    folder = _sqlite_file(uri).parent if uri.startswith("sqlite:") else Path.cwd()
    return (folder / "mlruns" / study.name).as_uri()


def _send(
    client: Any, experiment: str, uploads: list[Upload], common: dict[str, str], label: str
) -> tuple[dict[str, str], int]:
    """Bring the experiment to what was planned. Returns the id of each run, and how many were uploaded."""
    found = _runs(client, experiment)
    # A finished run comes after an unfinished one of the same content, and so is the one that is taken.
    known = {run.data.tags.get("consistency.digest"): run for run in sorted(found, key=_is_finished)}
    ids: dict[str, str] = {}
    new = 0
    progress = Progress(label, sum(upload.pieces for upload in uploads))
    for upload in uploads:
        tags = upload.tags | common | {"role": upload.role, "state": "current"}
        if upload.parent is not None:
            tags["mlflow.parentRunId"] = ids[upload.parent]
        run = known.get(upload.digest) or _create(client, experiment, upload, tags)
        ids[upload.name] = run.info.run_id
        _retag(client, run, upload.name, tags)
        if _is_finished(run):
            progress.advance(upload.pieces)
        else:
            _fill(client, run, upload, progress)
            new += 1
    _supersede(client, found, set(ids.values()), common["consistency.folder"])
    progress.close()
    return ids, new


def _runs(client: Any, experiment: str) -> list[Any]:
    """All runs of the experiment that nobody deleted."""
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        runs, token = runs + list(page), page.token
        if not token:
            return runs


def _is_finished(run: Any) -> bool:
    return run.info.status == "FINISHED"


def _create(client: Any, experiment: str, upload: Upload, tags: dict[str, str]) -> Any:
    """The digest is there from the start: what is left of a killed upload is found by it. A person may edit the
    note and the name, so they are written only here."""
    first = {"consistency.digest": upload.digest, "mlflow.note.content": upload.note, "mlflow.user": _user()}
    return client.create_run(experiment, upload.started, tags | first, upload.name)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _retag(client: Any, run: Any, name: str, tags: dict[str, str]) -> None:
    """Set the tags that are not as they should be; a run that is current again gets its name back."""
    from mlflow.entities import RunTag

    old = run.data.tags
    if old.get("state") == "superseded":
        tags = tags | {"mlflow.runName": name}
    changed = [RunTag(key, value) for key, value in tags.items() if old.get(key) != value]
    if changed:
        client.log_batch(run.info.run_id, tags=changed)


def _fill(client: Any, run: Any, upload: Upload, progress: Progress) -> None:
    """Upload what a run lacks, and finish it. Nothing is there twice, whatever a killed upload had left."""
    from mlflow.entities import Dataset, DatasetInput, Metric, Param

    run_id = run.info.run_id
    there = {(m.key, m.step) for key in run.data.metrics for m in client.get_metric_history(run_id, key)}
    params = [Param(key, value) for key, value in upload.params.items()]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])
    data = Dataset(upload.data.name, upload.data.digest, "local", json.dumps({"uri": upload.data.name}))
    client.log_inputs(run_id, datasets=[DatasetInput(data)])
    progress.advance()
    for start in range(0, len(upload.points), BATCH):
        batch = upload.points[start : start + BATCH]
        client.log_batch(run_id, metrics=[Metric(*point) for point in batch if (point.key, point.step) not in there])
        progress.advance()
    for path, folder in upload.files:
        client.log_artifact(run_id, str(path), folder or None)
        progress.advance()
    client.set_terminated(run_id, "FINISHED", upload.ended)


def _supersede(client: Any, found: list[Any], current: set[str], folder: str) -> None:
    """Mark this folder's runs of older results: they are a person's, so they are kept."""
    from mlflow.entities import RunTag

    for run in found:
        tags = run.data.tags
        if tags.get("consistency.folder") != folder or run.info.run_id in current:
            continue
        if tags.get("state") != "superseded":
            name = RunTag("mlflow.runName", f"{run.info.run_name} (superseded)")
            client.log_batch(run.info.run_id, tags=[RunTag("state", "superseded"), name])
        if run.info.status == "RUNNING":  # its upload was killed
            client.set_terminated(run.info.run_id, "KILLED")


def _sqlite_file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def _lock_file(uri: str, layout: Layout) -> Path:
    """Beside a SQLite file, since two processes must not make its schema at once; else beside tracked.json."""
    database = _sqlite_file(uri)
    return database.with_name(f"{database.name}-lock") if uri.startswith("sqlite:") else layout.track / ".lock"


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the lock. Raises UserError if another upload holds it for too long, or it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; mend that or set MLFLOW_TRACKING_URI") from None
    with file:
        deadline, told = time.monotonic() + LOCK_PATIENCE, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    print(f"track: another upload holds {path}; waiting", flush=True)
                    told = True
                if time.monotonic() > deadline:
                    raise UserError(f"another upload has held {path} for {LOCK_PATIENCE:g} s: stop it") from None
                time.sleep(0.1)
        yield


@contextmanager
def _readable_errors(uri: str) -> Iterator[None]:
    """One line for whatever MLflow, its database or the network raises, without the URI's password."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_mlflows(error):
            raise
        reason = _without_secrets(" ".join(str(error).split()) or type(error).__name__, uri)
        down = re.search(r"Connection|Max retries|timed out|resolve", reason)
        advice = "start it, or set MLFLOW_TRACKING_URI to another" if down else "set that right"
        raise UserError(
            f"the tracking server {without_credentials(uri)} {'does not answer' if down else 'cannot be used'}: "
            f"{advice}. The results are safe: run track again afterwards ({reason[:400]})"
        ) from None


def _is_mlflows(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | RequestException | SQLAlchemyError | OSError | ImportError)


def _without_secrets(text: str, uri: str) -> str:
    """The text without what stands between '://' and '@' in the URI, and without its query."""
    clean = without_credentials(uri)
    secrets = [uri.partition("?")[2]] if not uri.startswith("sqlite:") else []
    if "@" in uri and clean != uri:
        login = uri.partition("://")[2].rpartition("@")[0]
        password = login.partition(":")[2]
        secrets += [f"{login}@", password, unquote(password)]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text
