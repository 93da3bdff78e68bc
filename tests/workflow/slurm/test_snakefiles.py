"""Jobs read the Snakefile that was named when they were submitted: the main one, or that of a module."""

import pytest
from tests.workflow.checkout import Checkout, as_module
from tests.workflow.slurm.cluster import Cluster
from tests.workflow.slurm.submitting import LoginNode, login

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

DATASET = "results/tiny/dataset/images.npy"


def makes_the_dataset(node: LoginNode, *words: str) -> None:
    node.done(*words, "--", DATASET)
    (job,) = node.jobs()
    assert (job["Comment"], job["JobState"]) == ("rule_dataset_wildcards_tiny", "COMPLETED")


def test_a_job_of_the_main_file_reads_it(cluster: Cluster, checkout: Checkout) -> None:
    makes_the_dataset(login(checkout, cluster), "-s", "workflow/Snakefile")


def test_a_job_of_a_module_reads_its_file_and_what_would_wait_is_refused(cluster: Cluster, checkout: Checkout) -> None:
    node = login(checkout.copy(checkout.path.with_name("of one's own")), cluster)
    (node.path / "Snakefile").unlink()
    as_module(node.path, checkout.path)
    makes_the_dataset(node)
    (node.path / DATASET).unlink()
    assert node.site(dataset={"slurm_partition": "nowhere"}).run("--", DATASET) == 1
    assert "rule dataset asks for partition nowhere" in node.output.splitlines()[-1]
    assert len(node.jobs()) == 1
