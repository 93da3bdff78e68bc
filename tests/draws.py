"""Random numbers of the tests. CONSISTENCY_TEST_SEED=1, 2, ... gives them other seeds (`make test-processors`)."""

import os

import numpy as np
import torch

#: where the seeds of the tests begin
SEED = 1000 * int(os.environ.get("CONSISTENCY_TEST_SEED", "0"))


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of PyTorch."""
    return torch.Generator().manual_seed(SEED + seed)


def numpy_draws(seed: int = 0) -> np.random.Generator:
    """A generator of NumPy."""
    return np.random.default_rng(SEED + seed)
