"""Access to MLflow: address, client, experiment, runs, one upload at a time, readable errors."""

import errno
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from consistency.base import urls
from consistency.base.errors import UserError, command_of, user_error
from consistency.base.locks import held
from consistency.base.urls import masked
from consistency.config.job import Job
from consistency.tracking.records import Point, Record

BATCH = 1000  # metrics that MLflow takes in a call
# Tags: digest of a run's content, folder of its results, and state: live (not tracked yet), current or superseded.
DIGEST, FOLDER, STATE = "consistency.digest", "consistency.folder", "state"

_DATABASES = ("postgresql", "mysql", "mssql")
# Columns of MLflow's database that name files and folders of the project.
_PLACES = {"experiments": "artifact_location", "runs": "artifact_uri", "tags": "value"}

# No telemetry, no printed address, which may hold a password, and short timeouts for an absent server.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "PGCONNECT_TIMEOUT": "10",
}


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or mlflow.db in the working directory; a SQLite path is made absolute. Raises
    UserError if it is the address of no server and no database."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    if uri.startswith(("http://", "https://", *_DATABASES)):
        return uri
    if not uri.startswith("sqlite:"):
        raise UserError(
            f"MLFLOW_TRACKING_URI {masked(uri)} is neither a server nor a database: "
            "use http://HOST:5000, postgresql://... or sqlite:///mlflow.db"
        )
    path = uri.removeprefix("sqlite:///")
    if path in ("", uri, ":memory:"):
        raise UserError(f"MLFLOW_TRACKING_URI {masked(uri)} names no file: use sqlite:///mlflow.db")
    if (full := os.path.expanduser(path)) != path:
        raise UserError(f"MLFLOW_TRACKING_URI {masked(uri)} would make a folder named ~: use sqlite:///{masked(full)}")
    return f"sqlite:///{Path.cwd() / path}"


def without_secrets(text: str, uri: str) -> str:
    """Return a text without the URI's secrets, and without the password and token that MLflow reads from the
    environment."""
    own = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("PASSWORD", "TOKEN"))
    return urls.without_secrets(text, uri, secrets=tuple(own))


def be_quiet() -> None:
    """Set MLflow's variables, unless the environment does. Call it before MLflow is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(uri: str) -> Any:
    """Return a silent MlflowClient; it creates the schema of a new database."""
    be_quiet()
    from mlflow import MlflowClient
    from mlflow.telemetry import set_telemetry_client

    set_telemetry_client()  # ends telemetry if mlflow was imported before
    for name in ("mlflow", "alembic", "urllib3"):  # errors come as exceptions
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if uri.startswith("sqlite:"):
        _make_database(sqlite_file(uri))
    elif uri.startswith(_DATABASES):
        # Fail at once if the database does not answer: MLflow would try for two minutes.
        from sqlalchemy import create_engine
        from sqlalchemy.pool import NullPool

        create_engine(uri, poolclass=NullPool).connect().close()
    return MlflowClient(uri)


def _make_database(path: Path) -> None:
    """Create a SQLite file with MLflow's schema, unless it exists. A process may end within the seconds that this
    takes, and MLflow cannot go on with half of a schema: the file gets its name when it is whole."""
    from mlflow import MlflowClient

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}-new")
    new.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{new}")
    new.replace(path)


def open_experiment(client: Any, name: str, title: str) -> str:
    """Return the id of a study's experiment, created if there is none. Raises UserError if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        made = str(client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"}))
        links = f"[Compare the students]({charts(made)}), [while they train]({charts(made, live=True)})"
        client.set_experiment_tag(made, "mlflow.note.content", f"{title or name}. {links}.")
        return made
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {name!r} was deleted: restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` and run {command_of('track')}"
        )
    return str(found.experiment_id)


def charts(experiment: str, live: bool = False) -> str:
    """Return the address, relative to the server's, of the page that compares the students' curves; live: the curves of
    seeds in training. Without workflowType MLflow 3 opens its page for language models."""
    shown = "tags.role = 'seed' AND tags.state = 'live'" if live else "tags.role = 'student' AND tags.state = 'current'"
    page = "workflowType=machine_learning&compareRunsMode=CHART"
    return f"#/experiments/{experiment}/runs?{page}&searchFilter={quote(shown)}"


# --- runs


def find_runs(client: Any, experiment: str, **tags: str) -> list[Any]:
    """Return the undeleted runs of an experiment, newest first; with tags, only runs that carry them."""
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return list(client.search_runs([experiment], wanted, max_results=50_000))  # MLflow's limit


def tags_of(record: Record, job: Job, parent: str | None, state: str) -> dict[str, str]:
    """Return all tags of a run of the study. parent: the id of the run that contains it."""
    place = {FOLDER: str(job.paths.root.resolve()), STATE: state, "role": record.role, "study_hash": job.key("report")}
    return record.tags | place | ({"mlflow.parentRunId": parent} if parent else {})


def create_run(client: Any, experiment: str, record: Record, tags: dict[str, str]) -> Any:
    """Create a run with its name and tags. Tags that a person may change are written only here."""
    first = record.first | {"mlflow.user": os.environ.get("USER", "unknown")}
    return client.create_run(experiment, record.started, tags | first, record.name)


def set_tags(client: Any, run: Any, tags: dict[str, str]) -> None:
    """Set the tags that differ."""
    for name, value in tags.items():
        if run.data.tags.get(name) != value:
            client.set_tag(run.info.run_id, name, value)


def describe(client: Any, run: Any, record: Record) -> None:
    """Add a run's dataset and its missing params, in order; MLflow never changes a param."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    run_id = run.info.run_id
    params = [Param(key, value) for key, value in record.params.items() if key not in run.data.params]
    for start in range(0, len(params), 100):  # MLflow's limit for a request
        client.log_batch(run_id, params=params[start : start + 100])
    client.log_inputs(run_id, [DatasetInput(Dataset(**record.data), [InputTag("mlflow.data.context", "training")])])


def points_there(client: Any, run: Any) -> set[tuple[str, int]]:
    """Return the (metric, step) pairs of a run. A resumed training repeats steps at other times."""
    keys = [key for key in run.data.metrics if not key.startswith("system/")]
    return {(m.key, m.step) for key in keys for m in client.get_metric_history(run.info.run_id, key)}


def send_points(client: Any, run_id: str, points: Iterable[Point], there: set[tuple[str, int]]) -> None:
    """Send the missing points. Values that are not finite cannot be drawn; only the files hold them."""
    from mlflow.entities import Metric

    new = [Metric(*p) for p in points if (p.key, p.step) not in there and math.isfinite(p.value)]
    for start in range(0, len(new), BATCH):
        client.log_batch(run_id, metrics=new[start : start + BATCH])


# --- sessions


def sqlite_file(uri: str) -> Path:
    """Return the file of a SQLite address."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def _follow_project(client: Any, experiment: str, uri: str) -> None:
    """Rename the places in a database that was moved or copied with its project; MLflow keeps them absolute and would
    write into the old folder. A project elsewhere that records into this one's database keeps its own."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    here, database = Path.cwd(), sqlite_file(uri)
    place: str = client.get_experiment(experiment).artifact_location
    there = place.removesuffix(f"/mlruns/{experiment}")
    if there in (str(here), place) or not database.is_relative_to(here):
        return
    if os.access(place, os.F_OK) and not os.access(Path(there, database.relative_to(here)), os.F_OK):
        return
    names = {"here": f"{here}/", "there": f"{there}/"}
    with create_engine(uri, poolclass=NullPool).begin() as connection:
        for table, column in _PLACES.items():
            moved = f"{column} = :here || substr({column}, length(:there) + 1)"
            within = f"substr({column}, 1, length(:there)) = :there"
            connection.execute(text(f"UPDATE {table} SET {moved} WHERE {within}"), names)


@contextmanager
def session(job: Job, uri: str, quiet: bool = False) -> Iterator[tuple[Any, str]]:
    """Yield a client and the id of the study's experiment, for one process at a time.

    The lock lies beside a SQLite file, whose schema two processes must not create at once, or in the study's folder.
    Raises UserError if another upload holds it for 10 minutes, and for any trouble with the server.
    """
    database = sqlite_file(uri)
    path = database.with_name(f"{database.name}-lock") if uri.startswith("sqlite:") else job.paths.track / ".lock"
    advice = "; correct that or set MLFLOW_TRACKING_URI"
    with held(path, f"uploads to MLflow and holds {path}", 600.0, advice, quiet), readable_errors(uri):
        client = connect(uri)
        experiment = open_experiment(client, job.study.name, job.study.title)
        if uri.startswith("sqlite:"):
            _follow_project(client, experiment, uri)
        yield client, experiment


@contextmanager
def readable_errors(uri: str) -> Iterator[None]:
    """Turn errors of MLflow, its database or the network into a one-line UserError without the URI's password."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        if not isinstance(
            error, MlflowException | RequestException | SQLAlchemyError | OSError | ImportError | ValueError
        ):
            raise
        reason = without_secrets(" ".join(str(error).split()) or type(error).__name__, uri)
        down = re.search(r"Connection|Max retries|timed out|resolve", reason)
        advice = "start it, or set MLFLOW_TRACKING_URI to another" if down else "correct that"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room on its disk and on that of temporary files (TMPDIR)"
        raise user_error(
            error,
            f"the tracking server {masked(uri)} {'does not answer' if down else 'cannot be used'}: "
            f"{advice}. The results are safe: {command_of('track')} sends what is missing ({reason[:400]})",
        ) from None


def require_store() -> None:
    """Exit with one line, for `make ui`, if the address is wrong or its database cannot be opened: MLflow would retry
    for minutes and quote the address."""
    try:
        uri = tracking_uri()
        with readable_errors(uri):
            connect(uri)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
