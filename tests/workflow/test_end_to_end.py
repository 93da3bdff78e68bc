"""The whole in one piece: a clone, `dvc repro`, Snakemake, and a tracking server."""

import shutil
from pathlib import Path

from tests.tracking.servers import tracking_server
from tests.workflow.checkout import Checkout
from tests.workflow.dvc_repo import JOBS, PLAN, Repo

from consistency.tracking import server


def test_everything_is_there_git_sees_the_lock_alone_and_again_nothing_runs(finished: Checkout) -> None:
    repo = Repo(finished.path)
    assert (repo.path / "results/tiny/report/report.html").stat().st_size > 10_000
    assert set(repo.locked()) == JOBS | {PLAN}
    assert repo.git("show", "--name-only", "--format=", "HEAD").split() == ["dvc.lock"]
    assert repo.unsound() == []
    assert repo.repro() == set()
    assert "up to date" in repo.dvc("status")


def test_a_server_is_sent_every_run_of_the_study(copied: Checkout, tmp_path: Path) -> None:
    shutil.rmtree(copied.path / "results/tiny/track")
    database = (copied.path / "mlflow.db").read_bytes()
    with tracking_server(tmp_path, "sqlite:///server.db") as started:
        copied.variables["MLFLOW_TRACKING_URI"] = started.url
        assert copied.planned() == {"track"}
        copied.done()
        client = server.connect(started.url)
        experiment = client.get_experiment_by_name("tiny")
        assert experiment is not None
        runs = {run.info.run_name: run for run in server.find_runs(client, experiment.experiment_id)}
    assert {"ctm seed 0", "analytic seed 0", "teacher"} <= runs.keys()
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["ctm seed 0"].data.metrics["training/loss"] > 0
    assert (copied.path / "mlflow.db").read_bytes() == database
