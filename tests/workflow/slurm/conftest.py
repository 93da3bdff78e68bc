"""One Slurm for the tests of a worker."""

import os
from collections.abc import Iterator

import pytest
from tests.workflow.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own takes root")
    with Cluster() as started:
        yield started
