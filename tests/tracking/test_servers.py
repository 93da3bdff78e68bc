"""A tracking server that is down, silent or restarted: a training does not notice, and nothing is lost."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from tests.tracking.comparison import assert_complete, expected_points, ids, points_of, runs_of
from tests.tracking.servers import TrackingServer, free_port, silent_server, wait_until
from tests.tracking.trainings import FOUR, finished_study, replayed
from tests.workflow.checkout import UNREPEATABLE, processes_in

from consistency.layout import Layout
from consistency.stages.student import make_student
from consistency.stages.trainer import Machine
from consistency.study import Study
from consistency.tracking.live import EVERY, LIVE, LOG, _Follower
from consistency.tracking.server import connect
from consistency.tracking.upload import track_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(autouse=True)
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Live tracking is on, and quick; followers outlive their training for a while, but not their test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(LIVE, "1")
    monkeypatch.setenv(EVERY, "0.2")
    yield
    end_followers(tmp_path)


def followers(folder: Path) -> set[int]:
    """The processes at work in a folder, besides this one."""
    return {*processes_in(folder.resolve())} - {os.getpid()}


def end_followers(folder: Path) -> None:
    for process in followers(folder):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    wait_until(lambda: not followers(folder), "the followers' end", 30)


def result(layout: Layout) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The student's weights and history, bit for bit, without what no run can repeat."""
    folder = layout.student("analytic", 0)
    weights = {name: value.tobytes() for name, value in load_file(folder / "student.safetensors").items()}
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if not k.startswith(UNREPEATABLE)} for line in lines]


@pytest.fixture(scope="module")
def train_in(tiny: Callable[..., Study], first_results: Layout) -> Callable[[Path], Layout]:
    """train_in(folder): a student of the tiny study, trained there."""

    def make(folder: Path) -> Layout:
        layout = Layout("tiny", folder / "results", folder / "state")
        shutil.copytree(first_results.root, layout.root)
        make_student(tiny(), layout, "analytic", 0, Machine(torch.device("cpu")))
        return layout

    return make


@pytest.mark.parametrize("fault", ["down", "silent"])
def test_a_training_does_not_notice_its_server(
    fault: str,
    tmp_path: Path,
    train_in: Callable[[Path], Layout],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It begins when its follower is in trouble already, and asks for it only to hear what that is."""
    with monkeypatch.context() as off:
        off.setenv(LIVE, "0")
        undisturbed = train_in(tmp_path / "undisturbed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    start, processes = _Follower.start, []

    def start_and_fail(self: _Follower, opening: dict[str, Any], state: Path, every: float) -> None:
        start(self, opening, state, every)
        wait_until(lambda: "trouble" in (state / LOG).read_text(), "the follower's complaint")
        monkeypatch.setattr(self.process, "wait", lambda *_: pytest.fail("the training waits for its follower"))
        processes.append(self.process)

    monkeypatch.setattr(_Follower, "start", start_and_fail)
    with silent_server() if fault == "silent" else nullcontext(f"http://127.0.0.1:{free_port()}") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        capfd.readouterr()
        disturbed = train_in(tmp_path / fault)
        assert followers(tmp_path) == {processes[0].pid}  # it still tries
    assert result(disturbed) == result(undisturbed)
    assert not disturbed.training_state("analytic", 0).exists()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "live tracking" in line]
    assert address in line and line.endswith("`track` will complete it")


def test_a_server_that_comes_back_gets_what_is_missing(
    tmp_path: Path, sqlite_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_server.url)
    study, layout = finished_study(tmp_path, FOUR, "restarted")
    client = connect(sqlite_server.url)
    with replayed(study, layout, "ctm", 0) as training:
        training.write(10)
        wait_until(lambda: "up to step 100" in training.log, "the first points")
        (run,) = runs_of(client, study, "seed")
        assert run.info.status == "RUNNING"
        assert [point for point in expected_points(layout, "ctm", 0) if point[1] <= 100] == points_of(client, run)
        sqlite_server.stop()
        training.write(20)
        wait_until(lambda: training.log.splitlines()[-1].startswith("trouble"), "the follower's complaint")
        sqlite_server.start()
        wait_until(lambda: "up to step 300" in training.log, "what was missing")
        training.write(20)
    wait_until(lambda: runs_of(client, study, "seed")[0].info.status == "FINISHED", "the end")
    (run,) = runs_of(client, study, "seed")
    assert points_of(client, run) == expected_points(layout, "ctm", 0)


def test_track_completes_what_no_follower_could_send(
    tmp_path: Path, sqlite_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training had the server to its middle, one never had it, two had no follower."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_server.url)
    study, layout = finished_study(tmp_path, FOUR, "away")
    client = connect(sqlite_server.url)
    with replayed(study, layout, "ctm", 0) as cut_off:
        cut_off.write(25)
        wait_until(lambda: "up to step 250" in cut_off.log, "the first points")
        sqlite_server.stop()
        cut_off.write(25)
    with replayed(study, layout, "ctm", 1) as alone:
        alone.write(50)
    wait_until(lambda: "trouble" in cut_off.log and "trouble" in alone.log, "the followers' complaints")
    end_followers(tmp_path)
    sqlite_server.start()
    (left,) = runs_of(client, study, "seed")
    assert left.info.status == "RUNNING"
    track_study(study, layout)
    assert ids(assert_complete(client, study, layout, "teacher", "report"))["ctm seed 0"] == left.info.run_id
