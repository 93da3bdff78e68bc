"""The average of the weights against its closed forms."""

from collections.abc import Callable

import pytest
import torch

from consistency.nets.denoiser import Denoiser
from consistency.training.ema import Ema, half_life_rate


def test_the_average_of_constant_weights_is_a_geometric_series(make_denoiser: Callable[..., Denoiser]) -> None:
    model = make_denoiser(0).double()
    average = Ema(model, 0.9)
    start = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    for step in range(1, 11):
        average.update(step)
    for p, first in zip(average.model.parameters(), start, strict=True):
        torch.testing.assert_close(p, first + 1 - 0.9**10, rtol=1e-12, atol=1e-14)


def test_a_rate_of_0_copies_the_model_and_the_model_is_left_alone(make_denoiser: Callable[..., Denoiser]) -> None:
    model = make_denoiser(0)
    average = Ema(model, lambda step: 0.5 - step / 2)
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p *= 2
    average.update(1)
    for a, p, first in zip(average.model.parameters(), model.parameters(), before, strict=True):
        assert torch.equal(a, p)
        assert torch.equal(p, 2 * first)
        assert not a.requires_grad
        assert p.requires_grad
    assert not average.model.training


@pytest.mark.parametrize(("batch", "seen"), [(512, 0), (512, 512), (512, 10_000), (64, 10_000_000), (1, 77)])
def test_the_rate_is_EDMs_formula(batch: int, seen: int) -> None:
    """As in training_loop.py of NVlabs/edm, with --ema=0.5 and its ramp-up of 0.05."""
    ema_halflife_nimg = min(500_000, seen * 0.05)
    ema_beta = 0.5 ** (batch / max(ema_halflife_nimg, 1e-8))
    assert half_life_rate(batch, seen, 500_000, 0.05) == ema_beta


def test_after_a_half_life_of_images_half_of_the_old_weights_are_left() -> None:
    rate = half_life_rate(100, 10**9, 50_000, 0.05)
    assert rate ** (50_000 / 100) == pytest.approx(0.5)
