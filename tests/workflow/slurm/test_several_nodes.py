"""One student is trained by two nodes together, and goes on with another number of them."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.workflow.checkout import LONGER, Checkout, scored
from tests.workflow.slurm.cluster import Cluster
from tests.workflow.slurm.submitting import LoginNode, differing, login, thaw, thaw_when_called

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

SHORTER = {**LONGER, "student.steps": 400, "student.snapshot_every": 200}
#: ctm has jobs of two minutes, and two nodes always; narrowed has one node when it is submitted again
CTM = 'wildcards.student == "ctm"'
RESOURCES = {
    "slurm_partition": f'"short" if {CTM} else "gpu"',
    "runtime": f"2 if {CTM} else 60",
    "nodes": f"2 if {CTM} or attempt == 1 else 1",
    "tasks": f"2 if {CTM} or attempt == 1 else 1",
    "mpi": f'"srun" if {CTM} or attempt == 1 else ""',
}


@pytest.fixture(scope="module")
def two_processes(finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of the student as two processes of this machine train it, without Slurm."""
    checkout = finished.copy(tmp_path_factory.mktemp("two") / "copied").change(SHORTER)
    checkout.done("results/tiny/students/ctm/seed0/student.safetensors", "--set-resources", "student:gpu=2")
    return scored(checkout, "ctm")


@pytest.fixture(scope="module")
def wide(cluster: Cluster, finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> LoginNode:
    """Two students on two nodes each: the time of one is over while it trains; the other is cancelled."""
    checkout = finished.copy(tmp_path_factory.mktemp("wide") / "copied")
    checkout.change({**SHORTER, "students": {name: {"preconditioning": "ctm"} for name in ("ctm", "narrowed")}})
    node = login(checkout, cluster).site(student=RESOURCES)
    with node.running("--", node.student("ctm"), node.student("narrowed")) as run:
        frozen = node.freeze("ctm", "narrowed")
        cluster.ask("scancel", node.jobs("_narrowed_")[0]["JobId"])
        thaw(frozen["narrowed"])
        thaw_when_called(frozen["ctm"], signal.SIGALRM)
        assert run.wait(600) == 0, node.output
    return node


def test_two_nodes_are_two_processes_whose_time_may_be_over(wide: LoginNode, two_processes: dict[str, Any]) -> None:
    job = wide.jobs("_ctm_")[0]
    assert (job["NumNodes"], job["NumTasks"], job["TresPerNode"]) == ("2", "2", "gres:gpu:1")
    assert "student ctm seed 0: stopped at step" in Path(job["StdOut"]).read_text(encoding="utf-8")
    assert int(job["Restarts"]) >= 1
    assert differing(scored(wide, "ctm"), two_processes) == []


def test_it_goes_on_with_another_number_of_nodes(wide: LoginNode, two_processes: dict[str, Any]) -> None:
    first, second = wide.jobs("_narrowed_")
    assert (first["NumNodes"], first["JobState"]) == ("2", "CANCELLED")
    assert (second["NumNodes"], second["JobState"]) == ("1", "COMPLETED")
    assert "student narrowed seed 0: continues from step" in wide.log("narrowed")
    # Another number of processes adds in another order, and hundreds of steps enlarge the last bit of the difference.
    weights = "students/seed0/student.safetensors"
    found, expected = scored(wide, "narrowed")[weights], two_processes[weights]
    assert set(found) == set(expected)
    for name in found:
        a, b = np.frombuffer(found[name], np.float32), np.frombuffer(expected[name], np.float32)
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3, err_msg=name)
