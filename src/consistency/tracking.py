"""A finished study as runs in MLflow, for browsing. history.jsonl and the score tables stay the truth.

One experiment a study: a run `teacher`, one run a student (the mean over its seeds) with a nested run a seed, and a
run `report`. What is uploaded is first written down without MLflow (`plan`); a digest of it names the run, so the
same results are uploaded once, however often and from wherever this runs.
"""

import fcntl
import getpass
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from consistency.errors import UserError
from consistency.files import write_json
from consistency.layout import Layout
from consistency.progress import Progress
from consistency.study import Study
from consistency.tracking_plan import Upload, plan

BATCH = 900  # metrics a call; MLflow takes 1000 entities
LOCK_PATIENCE = 600.0  # seconds to wait for another upload into the same place

# Nothing phones home, no address (it may hold a password) is printed, an absent server is given up in about a minute.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


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
    progress = Progress(label, sum(_pieces(upload) for upload in uploads))
    for upload in uploads:
        tags = upload.tags | common | {"role": upload.role, "state": "current"}
        if upload.parent is not None:
            tags["mlflow.parentRunId"] = ids[upload.parent]
        run = known.get(upload.digest) or _create(client, experiment, upload, tags)
        ids[upload.name] = run.info.run_id
        _retag(client, run, upload.name, tags)
        if _is_finished(run):
            progress.advance(_pieces(upload))
        else:
            _fill(client, run, upload, progress)
            new += 1
    _supersede(client, found, set(ids.values()), common["consistency.folder"])
    progress.close()
    return ids, new


def _pieces(upload: Upload) -> int:
    """Calls that an upload takes, for the progress."""
    return 1 + len(upload.files) + math.ceil(len(upload.points) / BATCH)


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
