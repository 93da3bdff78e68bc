"""One Slurm for the tests of a worker, and one undisturbed training for them to be compared with."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from tests.workflow.checkout import LONGER, Checkout
from tests.workflow.slurm.cluster import Cluster
from tests.workflow.slurm.submitting import scored


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own takes root")
    with Cluster() as started:
        yield started


@pytest.fixture(scope="session")
def undisturbed(finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers of a longer student that was trained on this machine without Slurm."""
    checkout = finished.copy(tmp_path_factory.mktemp("undisturbed") / "copied").change(LONGER)
    checkout.done("results/tiny/students/ctm/seed0/student.safetensors")
    numbers = scored(checkout, "ctm")
    assert len(numbers) >= 8
    return numbers
