"""Live tracking: what arrives while a training goes on is what track would send; and the training does not care."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.fake_results import edit_card
from tests.tracking.comparison import by_name, ids, planned_points, points_of, runs_of
from tests.tracking.trainings import history_of

from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.keys import key_of
from consistency.tracking import live
from consistency.tracking.records import plan
from consistency.tracking.upload import track_study
from consistency.training import folder as files

Line = dict[str, Any]


@pytest.fixture
def ctm(small_project: Job) -> Job:
    """A training whose history is told to MLflow."""
    return small_project.of("ctm", 0)


def write(job: Job, lines: list[Line]) -> Path:
    """Write the state of a training that has come so far. Returns its folder."""
    files.prepare(job.state, job.key("student"), "test")
    (job.state / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return job.state


def follow(job: Job) -> live.Follower:
    """The follower of a training, to be called by hand."""
    return live.Follower(job, job.state, every=1.0)


def attempt(follower: live.Follower, ended: str = "") -> str:
    """One attempt; with a status, the last one. Returns what it failed of."""
    follower.status = ended
    if ended:
        follower.over.set()
    follower.attempt()
    return follower.trouble


def followed_run(client: Any) -> Any:
    """The run of the training ctm seed 0."""
    return by_name(runs_of(client))["ctm seed 0"]


def losses(client: Any, run: Any) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "training/loss")]


def as_losses(lines: list[Line]) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines]


# --- what arrives


def test_new_lines_arrive_once(ctm: Job, client: Any) -> None:
    lines = history_of(ctm)
    state = write(ctm, lines[:2])
    follower = follow(ctm)
    assert not attempt(follower)
    run = followed_run(client)
    assert losses(client, run) == as_losses(lines[:2])
    assert run.info.status == "RUNNING"
    with (state / "history.jsonl").open("a") as file:
        text = json.dumps(lines[2])
        file.write(text[:20])
        file.flush()
        assert not attempt(follower)
        assert losses(client, run) == as_losses(lines[:2])  # half a line is none
        file.write(text[20:] + "\n")
    assert not attempt(follower) and not attempt(follower)
    assert losses(client, run) == as_losses(lines[:3])


def test_a_live_run_says_what_it_is(small_project: Job, client: Any) -> None:
    job = small_project.of("analytic", 1)
    write(job, [])
    attempt(follow(job))
    runs = by_name(runs_of(client))
    run, parent = runs["analytic seed 1"], runs["analytic"]
    assert next(iter(run.data.params)) == "preconditioning"
    assert run.data.params["preconditioning"] == run.data.tags["preconditioning"] == "analytic"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["study_hash"] == key_of(small_project.study, "report")
    assert (run.data.tags["role"], run.data.tags["state"]) == ("seed", "live")
    assert run.data.tags["mlflow.runColor"] == parent.data.tags["mlflow.runColor"] == "#D55E00"
    assert {"git_commit", "host", "consistency.training"} <= run.data.tags.keys()
    assert parent.info.status == "SCHEDULED"
    data = run.inputs.dataset_inputs[0].dataset
    assert (data.name, json.loads(data.profile)["num_rows"]) == ("digits", 192)


def test_track_completes_the_live_runs_and_makes_no_second_ones(small_project: Job, client: Any) -> None:
    for job in small_project.trainings:
        identity = files.read_identity(write(job, history_of(job)))
        assert not attempt(follow(job), "FINISHED")
        # The training ends: its card says which it was, and its state goes.
        edit_card(job.card("student"), lambda card, made=identity: card.update(training=made))
        shutil.rmtree(job.state)
    before = by_name(runs_of(client))
    assert set(before) == {"ctm", "analytic", *(f"{run} seed {seed}" for run in ("ctm", "analytic") for seed in (0, 1))}
    assert before["ctm seed 0"].info.status == "FINISHED"
    track_study(small_project)
    after = by_name(runs_of(client))
    assert ids(before).items() <= ids(after).items()
    assert len(after) == 8
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    assert {run.data.tags["state"] for run in after.values()} == {"current"}
    for upload in plan(small_project):
        run = after[upload.name]
        assert points_of(client, run) == planned_points(upload)
        assert run.data.params == upload.params
        assert (run.info.start_time, run.info.end_time) == (upload.started, upload.ended)
    track_study(small_project)
    assert ids(by_name(runs_of(client))) == ids(after)


def test_what_is_trained_again_after_a_kill_stands_there_once(ctm: Job, client: Any) -> None:
    """The follower had sent lines that the saved state did not have; their times differ the second time."""
    lines = history_of(ctm)
    write(ctm, lines[:4])
    assert not attempt(follow(ctm), "KILLED")
    assert followed_run(client).info.status == "KILLED"
    again = [line | {"images_per_second": 1.0} for line in lines[2:]]
    write(ctm, lines[:2] + again)
    resumed = follow(ctm)
    assert not attempt(resumed)
    assert followed_run(client).info.status == "RUNNING"
    assert not attempt(resumed, "FINISHED")
    run = followed_run(client)
    assert losses(client, run) == as_losses(lines)
    speeds = client.get_metric_history(run.info.run_id, "training/images_per_second")
    assert [m.step for m in speeds] == [line["step"] for line in lines]


def test_other_settings_are_another_run(ctm: Job, client: Any) -> None:
    write(ctm, [])
    assert not attempt(follow(ctm), "KILLED")
    first = files.read_identity(ctm.state)
    files.prepare(ctm.state, "another key", "test")
    assert files.read_identity(ctm.state)["id"] != first["id"]
    assert not attempt(follow(ctm), "KILLED")
    assert sum(run.info.run_name == "ctm seed 0" for run in runs_of(client)) == 2


def test_the_state_may_be_gone_before_it_was_looked_at(ctm: Job, client: Any) -> None:
    write(ctm, [])
    follower = follow(ctm)
    shutil.rmtree(ctm.state)
    assert not attempt(follower, "FINISHED")
    assert losses(client, followed_run(client)) == as_losses(history_of(ctm))


# --- the machine


def test_the_machines_figures_go_on_after_an_earlier_training_and_after_a_failure(
    ctm: Job, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own monitor ends with the first failure."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    write(ctm, [])
    for _ in range(2):
        follower = follow(ctm)
        assert not attempt(follower) and not attempt(follower)
    with monkeypatch.context() as bad:
        bad.setattr(CPUMonitor, "collect_metrics", lambda self: 1 / 0)
        assert "division" in attempt(follower)
    assert not attempt(follower)
    run = followed_run(client)
    for key in ("system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"):
        assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == [0, 1, 2, 3, 4]


def test_the_machines_figures_can_be_turned_off(ctm: Job, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    write(ctm, [])
    assert not attempt(follow(ctm))
    assert not followed_run(client).data.metrics


# --- a server that fails


@pytest.mark.parametrize("method", ["create_run", "log_inputs", "log_batch"])
@pytest.mark.parametrize("arrives", [True, False])
def test_a_request_that_fails_half_way_doubles_nothing(
    ctm: Job, client: Any, monkeypatch: pytest.MonkeyPatch, method: str, arrives: bool
) -> None:
    """The server may or may not have done what it was asked, before the answer was lost."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    lines = history_of(ctm)
    write(ctm, lines)
    original = getattr(MlflowClient, method)

    def lost(*args: Any, **kwargs: Any) -> Any:
        if arrives:
            original(*args, **kwargs)
        raise MlflowException("Connection lost")

    follower = follow(ctm)
    with monkeypatch.context() as bad:
        bad.setattr(MlflowClient, method, lost)
        assert attempt(follower)
    assert not attempt(follower)
    run = next(run for run in runs_of(client) if run.info.run_name == "ctm seed 0" and run.data.metrics)
    assert losses(client, run) == as_losses(lines)


# --- the thread


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (UserError("diverged"), "FAILED"),
        (SystemExit(143), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_mlflow_hears_how_the_training_ended(
    ctm: Job, client: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, status: str
) -> None:
    monkeypatch.setenv(live.LIVE, "1")
    monkeypatch.setattr(live, "GRACE", 60.0)
    state = write(ctm, history_of(ctm))
    try:
        with live.followed(ctm, state) as start:
            start()
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    run = followed_run(client)
    assert run.info.status == status
    assert losses(client, run) == as_losses(history_of(ctm))


@pytest.mark.parametrize(
    ("uri", "count"),
    [("", 0), ("sqlite:////tmp/mlflow.db", 0), ("http://head:5000", 1), ("postgresql://head/mlflow", 1)],
)
def test_a_job_of_a_cluster_speaks_to_a_server_alone(
    ctm: Job, monkeypatch: pytest.MonkeyPatch, uri: str, count: int
) -> None:
    """Compute nodes and a SQLite file on a network disk do not go together."""
    monkeypatch.setenv(live.LIVE, "1")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started: list[live.Follower] = []
    monkeypatch.setattr(live.Follower, "start", lambda self: started.append(self))
    monkeypatch.setattr(live.Follower, "end", lambda self, status: None)
    with live.followed(ctm, write(ctm, [])) as start:
        start()
    assert len(started) == count


@pytest.mark.parametrize("every", ["0", "-1", "soon"])
def test_a_senseless_pace_is_one_line(small_project: Job, monkeypatch: pytest.MonkeyPatch, every: str) -> None:
    monkeypatch.setenv(live.EVERY, every)
    with (
        pytest.raises(UserError, match="CONSISTENCY_LIVE_EVERY must be a positive number of seconds"),
        live.followed(small_project, Path("state")),
    ):
        pass
