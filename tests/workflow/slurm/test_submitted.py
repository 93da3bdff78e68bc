"""The literal command, through the real sbatch: the tiny study from nothing to MLflow."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.processes import PROXIES, wait_until
from tests.tracking.servers import TrackingServer, tracking_server
from tests.workflow.checkout import LONGER, NUMBERS, Checkout, fresh
from tests.workflow.dvc_repo import origin
from tests.workflow.slurm.cluster import Cluster
from tests.workflow.slurm.submitting import LoginNode, differing, login

from consistency.tracking import server

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

#: the comments of the jobs that Slurm shall have: one for each job that is not cheap
SUBMITTED = {"dataset", "teacher", "extractor", "coefficients", "teacher_samples", "calibration"}
SUBMITTED = {f"rule_{stage}_wildcards_tiny" for stage in SUBMITTED} | {
    f"rule_{stage}_wildcards_tiny_{run}_0" for stage in ("student", "samples", "scores") for run in ("ctm", "analytic")
}


@pytest.fixture(scope="module")
def node(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> LoginNode:
    return login(fresh(tmp_path_factory.mktemp("submitted") / "a checkout"), cluster)


@pytest.fixture(scope="module", autouse=True)
def run(node: LoginNode) -> Iterator[subprocess.Popen[str]]:
    """A Snakemake that submits waits most of the time: it is started first, and looked at last."""
    with node.running() as started:
        yield started


@pytest.fixture(scope="module")
def submitted(node: LoginNode, run: subprocess.Popen[str]) -> LoginNode:
    """The checkout after that run."""
    assert run.wait(900) == 0, node.output
    return node


@pytest.fixture
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingServer]:
    """A server of MLflow, reached directly."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    with tracking_server(tmp_path, "sqlite:///server.db") as started:
        yield started


def seen(url: str) -> tuple[str, str, list[int]]:
    """The status, the Slurm job and the steps of the student's run, as a server knows them."""
    client = server.connect(url)
    experiment = client.get_experiment_by_name("tiny")
    runs = [] if experiment is None else server.find_runs(client, experiment.experiment_id)
    for run in runs:
        if run.info.run_name == "ctm seed 0":
            points = client.get_metric_history(run.info.run_id, "training/loss")
            return run.info.status, run.data.tags.get("slurm_job", ""), [point.step for point in points]
    return "", "", []


def test_a_job_is_followed_by_a_server(cluster: Cluster, copied: Checkout, tracking: TrackingServer) -> None:
    database = (copied.path / "mlflow.db").read_bytes()
    live = {"CONSISTENCY_LIVE": "1", "CONSISTENCY_LIVE_EVERY": "0.2", "MLFLOW_TRACKING_URI": tracking.url}
    longer = LONGER | {"student.steps": 2000, "student.snapshot_every": 1000}
    followed = login(copied.change(longer), cluster).with_variables(**live)
    with followed.running("--", followed.student("ctm")) as training:
        wait_until(lambda: seen(tracking.url)[2] or training.poll() is not None, "its points while it goes on", 300)
        assert training.poll() is None, followed.output
        assert seen(tracking.url)[:2] == ("RUNNING", followed.jobs()[0]["JobId"])
        assert training.wait(600) == 0, followed.output
    wait_until(lambda: seen(tracking.url)[0] == "FINISHED", "its end", 60)
    assert seen(tracking.url)[2] == list(range(20, 2001, 20))
    assert (followed.path / "mlflow.db").read_bytes() == database


def test_a_stage_of_dvc_goes_through_sbatch(cluster: Cluster, tmp_path: Path) -> None:
    repo = origin(tmp_path / "repo")
    other = login(repo.checkout, cluster)
    repo.variables.update(SNAKEMAKE_PROFILE="slurm", PATH=other.environment["PATH"])
    assert repo.repro("dataset@tiny") == {"plan@tiny", "dataset@tiny"}
    (job,) = other.jobs()
    assert (job["Comment"], job["JobState"]) == ("rule_dataset_wildcards_tiny", "COMPLETED")
    assert repo.repro("dataset@tiny") == set()


def test_every_result_has_the_same_bits(submitted: LoginNode, finished: Checkout) -> None:
    found, expected = submitted.results(*NUMBERS), finished.results(*NUMBERS)
    assert len(found) > 30
    assert differing(found, expected) == []


def test_each_job_is_submitted_once(submitted: LoginNode) -> None:
    assert [(job["JobState"], job["Restarts"]) for job in submitted.jobs()] == [("COMPLETED", "0")] * len(SUBMITTED)
    assert {job["Comment"] for job in submitted.jobs()} == SUBMITTED
    (name,) = {job["JobName"] for job in submitted.jobs()}
    assert name.startswith("consistency_")


def test_cheap_jobs_run_on_the_login_node(submitted: LoginNode) -> None:
    for name in ("report", "track"):
        first = (submitted.path / f"logs/tiny/{name}.log").read_text().splitlines()[0]
        assert first.startswith("--- ")
        assert "Slurm job" not in first
    assert (submitted.path / "mlflow.db").exists()


# Comment: the fields of `scontrol show job`
ASKED: dict[str, dict[str, Any]] = {
    "rule_dataset_": {"Partition": "cpu", "TimeLimit": "12:00:00", "CPUs/Task": "8", "MinMemoryNode": "8000M"},
    "rule_student_": {"Partition": "gpu", "TimeLimit": "1-00:00:00", "TresPerNode": "gres:gpu:1"},
    "rule_samples_": {"Partition": "gpu", "TimeLimit": "1-00:00:00", "TresPerJob": "gres:gpu:1"},
    "rule_calibration_": {"Partition": "gpu", "TimeLimit": "04:00:00", "MinMemoryNode": "32000M"},
}


@pytest.mark.parametrize("rule", ASKED)
def test_what_the_profile_asks_for_arrives(submitted: LoginNode, rule: str) -> None:
    job = submitted.jobs(rule)[0]
    assert {field: job.get(field) for field in ASKED[rule]} == ASKED[rule]
    assert job["Requeue"] == "1"
    assert "TresPerNode" in job or "TresPerJob" in job or rule == "rule_dataset_"


def test_every_job_has_a_log_that_names_it(submitted: LoginNode) -> None:
    for job in submitted.jobs():
        rule, wildcards = job["Comment"].split("_wildcards_")
        log = submitted.path / "logs/slurm" / rule / wildcards / f"{job['JobId']}.log"
        assert job["StdOut"] == str(log)
        assert f", Slurm job {job['JobId']}\n" in log.read_text()
    (student,) = submitted.jobs("rule_student_wildcards_tiny_ctm_")
    assert submitted.log("ctm").splitlines()[0].endswith(f", Slurm job {student['JobId']}")


def test_the_same_command_again_submits_nothing(submitted: LoginNode) -> None:
    before = submitted.jobs()
    assert "Nothing to be done" in submitted.done()
    assert submitted.jobs() == before
