"""The discrepancy of a coupling's flow: the teacher's in closed form, and the pairs that it is measured on."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.draws import seeded
from tests.nets.small import make_denoiser

from consistency.training.discrepancy import ImagePairs, by_teacher


@pytest.mark.parametrize("batch", [3, 64])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_teachers_discrepancy_is_its_denoising_error(batch: int, labelled: bool) -> None:
    """A network that is zero: D = c_skip x_t, and R_t is ||x - c_skip (x + t z)||^2 / t^2."""
    teacher = make_denoiser(0, label_dim=10 if labelled else 0)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.zero_()
    images, noise = torch.randn(7, 1, 4, 4), torch.randn(7, 1, 4, 4)
    labels = torch.arange(7) if labelled else None
    for t in (0.002, 0.7, 80.0):
        kept = 0.25 / (0.25 + t**2)
        expected = ((images - kept * (images + t * noise)) / t).square().flatten(1).sum(1)
        found: Any = by_teacher(teacher, ImagePairs(images, labels, noise, batch), t)
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3)


def test_ot_stays_within_its_batches_and_classes() -> None:
    draws = seeded()
    images, noise = torch.randn(11, 1, 2, 2, generator=draws), torch.randn(11, 1, 2, 2, generator=draws)
    labels = torch.arange(11) % 2
    moved = ImagePairs(images, labels, noise, 64).transported(4).noise
    assert len(moved) == 8
    for first in (0, 4):
        for label in (0, 1):
            rows = [k for k in range(first, first + 4) if labels[k] == label]
            assert {tuple(row) for row in moved[rows].flatten(1).tolist()} == {
                tuple(row) for row in noise[rows].flatten(1).tolist()
            }
    assert len(ImagePairs(images, None, noise, 64).transported(64).noise) == 11
