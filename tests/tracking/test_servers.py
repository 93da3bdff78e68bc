"""A tracking server that is down, silent or restarted: a training does not notice, and nothing is lost."""

import random
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Tiny
from tests.processes import ROOT, SOURCE, run_python, wait_until
from tests.repeatable import repeatable
from tests.tracking.comparison import assert_complete, expected_points, ids, points_of, runs_of
from tests.tracking.servers import PASSWORD, TrackingServer, dead_server, full_server, silent_server
from tests.tracking.trainings import FOUR, finished_study, replayed

from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.runtime.machine import Machine
from consistency.stages.student import make_student
from consistency.tracking.live import EVERY, GRACE, LIVE, Follower
from consistency.tracking.server import connect
from consistency.tracking.upload import track_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live tracking is on, and quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(LIVE, "1")
    monkeypatch.setenv(EVERY, "0.2")


def result(job: Job) -> list[Any]:
    """The student's weights and history, without what no run can repeat."""
    return [repeatable(job.folder / name) for name in ("student.safetensors", "history.jsonl")]


def train_in(folder: Path, study: Study, results: StudyPaths) -> Job:
    """A student of the tiny study, trained there."""
    layout = StudyPaths("tiny", folder / "results", folder / "state")
    shutil.copytree(results.root, layout.root)
    job = Job(study, layout, "analytic", 0)
    make_student(job, Machine(torch.device("cpu")))
    return job


@pytest.fixture(scope="module")
def unfollowed(tiny: Tiny, first_results: StudyPaths, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The student of a training that nobody follows."""
    return train_in(tmp_path_factory.mktemp("unfollowed"), tiny(), first_results)


@pytest.mark.parametrize("server", [None, dead_server, silent_server, full_server])
def test_a_training_does_not_notice_its_server(
    server: Callable[[], AbstractContextManager[str]] | None,
    tmp_path: Path,
    tiny: Tiny,
    first_results: StudyPaths,
    unfollowed: Job,
    empty_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without one, it writes into a SQLite file. It begins when its first points are sent, or the trouble is there."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    start, end, waited = Follower.start, Follower.end, []

    def start_and_wait(self: Follower) -> None:
        start(self)
        wait_until(lambda: self.trouble or self.client, "the first attempt's end")

    def end_in_time(self: Follower, status: str) -> None:
        begun = time.monotonic()
        end(self, status)
        waited.append(time.monotonic() - begun)

    monkeypatch.setattr(Follower, "start", start_and_wait)
    monkeypatch.setattr(Follower, "end", end_in_time)
    with server() if server else nullcontext("sqlite:///mlflow.db") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("http://", f"http://me:{PASSWORD}@"))
        states = [random.getstate(), np.random.get_state()[1].tobytes()]  # noqa: NPY002
        capfd.readouterr()
        disturbed = train_in(tmp_path / "disturbed", tiny(), first_results)
        assert states == [random.getstate(), np.random.get_state()[1].tobytes()]  # noqa: NPY002
    assert result(disturbed) == result(unfollowed)
    assert not disturbed.state.exists()
    assert waited[0] < GRACE + 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "live tracking" in line]
    if server:
        (line,) = lines
        assert address in line and "track --study FILE` sends what is missing" in line and PASSWORD not in line
    else:
        assert lines == []
        client = connect(f"sqlite:///{tmp_path}/mlflow.db")
        (run,) = runs_of(client, "tiny", role="seed")
        assert run.info.status == "FINISHED"
        assert points_of(client, run) == expected_points(disturbed)


#: a training that ends, while its thread imports MLflow or waits for an answer
ENDING = """
import sys, time
from pathlib import Path
from tests.tracking.trainings import FOUR, finished_study, replayed
from consistency.tracking import live
live.GRACE = 0.2
study = finished_study(Path("."), FOUR)
with replayed(study.of("ctm", 0)):
    while sys.argv[1] not in sys.modules:
        time.sleep(0.01)
    time.sleep(0.3)
print("done")
"""


@pytest.mark.parametrize("module", ["mlflow", "mlflow.store.tracking.rest_store"])
def test_python_ends_while_the_thread_is_busy(module: str, tmp_path: Path) -> None:
    with silent_server() as address:
        variables = {LIVE: "1", EVERY: "0.01", "MLFLOW_TRACKING_URI": address, "PYTHONPATH": f"{SOURCE}:{ROOT}"}
        ended = run_python("-c", ENDING, module, folder=tmp_path, **variables)
    assert ended.stdout == "done\n"
    (line,) = ended.stderr.splitlines()
    assert line.startswith("live tracking: the tracking server did not take all within 0.2 s")


def test_a_server_that_comes_back_gets_what_is_missing(
    tmp_path: Path, sqlite_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_server.url)
    study = finished_study(tmp_path, FOUR, "restarted")
    client = connect(sqlite_server.url)
    with replayed(study.of("ctm", 0)) as training:
        training.write(10)
        wait_until(lambda: training.sent_up_to() == 100, "the first points")
        (run,) = runs_of(client, study.study.name, role="seed")
        assert run.info.status == "RUNNING"
        assert [point for point in expected_points(study.of("ctm", 0)) if point[1] <= 100] == points_of(client, run)
        sqlite_server.stop()
        training.write(20)
        wait_until(lambda: training.follower.trouble, "the thread's complaint")
        sqlite_server.start()
        wait_until(lambda: training.sent_up_to() == 300, "what was missing")
        training.write(20)
    wait_until(lambda: runs_of(client, study.study.name, role="seed")[0].info.status == "FINISHED", "the end")
    (run,) = runs_of(client, study.study.name, role="seed")
    assert points_of(client, run) == expected_points(study.of("ctm", 0))


def test_track_completes_what_no_follower_could_send(
    tmp_path: Path, sqlite_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training had the server to its middle, one never had it, two were not followed."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_server.url)
    study = finished_study(tmp_path, FOUR, "away")
    client = connect(sqlite_server.url)
    with replayed(study.of("ctm", 0)) as cut_off:
        cut_off.write(25)
        wait_until(lambda: cut_off.sent_up_to() == 250, "the first points")
        sqlite_server.stop()
        cut_off.write(25)
    with replayed(study.of("ctm", 1)) as alone:
        alone.write(50)
    assert cut_off.follower.trouble and alone.follower.trouble
    sqlite_server.start()
    (left,) = runs_of(client, study.study.name, role="seed")
    assert left.info.status == "RUNNING"
    track_study(study)
    assert ids(assert_complete(client, study, "teacher", "report"))["ctm seed 0"] == left.info.run_id
