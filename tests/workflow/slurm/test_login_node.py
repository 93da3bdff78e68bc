"""Snakemake is killed or interrupted on the login node, and the next run goes on."""

import os
import signal
from typing import Any

import pytest
from tests.processes import wait_until
from tests.workflow.checkout import LONGER, Checkout, scored
from tests.workflow.slurm.cluster import NODES, Cluster
from tests.workflow.slurm.submitting import differing, login, thaw

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def test_a_killed_and_an_interrupted_run_are_gone_on_with_on_another_node(
    cluster: Cluster, copied: Checkout, undisturbed: dict[str, Any]
) -> None:
    node = login(copied.change(LONGER), cluster)
    target = node.student("ctm")

    # kill -9 of Snakemake alone: the job works on, and saves when it is cancelled.
    run = node.start("--", target)
    frozen = node.freeze("ctm")["ctm"]
    run.kill()
    run.wait()
    (job,) = node.jobs()
    assert job["JobState"] == "RUNNING"
    thaw(frozen)
    cluster.ask("scancel", job["JobId"])
    wait_until(lambda: node.queued() == [], "the end of the job", 60)
    # Slurm may call the job cancelled a moment before its processes have ended.
    wait_until(lambda: "student ctm seed 0: stopped at step" in node.log("ctm"), "the saved state", 60)
    copied.done("--unlock")

    # Ctrl-C: Snakemake cancels its job, which saves.
    run = node.start("--", target)
    frozen = node.freeze("ctm", step=300)["ctm"]
    os.killpg(run.pid, signal.SIGINT)
    thaw(frozen)
    assert run.wait(120) != 0
    wait_until(lambda: node.queued() == [], "the end of the job", 60)
    assert "student ctm seed 0: continues from step" in node.log("ctm")
    wait_until(lambda: "student ctm seed 0: stopped at step" in node.log("ctm"), "the saved state", 60)
    wait_until(lambda: node.processes() == [], "the end of its processes", 60)

    (other,) = set(NODES) - {node.jobs()[-1]["NodeList"]}
    with cluster.drained(node.jobs()[-1]["NodeList"]):
        node.done("--", target)
    assert node.jobs()[-1]["NodeList"] == other
    assert "student ctm seed 0: continues from step" in node.log("ctm")
    assert [job["JobState"] for job in node.jobs()] == ["CANCELLED", "CANCELLED", "COMPLETED"]
    assert differing(scored(node, "ctm"), undisturbed) == []
