"""Where MLflow is and how it is spoken to: address, client, experiment, runs, one upload at a time, readable errors."""

import getpass
import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from consistency.errors import UserError
from consistency.locks import held
from consistency.tracking.plan import Point, Upload

BATCH = 900  # metrics a call; MLflow takes 1000 entities
LOCK_PATIENCE = 600.0  # seconds to wait for another upload into the same place
# The tags of what a whole run holds, and of the folder its results lie in.
DIGEST, FOLDER = "consistency.digest", "consistency.folder"

# Nothing phones home, no address (it may hold a password) is printed, an absent server is given up in about a minute.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_NETWORK_DISKS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "afs", "panfs", "wekafs", "fuse.")
_DATABASES = ("postgresql", "mysql", "mssql")
_PATIENCE = {"PGCONNECT_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


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


def without_secrets(text: str, uri: str) -> str:
    """The text without what stands between '://' and '@' in the URI, and without its query; nor the password or token
    that MLflow takes from the environment."""
    clean = without_credentials(uri)
    secrets = [uri.partition("?")[2]] if not uri.startswith("sqlite:") else []
    if "@" in uri and clean != uri:
        login = uri.partition("://")[2].rpartition("@")[0]
        password = login.partition(":")[2]
        secrets += [f"{login}@", password, unquote(password)]
    secrets += [os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("PASSWORD", "TOKEN")]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def be_quiet() -> None:
    """To be called before MLflow is imported."""
    os.environ.update(_ENVIRONMENT)


def connect(uri: str, patience: dict[str, str] = _PATIENCE) -> Any:
    """An MlflowClient that is quiet about itself; it makes the schema of a fresh database. patience: MLflow's variables
    that say how long a server is waited for, where the environment does not."""
    be_quiet()
    for name, value in patience.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.telemetry import set_telemetry_client

    set_telemetry_client()  # ends it where mlflow had been imported before
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:"):
        _sqlite_file(uri).parent.mkdir(parents=True, exist_ok=True)
    elif uri.startswith(_DATABASES):
        _require_database(uri)
    return MlflowClient(uri)


def _require_database(uri: str) -> None:
    """Raise SQLAlchemy's error at once if a database does not answer: MLflow would try for two minutes."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    create_engine(uri, poolclass=NullPool).connect().close()


def open_experiment(client: Any, name: str, title: str, uri: str) -> str:
    """The id of a study's experiment, made if there is none. Raises UserError for one that a person deleted."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            made: str = client.create_experiment(
                name, _artifact_location(name, uri), {"mlflow.experimentKind": "custom_model_development"}
            )
            links = f"[Compare the students]({charts(made)}), [while they train]({charts(made, live=True)})"
            client.set_experiment_tag(made, "mlflow.note.content", f"{title or name}. {links}.")
            return made
        except MlflowException:
            # Another process may have made it since.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {name!r} was deleted: bring it back with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`, and run track again"
        )
    return found.experiment_id


def charts(experiment: str, live: bool = False) -> str:
    """Return the page, from the server's address on, that draws the students' curves side by side.

    live: those of the seeds that train, before their means are there. Without its first word MLflow 3 opens its page
    for language models.
    """
    shown = "tags.role = 'seed' AND tags.state = 'live'" if live else "tags.role = 'student' AND tags.state = 'current'"
    page = "workflowType=machine_learning&compareRunsMode=CHART"
    return f"#/experiments/{experiment}/runs?{page}&searchFilter={quote(shown)}"


def _artifact_location(study: str, uri: str) -> str | None:
    """mlruns beside the database, absolute; a server knows its own."""
    if uri.startswith("http"):
        return None
    folder = _sqlite_file(uri).parent if uri.startswith("sqlite:") else Path.cwd()
    return (folder / "mlruns" / study).as_uri()


# --- runs


def find_runs(client: Any, experiment: str, **tags: str) -> list[Any]:
    """The runs of an experiment that nobody deleted, the newest first; with tags, those that carry them."""
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], wanted, max_results=1000, page_token=token)
        runs, token = runs + list(page), page.token
        if not token:
            return runs


def create_run(client: Any, experiment: str, upload: Upload, tags: dict[str, str]) -> Any:
    """A run with its name, tags, note and colour. A person may change name, note and colour: they are written only
    here."""
    first = {"mlflow.note.content": upload.note, "mlflow.user": _user()}
    first |= {"mlflow.runColor": upload.color} if upload.color else {}
    return client.create_run(experiment, upload.started, tags | first, upload.name)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def set_tags(client: Any, run: Any, tags: dict[str, str]) -> None:
    """Set the tags that are not as they should be."""
    from mlflow.entities import RunTag

    changed = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
    for start in range(0, len(changed), 100):
        client.log_batch(run.info.run_id, tags=changed[start : start + 100])


def describe(client: Any, run: Any, upload: Upload) -> None:
    """Give a run the params that it lacks, in their order, and its dataset. MLflow never changes a param."""
    from mlflow.entities import DatasetInput, InputTag, Param

    from consistency.tracking.data import Images

    params = [Param(key, value) for key, value in upload.params.items() if key not in run.data.params]
    for start in range(0, len(params), 100):
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    data = Images(upload.data)._to_mlflow_entity()
    client.log_inputs(run.info.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])


def points_there(client: Any, run: Any) -> dict[tuple[str, int], float]:
    """The values that a run has, by metric and step."""
    keys = [key for key in run.data.metrics if not key.startswith("system/")]
    histories = (client.get_metric_history(run.info.run_id, key) for key in keys)
    return {(metric.key, metric.step): metric.value for history in histories for metric in history}


def send_points(client: Any, run_id: str, points: list[Point]) -> None:
    """Send at most BATCH points in one call. What the server has already is not there twice afterwards: it knows a
    point by run, metric, step, time and value."""
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


# --- the database's place


def warn_of_network_disk(uri: str) -> None:
    """Say so where a SQLite file lies on a disk that several machines share: it may be locked for ever there, or break,
    when two of them write."""
    if not uri.startswith("sqlite:"):
        return
    import psutil

    folder = _sqlite_file(uri).parent.resolve()
    disks = [disk for disk in psutil.disk_partitions(all=True) if folder.is_relative_to(disk.mountpoint)]
    kind = max(disks, key=lambda disk: len(disk.mountpoint)).fstype if disks else ""
    if kind.startswith(_NETWORK_DISKS):
        print(
            f"warning: {_sqlite_file(uri)} lies on a network disk ({kind}), where SQLite is not safe: set "
            "MLFLOW_TRACKING_URI to a server, or to sqlite:////PATH/mlflow.db on a disk of this machine",
            flush=True,
        )


# --- one at a time


def _sqlite_file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def lock_file(uri: str, folder: Path) -> Path:
    """Beside a SQLite file, since two processes must not make its schema at once; else in the study's folder."""
    database = _sqlite_file(uri)
    return database.with_name(f"{database.name}-lock") if uri.startswith("sqlite:") else folder / ".lock"


def one_at_a_time(path: Path) -> AbstractContextManager[None]:
    """Hold the lock. Raises UserError if another upload holds it for too long, or it cannot be made."""
    return held(path, f"uploads to MLflow and holds {path}", LOCK_PATIENCE, "; mend that or set MLFLOW_TRACKING_URI")


# --- errors


@contextmanager
def readable_errors(uri: str) -> Iterator[None]:
    """One line, a UserError, for whatever MLflow, its database or the network raises; without the URI's password."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_mlflows(error):
            raise
        reason = without_secrets(" ".join(str(error).split()) or type(error).__name__, uri)
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
