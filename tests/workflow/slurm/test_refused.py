"""A request that cannot work is one line, before anything is submitted if Slurm knows it before."""

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from tests.workflow.checkout import Checkout, fresh
from tests.workflow.slurm.cluster import Cluster
from tests.workflow.slurm.submitting import LoginNode, login

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

DATASET = "results/tiny/dataset/images.npy"


@pytest.fixture(scope="module")
def nowhere(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> LoginNode:
    """A study whose images are not there."""
    checkout = fresh(tmp_path_factory.mktemp("nowhere") / "checkout")
    checkout = checkout.change({"dataset.kind": "image_folder", "dataset.path": "data/nowhere"}, "nowhere")
    return login(checkout, cluster).site({"retries": 1, "slurm-init-seconds-before-status-checks": 8})


@pytest.fixture(scope="module", autouse=True)
def run(nowhere: LoginNode) -> Iterator[subprocess.Popen[str]]:
    """A Snakemake that submits waits most of the time: it is started first, and looked at last."""
    with nowhere.running() as started:
        yield started


def refusal(node: LoginNode) -> str:
    """The error of a run that submits nothing: all that it says after Snakemake's own lines."""
    assert node.run("--", DATASET) == 1
    lines = node.output.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error == lines[-1]
    assert "Traceback" not in node.output
    assert node.jobs() == []
    return error


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        ({"slurm_partition": "nowhere"}, "rule dataset asks for partition nowhere; this cluster has cpu, gpu, short"),
        ({"slurm_partition": "short"}, "rule dataset asks for 720 minutes, but partition short gives 2 at most"),
    ],
)
def test_what_the_cluster_cannot_give_is_not_submitted(
    cluster: Cluster, checkout: Checkout, resources: dict[str, Any], said: str
) -> None:
    assert re.search(said, refusal(login(checkout, cluster).site(dataset=resources)))


def test_a_job_that_always_fails_ends_with_its_error_and_its_log(
    nowhere: LoginNode, run: subprocess.Popen[str]
) -> None:
    assert run.wait(600) == 1
    jobs = nowhere.jobs()
    assert [(job["JobState"], job["Comment"]) for job in jobs] == [("FAILED", "rule_dataset_wildcards_nowhere")] * 2
    # show-failed-logs: each time the log of the stage and that of the job.
    error = "error: dataset.path: there is no folder data/nowhere/train "
    assert nowhere.output.count(error) == 2 * len(jobs)
    logs = "logs/slurm/rule_dataset/nowhere/"
    assert {file.stem for file in (nowhere.path / logs).iterdir()} == {job["JobId"] for job in jobs}
    assert "Traceback" not in nowhere.output
