"""Live tracking: what arrives while a training goes on is what track would send; and the training does not care."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.fake_results import UNTAUGHT, make_report, make_results, make_study

from consistency.errors import UserError
from consistency.layout import Layout
from consistency.stages.student import make_student
from consistency.stages.trainer import Machine
from consistency.study import Study
from consistency.tracking import follow, live, server
from consistency.tracking.plan import plan
from consistency.tracking.upload import track_study
from consistency.training import folder as files

ROOT = Path(__file__).resolve().parents[1]
Line = dict[str, Any]


@dataclass
class Project:
    """A project folder with a finished study, whose trainings can be followed once more."""

    study: Study
    layout: Layout

    def history(self, run: str, seed: int) -> list[Line]:
        """The whole history of a finished training."""
        text = (self.layout.student(run, seed) / "history.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def write(self, lines: list[Line], run: str = "ctm", seed: int = 0) -> Path:
        """The state of a training that has come so far. Returns its folder."""
        state = self.layout.training_state(run, seed)
        files._identify(state, self.study.key("student", run, seed), "test")
        (state / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return state

    def sender(self, run: str = "ctm", seed: int = 0) -> follow._Sender:
        """What the follower of a training holds."""
        state = self.layout.training_state(run, seed)
        opening = live._opening(self.study, self.layout, state, run, seed)
        return follow._Sender(json.loads(json.dumps(opening)))

    def finish(self, run: str = "ctm", seed: int = 0) -> None:
        """The training ends: its card says which it was, and its state goes."""
        state, path = self.layout.training_state(run, seed), self.layout.student(run, seed) / "card.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"training": files.read_identity(state)}))
        shutil.rmtree(state)


@pytest.fixture
def project(small_project: Study, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return Project(small_project, Layout(small_project.name))


@pytest.fixture
def client(project: Project) -> Any:
    return server.connect(server.tracking_uri())


def runs_of(client: Any, study: str = "small") -> dict[str, Any]:
    """The experiment's runs by name; two of a name would be one too many."""
    found = server.find_runs(client, client.get_experiment_by_name(study).experiment_id)
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def points_of(client: Any, run: Any, prefix: str = "") -> list[tuple[str, int, int, float]]:
    return sorted(
        (m.key, m.step, m.timestamp, m.value)
        for key in run.data.metrics
        if key.startswith(prefix)
        for m in client.get_metric_history(run.info.run_id, key)
    )


def losses(client: Any, run: Any) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "training/loss")]


def as_losses(lines: list[Line]) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines]


# --- what arrives


def test_new_lines_arrive_once(project: Project, client: Any) -> None:
    lines = project.history("ctm", 0)
    state = project.write(lines[:2])
    sender = project.sender()
    assert sender.attempt()
    run = runs_of(client)["ctm seed 0"]
    assert losses(client, run) == as_losses(lines[:2])
    assert run.info.status == "RUNNING"
    with (state / "history.jsonl").open("a") as file:
        text = json.dumps(lines[2])
        file.write(text[:20])
        file.flush()
        assert sender.attempt()
        assert losses(client, run) == as_losses(lines[:2])  # half a line is none
        file.write(text[20:] + "\n")
    assert sender.attempt() and sender.attempt()
    assert losses(client, run) == as_losses(lines[:3])


def test_a_live_run_says_what_it_is(project: Project, client: Any) -> None:
    project.write([], "analytic", 1)
    project.sender("analytic", 1).attempt()
    runs = runs_of(client)
    run, parent = runs["analytic seed 1"], runs["analytic"]
    assert next(iter(run.data.params)) == "preconditioning"
    assert run.data.params["preconditioning"] == run.data.tags["preconditioning"] == "analytic"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["study_hash"] == project.study.key("report")
    assert (run.data.tags["role"], run.data.tags["state"]) == ("seed", "live")
    assert run.data.tags["mlflow.runColor"] == parent.data.tags["mlflow.runColor"] == "#D55E00"
    assert {"git_commit", "host", "consistency.training"} <= run.data.tags.keys()
    assert parent.info.status == "SCHEDULED"
    data = run.inputs.dataset_inputs[0].dataset
    assert (data.name, json.loads(data.profile)["num_rows"]) == ("digits", 192)


def test_track_completes_the_live_runs_and_makes_no_second_ones(project: Project, client: Any) -> None:
    for run in project.study.students:
        for seed in project.study.seeds:
            project.write(project.history(run, seed), run, seed)
            sender = project.sender(run, seed)
            assert sender.attempt("FINISHED")
            project.finish(run, seed)
    before = runs_of(client)
    assert set(before) == {"ctm", "analytic", *(f"{run} seed {seed}" for run in ("ctm", "analytic") for seed in (0, 1))}
    assert before["ctm seed 0"].info.status == "FINISHED"
    track_study(project.study, project.layout)
    after = runs_of(client)
    assert {name: run.info.run_id for name, run in before.items()}.items() <= {
        name: run.info.run_id for name, run in after.items()
    }.items()
    assert len(after) == 8
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    assert {run.data.tags["state"] for run in after.values()} == {"current"}
    for upload in plan(project.study, project.layout):
        run = after[upload.name]
        assert points_of(client, run) == sorted((p.key, p.step, p.time, p.value) for p in upload.points)
        assert run.data.params == upload.params
        assert (run.info.start_time, run.info.end_time) == (upload.started, upload.ended)
        assert "trained_again" not in run.data.tags
    track_study(project.study, project.layout)
    assert {name: run.info.run_id for name, run in runs_of(client).items()} == {
        name: run.info.run_id for name, run in after.items()
    }


def test_consistency_training_without_a_teacher_is_followed_and_tracked(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path)
    frozen = "  gc: {coupling: gc, mu: 0.5}\n  full: {coupling: gc, mu: 0.7, predictor: {run: ic}}"
    text = UNTAUGHT.replace("varies: [coupling, mu]", "varies: [coupling, mu, predictor]")
    study = make_study(tmp_path / "studies", text=text.replace("  gc: {coupling: gc, mu: 0.5}", frozen))
    project = Project(study, Layout(study.name))
    make_results(study, project.layout)
    make_report(study, project.layout)
    client = server.connect(server.tracking_uri())
    for run in study.students:
        for seed in study.seeds:
            lines = project.history(run, seed)
            project.write(lines, run, seed)
            assert project.sender(run, seed).attempt("FINISHED")
            project.finish(run, seed)
    before = runs_of(client)
    said = {name: before[f"{name} seed 1"].data.params for name in study.students}
    assert {name: params["coupling"] for name, params in said.items()} == {
        "ic": "ic",
        "ot": "ot",
        "gc": "gc",
        "full": "gc",
    }
    assert said["gc"]["mu"] == "0.5" and said["full"]["mu"] == "0.7"
    assert said["full"]["predictor.run"] == "ic" and said["gc"]["predictor"] == "average"
    assert said["gc"]["curriculum.kind"] == "doubling"
    assert list(said["gc"])[:2] == ["coupling", "mu"]
    loss = client.get_metric_history(before["gc seed 0"].info.run_id, "training/consistency")
    assert [m.value for m in loss] == [line["consistency"] for line in project.history("gc", 0)]
    track_study(study, project.layout)
    after = runs_of(client)
    assert {name: after[name].info.run_id for name in before} == {name: run.info.run_id for name, run in before.items()}
    for upload in plan(study, project.layout):
        run = after[upload.name]
        assert run.data.params == upload.params
        assert points_of(client, run) == sorted((p.key, p.step, p.time, p.value) for p in upload.points)
    assert not [key for run in after.values() for key in run.data.metrics if "alignment" in key]


def test_a_follower_that_comes_after_track_changes_nothing(project: Project, client: Any) -> None:
    project.write(project.history("ctm", 0))
    late = project.sender()
    project.finish()
    track_study(project.study, project.layout)
    before = runs_of(client)["ctm seed 0"]
    late.measure(least=0)
    assert late.attempt("KILLED")
    after = runs_of(client)["ctm seed 0"]
    assert (after.info.status, after.data.metrics) == ("FINISHED", before.data.metrics)
    assert points_of(client, after) == points_of(client, before)


def test_what_is_trained_again_after_a_kill_stands_there_once(project: Project, client: Any) -> None:
    """The follower had sent lines that the saved state did not have; their times differ the second time."""
    lines = project.history("ctm", 0)
    project.write(lines[:4])
    assert project.sender().attempt("KILLED")
    assert runs_of(client)["ctm seed 0"].info.status == "KILLED"
    again = [line | {"images_per_second": 1.0} for line in lines[2:]]
    project.write(lines[:2] + again)
    resumed = project.sender()
    assert resumed.attempt()
    assert runs_of(client)["ctm seed 0"].info.status == "RUNNING"
    assert resumed.attempt("FINISHED")
    run = runs_of(client)["ctm seed 0"]
    assert losses(client, run) == as_losses(lines)
    speeds = client.get_metric_history(run.info.run_id, "training/images_per_second")
    assert [m.step for m in speeds] == [line["step"] for line in lines]
    (project.layout.student("ctm", 0) / "history.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines[:2] + again)
    )
    project.finish()
    track_study(project.study, project.layout)
    assert runs_of(client)["ctm seed 0"].data.tags["trained_again"].startswith("steps 30 to 40: ")


def test_other_settings_are_another_run(project: Project, client: Any) -> None:
    project.write([])
    assert project.sender().attempt("KILLED")
    first = files.read_identity(project.layout.training_state("ctm", 0))
    files._identify(project.layout.training_state("ctm", 0), "another key", "test")
    assert files.read_identity(project.layout.training_state("ctm", 0))["id"] != first["id"]
    assert project.sender().attempt("KILLED")
    found = server.find_runs(client, client.get_experiment_by_name("small").experiment_id)
    assert sum(run.info.run_name == "ctm seed 0" for run in found) == 2


def test_values_that_are_not_finite_are_left_out(project: Project, client: Any) -> None:
    lines = project.history("ctm", 0)[:2]
    project.write([lines[0], lines[1] | {"loss": float("nan"), "grad_norm": float("inf")}])
    assert project.sender().attempt()
    assert losses(client, runs_of(client)["ctm seed 0"]) == as_losses(lines[:1])


def test_the_state_may_be_gone_before_it_was_looked_at(project: Project, client: Any) -> None:
    project.write([])
    sender = project.sender()
    shutil.rmtree(project.layout.training_state("ctm", 0))
    assert sender.attempt("FINISHED")
    assert losses(client, runs_of(client)["ctm seed 0"]) == as_losses(project.history("ctm", 0))


# --- the machine


def test_the_machines_figures_go_on_where_an_earlier_follower_stopped(project: Project, client: Any) -> None:
    project.write([])
    for _ in range(2):
        sender = project.sender()
        for _ in range(2):
            sender.measure(least=0)
            assert sender.attempt()
    run = runs_of(client)["ctm seed 0"]
    for key in ("system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == [0, 1, 2, 3]


def test_the_machines_figures_wait_for_the_server(
    project: Project, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write([])
    sender = project.sender()
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        sender.measure(least=0)
        assert not sender.attempt()
        sender.measure(least=0)
    assert sender.attempt()
    run = runs_of(client)["ctm seed 0"]
    assert len(client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")) == 2


def test_gpus_are_among_the_machines_figures(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.system_metrics.metrics import gpu_monitor

    nvml = SimpleNamespace(
        NVMLError=type("NVMLError", (Exception,), {}),
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetMemoryInfo=lambda i: SimpleNamespace(used=8e9, total=16e9),
        nvmlDeviceGetUtilizationRates=lambda i: SimpleNamespace(gpu=90 + i),
        nvmlDeviceGetPowerUsage=lambda i: 350_000,
        nvmlDeviceGetEnforcedPowerLimit=lambda i: 700_000,
    )
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    machine = follow._Machine()
    machine.measure(least=0)
    found = {point.key: point.value for point in machine.waiting}
    assert (found["system/gpu_0_utilization_percentage"], found["system/gpu_1_utilization_percentage"]) == (90, 91)
    assert found["system/gpu_0_power_usage_watts"] == 350 and found["system/gpu_1_memory_usage_percentage"] == 50


def test_the_machines_figures_can_be_turned_off(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    project.write([])
    sender = project.sender()
    sender.measure(least=0)
    assert sender.machine.waiting == []


# --- a server that is away


def test_what_could_not_be_sent_comes_when_the_server_does(
    project: Project, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = project.history("ctm", 0)
    state = project.write(lines[:2])
    sender = project.sender()
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:1")
        assert not sender.attempt() and not sender.attempt()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("trouble: the tracking server http://127.0.0.1:1 does not answer")
    assert "hunter2" not in said[0]
    with (state / "history.jsonl").open("a") as file:
        file.write(json.dumps(lines[2]) + "\n")
    assert sender.attempt()
    assert losses(client, runs_of(client)["ctm seed 0"]) == as_losses(lines[:3])
    assert capsys.readouterr().out == "up to step 30\n"


@pytest.mark.parametrize("method", ["create_run", "log_inputs", "log_batch"])
@pytest.mark.parametrize("arrives", [True, False])
def test_a_request_that_fails_half_way_doubles_nothing(
    project: Project, client: Any, monkeypatch: pytest.MonkeyPatch, method: str, arrives: bool
) -> None:
    """Whether or not the server had done what it was asked, before the answer was lost."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    lines = project.history("ctm", 0)
    project.write(lines)
    original = getattr(MlflowClient, method)

    def lost(*args: Any, **kwargs: Any) -> Any:
        if arrives:
            original(*args, **kwargs)
        raise MlflowException("Connection lost")

    sender = project.sender()
    with monkeypatch.context() as bad:
        bad.setattr(MlflowClient, method, lost)
        assert not sender.attempt()
    assert sender.attempt()
    run = next(run for run in server.find_runs(client, "1") if run.info.run_name == "ctm seed 0" and run.data.metrics)
    assert losses(client, run) == as_losses(lines)


# --- the process


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live tracking is on, and quick."""
    monkeypatch.setenv(live.LIVE, "1")
    monkeypatch.setenv(live.EVERY, "0.2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))


@pytest.fixture
def followers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Every follower that is started; none is left behind."""
    started: list[subprocess.Popen[bytes]] = []
    start = live._Follower.start

    def noted(self: live._Follower, *args: Any) -> None:
        start(self, *args)
        assert self.process is not None
        started.append(self.process)

    monkeypatch.setattr(live._Follower, "start", noted)
    yield started
    for process in started:
        process.returncode = None
        process.kill()
        process.wait(30)


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.1)


def status_of(client: Any) -> str:
    if client.get_experiment_by_name("small") is None:
        return ""
    run = runs_of(client).get("ctm seed 0")
    return "" if run is None else run.info.status


@pytest.mark.slow
def test_the_run_of_a_killed_training_does_not_run_for_ever(
    project: Project, client: Any, quick: None, followers: list[subprocess.Popen[bytes]]
) -> None:
    state = project.write(project.history("ctm", 0)[:2])
    follower = live._Follower()
    follower.start(live._opening(project.study, project.layout, state, "ctm", 0), state, 0.2)
    wait_for(lambda: status_of(client) == "RUNNING", "the live run")
    (process,) = followers
    words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    assert words[2:5] == [b"consistency", b"follow", b"small: ctm seed 0"]
    assert os.getsid(process.pid) == process.pid  # the terminal's Ctrl-C does not come there
    assert os.getpriority(os.PRIO_PROCESS, process.pid) >= 10
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        process.send_signal(signum)
    assert process.stdin is not None
    process.stdin.close()  # as the kernel does for a process that is killed
    assert process.wait(60) == 0
    assert follower.log is not None
    follower.log.close()
    assert status_of(client) == "KILLED"
    assert losses(client, runs_of(client)["ctm seed 0"]) == as_losses(project.history("ctm", 0)[:2])


@pytest.mark.slow
def test_a_training_is_followed_and_its_bits_are_the_same(
    tiny: Callable[..., Study],
    first_results: Layout,
    empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
    followers: list[subprocess.Popen[bytes]],
) -> None:
    study = tiny()
    layouts = [Layout(study.name, tmp_path / name / "results", tmp_path / name / "state") for name in ("on", "off")]
    for layout, on in zip(layouts, ("1", "0"), strict=True):
        shutil.copytree(first_results.results, layout.results)
        shutil.copy(empty_database, layout.results.parent)
        monkeypatch.chdir(layout.results.parent)
        monkeypatch.setenv(live.LIVE, on)
        make_student(study, layout, "ctm", 0, Machine(torch.device("cpu")))
    (process,) = followers
    assert process.returncode == 0  # set, not waited for
    process.returncode = None
    assert process.wait(60) == 0
    checkpoints = [layout.student_file("ctm", 0).read_bytes() for layout in layouts]
    assert checkpoints[0] == checkpoints[1]
    client = server.connect(f"sqlite:///{tmp_path}/on/mlflow.db")
    run = runs_of(client, "tiny")["ctm seed 0"]
    card = json.loads((layouts[0].student("ctm", 0) / "card.json").read_text())
    assert run.data.tags["consistency.training"] == card["training"]["id"]
    assert run.info.status == "FINISHED"
    text = (layouts[0].student("ctm", 0) / "history.jsonl").read_text()
    assert losses(client, run) == as_losses([json.loads(line) for line in text.splitlines()])
    assert server.connect(f"sqlite:///{tmp_path}/off/mlflow.db").get_experiment_by_name("tiny") is None


@pytest.mark.slow
def test_a_training_says_at_its_end_that_nothing_could_be_sent(
    project: Project,
    quick: None,
    followers: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:1")
    state = project.write(project.history("ctm", 0))
    with live.followed(project.study, project.layout, state, "ctm", 0) as start:
        start()
        wait_for(lambda: "trouble" in (state / live.LOG).read_text(), "the trouble")
    (process,) = followers
    process.returncode = None
    assert process.poll() is None  # it still tries; nobody waits for it
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("live tracking: the tracking server http://127.0.0.1:1 does not")
    assert lines[0].endswith("`track` will complete it")
    command = Path(f"/proc/{process.pid}/cmdline").read_text()
    assert "hunter2" not in (state / live.LOG).read_text() + command + lines[0]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (UserError("diverged"), "FAILED"),
        (SystemExit(143), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_the_follower_hears_how_the_training_ended(
    project: Project, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, status: str
) -> None:
    monkeypatch.setenv(live.LIVE, "1")
    told: list[dict[str, Any]] = []
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    monkeypatch.setattr(live, "_COMMAND", command)
    monkeypatch.setattr(live._Follower, "_tell", lambda self, message: told.append(message))
    state = project.write([])
    try:
        with live.followed(project.study, project.layout, state, "ctm", 0) as start:
            start()
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert [message.get("status") for message in told] == [None, status]


def test_a_follower_that_cannot_start_harms_nobody(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(live.LIVE, "1")
    monkeypatch.setattr(live, "_COMMAND", ["/nowhere/python"])
    state = project.write([])
    with live.followed(project.study, project.layout, state, "ctm", 0) as start:
        start()
    assert capsys.readouterr().err == (
        "live tracking: could not be started (No such file or directory); `track` will complete it\n"
    )


@pytest.mark.parametrize(
    ("uri", "followers"),
    [("", 0), ("sqlite:////tmp/mlflow.db", 0), ("http://head:5000", 1), ("postgresql://head/mlflow", 1)],
)
def test_a_job_of_a_cluster_speaks_to_a_server_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch, uri: str, followers: int
) -> None:
    """Compute nodes and a SQLite file on a network disk do not go together."""
    monkeypatch.setenv(live.LIVE, "1")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started: list[Path] = []
    monkeypatch.setattr(live._Follower, "start", lambda self, opening, state, every: started.append(state))
    with live.followed(project.study, project.layout, project.write([]), "ctm", 0) as start:
        start()
    assert len(started) == followers


@pytest.mark.parametrize("every", ["0", "-1", "soon"])
def test_a_senseless_pace_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch, every: str) -> None:
    monkeypatch.setenv(live.EVERY, every)
    with (
        pytest.raises(UserError, match="CONSISTENCY_LIVE_EVERY must be a positive number of seconds"),
        live.followed(project.study, project.layout, Path("state")),
    ):
        pass


def test_a_follower_gives_up_some_time_after_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given_up = threading.Event()
    monkeypatch.setattr(follow, "GRACE", 0.01)
    monkeypatch.setattr(follow.os, "_exit", lambda code: given_up.set())
    read, write = os.pipe()
    with os.fdopen(read) as messages:
        ending = follow._Ending(messages)
        assert not ending.over.wait(0.05)
        os.close(write)
        assert given_up.wait(10)
        assert ending.status == "KILLED"
    assert "gave up" in capsys.readouterr().out
