"""What happens on the login node: Snakemake is killed or interrupted, and the next run goes on."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.workflow.checkout import Checkout, wait_for
from tests.workflow.slurm.cluster import NODES, Cluster
from tests.workflow.slurm.submitting import LONGER, LoginNode, differing, login, scored, thaw

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def listed(node: LoginNode) -> str:
    """What `python -m consistency jobs` says."""
    words = [sys.executable, "-m", "consistency", "jobs"]
    environment = node.environment | {"PYTHONPATH": str(node.path / "src")}
    return subprocess.run(words, cwd=node.path, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_killed_and_an_interrupted_run_are_gone_on_with_on_another_node(
    cluster: Cluster, copied: Checkout, undisturbed: dict[str, Any]
) -> None:
    node = login(copied.change(LONGER), cluster)
    target = node.student("ctm")

    # kill -9 of Snakemake alone: the job works on, and no second one is let in beside it.
    run = node.start("--", target)
    frozen = node.freeze("ctm")["ctm"]
    run.kill()
    run.wait()
    (job,) = node.jobs()
    assert job["JobState"] == "RUNNING"
    header, row = listed(node).splitlines()
    assert header.split()[:3] == ["JOB", "WHAT", "STATE"]
    assert row.split()[:4] == [job["JobId"], "student", "tiny_ctm_0", "R"]
    assert row.split()[-1] == str(Path(job["StdOut"]).relative_to(node.path))
    node.checkout.done("--unlock")
    assert node.run("--", target) == 1
    error = re.search(r"(?m)^error: an earlier run of this folder still has jobs .*: (scancel [\d ]+)$", node.output)
    assert error, node.output
    assert len(node.jobs()) == 1
    # What the error advises.
    thaw(frozen)
    cluster.ask(*error[1].split())
    wait_for(lambda: node.queued() == [], "the end of the job", 60)
    assert "student ctm seed 0: stopped at step" in node.log("ctm")
    assert "no jobs of" in listed(node)

    # Ctrl-C: Snakemake cancels its job, which saves.
    run = node.start("--", target)
    frozen = node.freeze("ctm", step=300)["ctm"]
    os.killpg(run.pid, signal.SIGINT)
    thaw(frozen)
    assert run.wait(120) != 0
    wait_for(lambda: node.queued() == [], "the end of the job", 60)
    assert "student ctm seed 0: continues from step" in node.log("ctm")
    assert "student ctm seed 0: stopped at step" in node.log("ctm")
    assert node.checkout.processes() == []

    (other,) = set(NODES) - {node.jobs()[-1]["NodeList"]}
    with cluster.drained(node.jobs()[-1]["NodeList"]):
        node.done("--", target)
    assert node.jobs()[-1]["NodeList"] == other
    assert "student ctm seed 0: continues from step" in node.log("ctm")
    assert [job["JobState"] for job in node.jobs()] == ["CANCELLED", "CANCELLED", "COMPLETED"]
    assert differing(scored(node.checkout, "ctm"), undisturbed) == []
