"""Trainings on a cluster that are disturbed in every way end with the same bits as one that is not."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tests.processes import wait_until
from tests.workflow.checkout import LONGER, Checkout, scored
from tests.workflow.slurm.cluster import NODES, Cluster
from tests.workflow.slurm.submitting import LoginNode, differing, login, thaw, thaw_when_called

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

#: students with the same settings, by what happens to them. ctm: the daemons are restarted, as for all
STUDENTS = ["ctm", "cancelled", "killed", "limited", "refused"]
#: of those, the ones whose jobs have two minutes: after one and a half they save
SHORT = ("limited", "refused")


@pytest.fixture(scope="module")
def disturbed(cluster: Cluster, finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoginNode]:
    """Five students in one run. Those whose jobs are short start alone, and stand still until their time is over. The
    others stand still while the daemons of the nodes and the controller are stopped and started, and then meet their
    fates. None is quick enough to escape."""
    checkout = finished.copy(tmp_path_factory.mktemp("disturbed") / "copied")
    checkout.change({**LONGER, "students": {name: {"preconditioning": "ctm"} for name in STUDENTS}})
    short = f"wildcards.student in {SHORT}"
    resources = {"slurm_partition": f'"short" if {short} else "gpu"', "runtime": f"2 if {short} else 60"}
    node = login(checkout, cluster).site(student=resources).with_variables(CONSISTENCY_LIVE="1")
    cluster.ask("scontrol", "update", "PartitionName=gpu", "State=DOWN")
    with node.running("--", *map(node.student, STUDENTS)) as run:
        # As where the site does not let jobs be started again.
        wait_until(lambda: node.jobs("_refused_") != [], "the job of refused", 60)
        cluster.ask("scontrol", "update", f"JobId={node.jobs('_refused_')[0]['JobId']}", "Requeue=0")
        for trainer in node.freeze(*SHORT).values():
            Thread(target=thaw_when_called, args=(trainer, signal.SIGALRM), daemon=True).start()
        cluster.ask("scontrol", "update", "PartitionName=gpu", "State=UP")
        trainers = node.freeze("ctm", "cancelled", "killed")
        for name in (*NODES, "slurmctld"):
            cluster.stop(name)
            time.sleep(0.5)
            cluster.start(name)
        wait_until(cluster.answers, "an answer of the controller", 60)
        for trainer in trainers["killed"]:
            trainer.kill()
        thaw(trainers["ctm"] + trainers["cancelled"])
        cluster.ask("scancel", node.jobs("_cancelled_")[0]["JobId"])
        assert run.wait(600) == 0, node.output
        yield node


@pytest.mark.parametrize("run", STUDENTS)
def test_every_result_has_the_same_bits(disturbed: LoginNode, undisturbed: dict[str, Any], run: str) -> None:
    assert differing(scored(disturbed, run), undisturbed) == []


def ends(node: LoginNode, run: str) -> list[str]:
    """The ends of a student's jobs."""
    return [job["JobState"] for job in node.jobs(f"_{run}_")]


def restarts(node: LoginNode, run: str) -> list[int]:
    """The number of times that Slurm started each of a student's jobs again."""
    return [int(job["Restarts"]) for job in node.jobs(f"_{run}_")]


def logs_of(node: LoginNode, run: str) -> list[str]:
    """The output of a student's jobs, every time that they were started."""
    return [Path(job["StdOut"]).read_text(encoding="utf-8") for job in node.jobs(f"_{run}_")]


def test_daemons_that_restart_disturb_no_job(disturbed: LoginNode) -> None:
    assert ends(disturbed, "ctm") == ["COMPLETED"]
    assert restarts(disturbed, "ctm") == [0]
    assert "continues from step" not in logs_of(disturbed, "ctm")[0]


def test_a_cancelled_training_saves_and_is_submitted_again(disturbed: LoginNode) -> None:
    assert ends(disturbed, "cancelled") == ["CANCELLED", "COMPLETED"]
    first, second = logs_of(disturbed, "cancelled")
    assert "student cancelled seed 0: stopped at step" in first
    assert "student cancelled seed 0: continues from step" in second


def test_a_killed_training_is_submitted_again(disturbed: LoginNode) -> None:
    assert ends(disturbed, "killed") == ["FAILED", "COMPLETED"]


# On a machine so busy that a job takes more than a minute to begin, a later one may fail, and a third do the rest.
def test_a_training_whose_time_is_over_goes_on_in_the_same_job(disturbed: LoginNode) -> None:
    assert ends(disturbed, "limited")[-1] == "COMPLETED"
    assert restarts(disturbed, "limited")[0] >= 1
    first = logs_of(disturbed, "limited")[0]
    assert "student limited seed 0: stopped at step" in first
    assert "time limit reached: Slurm has requeued the job" in first
    assert "student limited seed 0: continues from step" in first


def test_where_slurm_does_not_start_it_again_snakemake_submits_it_again(disturbed: LoginNode) -> None:
    assert ends(disturbed, "refused")[0] in ("FAILED", "TIMEOUT")
    assert restarts(disturbed, "refused")[0] == 0
    assert ends(disturbed, "refused")[-1] == "COMPLETED"
    logs = logs_of(disturbed, "refused")
    assert "Slurm did not requeue this job" in logs[0]
    assert any("student refused seed 0: continues from step" in log for log in logs[1:])


def test_jobs_leave_a_database_on_a_shared_disk_alone_and_nothing_behind(
    disturbed: LoginNode, finished: Checkout
) -> None:
    assert (disturbed.path / "mlflow.db").read_bytes() == (finished.path / "mlflow.db").read_bytes()
    assert disturbed.litter() == []
    assert disturbed.states() == []
