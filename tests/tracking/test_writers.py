"""Eight trainings at once into one place: nothing is lost, nothing is there twice, and there is one of everything."""

from pathlib import Path

import pytest
from tests.processes import ROOT, SOURCE, run_python
from tests.tracking.comparison import assert_complete, ids
from tests.tracking.servers import PASSWORD, TrackingServer
from tests.tracking.trainings import EIGHT, finished_study

from consistency.tracking.live import EVERY, LIVE
from consistency.tracking.records import plan
from consistency.tracking.server import connect, send_points
from consistency.tracking.upload import track_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def holding(folder: Path, text: str) -> list[Path]:
    """The files below a folder, databases among them, in which the text stands."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("store", ["file", "sqlite_server", "postgres_server"])
def test_eight_writers(
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """They begin where nothing exists yet: no schema, no experiment, no parent."""
    uri, server = "sqlite:///mlflow.db", None
    if store != "file":
        server: TrackingServer = request.getfixturevalue(store)
        uri = server.url.replace("http://", f"http://me:{PASSWORD}@")
    study = finished_study(tmp_path, EIGHT)
    monkeypatch.chdir(tmp_path)
    given = {"URI": uri, "USERNAME": "me", "PASSWORD": PASSWORD}
    for name, value in given.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    said = eight_writers(tmp_path, **{f"MLFLOW_TRACKING_{name}": value for name, value in given.items()})
    client = connect(server.url if server else uri)
    live = ids(assert_complete(client, study))
    track_study(study)
    # MLflow keeps a point once that is sent again, as a retried request does.
    (record,) = (record for record in plan(study) if record.name == "ctm seed 0")
    send_points(client, live[record.name], record.points, set())
    assert live.items() <= ids(assert_complete(client, study, "teacher", "report")).items()
    output = capfd.readouterr()
    assert "live tracking" not in said and PASSWORD not in said + output.out + output.err
    assert holding(tmp_path, PASSWORD) == []
    if server is not None:
        assert PASSWORD not in server.log
    if store == "postgres_server":
        assert request.getfixturevalue("postgresql").tables_holding(server.store, PASSWORD) == []


def eight_writers(folder: Path, **variables: str) -> str:
    """Run them to their good end. Returns what they said."""
    variables |= {LIVE: "1", EVERY: "0.2", "PYTHONPATH": f"{SOURCE}:{ROOT}"}
    done = run_python("-m", "tests.tracking.writers", folder=folder, **variables)
    return done.stdout + done.stderr
