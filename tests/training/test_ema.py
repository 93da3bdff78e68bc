"""The average of the weights against its closed forms."""

import pytest
import torch
from tests.nets.small import make_denoiser

from consistency.training.ema import Ema, half_life_rate, warmed_up


def test_the_average_of_constant_weights_is_a_geometric_series() -> None:
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


def test_a_rate_of_0_copies_the_model_and_the_model_is_left_alone() -> None:
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


def test_warm_up_forgets_the_first_weights_and_ends_at_the_rate() -> None:
    model = make_denoiser(0).double()
    average = Ema(model, 0.999, warm_up=1.0)
    assert average.constant == 0.999
    with torch.no_grad():
        for p in model.parameters():
            p += 1
        average.update(1)
        for p in model.parameters():
            p += 1
        average.update(2)
    for p, mean in zip(model.parameters(), average.model.parameters(), strict=True):
        # Exponent 1 is the plain mean of the weights after each step; those before the first have no part in it.
        torch.testing.assert_close(mean, p - 0.5, rtol=1e-12, atol=1e-12)
    assert average.rate(1_000_000) == 0.999


def test_the_warm_up_is_the_library_s_of_the_released_gc_code() -> None:
    """ema_pytorch counts from 0: 1 - (1 + epoch / inv_gamma)^-power with its defaults 1 and 2/3, at most beta."""
    for step in (1, 2, 10, 1000, 100_000):
        assert warmed_up(0.9999, step) == pytest.approx(1 - (1 + (step - 1)) ** (-2 / 3))
    assert warmed_up(0.9999, 2_000_000) == 0.9999
