"""The denoiser of a coupling: what its loss is, and that its error is the velocity discrepancy in closed form."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.draws import seeded
from tests.nets.small import make_denoiser
from torch import Tensor

from consistency.theory.coupling import assignment
from consistency.theory.curriculum import DoublingCurriculum
from consistency.theory.distance import squared_l2
from consistency.theory.preconditioning import build_preconditioning
from consistency.theory.solver import expand
from consistency.training.consistency_training import ConsistencyTraining, TransportTraining
from consistency.training.coupled_denoising import CoupledDenoising, TransportDenoising
from consistency.training.update import Stream, Update

# Gaussian data of these variances, one a pixel, shape [1, 1, 2, 2].
C = torch.tensor([0.1, 0.4, 1.0, 2.5], dtype=torch.float64).reshape(1, 1, 2, 2)


def slope(t: Tensor, x: Tensor) -> Tensor:
    """k of the exact endpoint k x_t of Gaussian data."""
    return torch.sqrt(C / (C + expand(t, x) ** 2))


class Exact(ConsistencyTraining):
    """gc with the exact endpoint in the predictor's place."""

    def endpoint(self, model: Any, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return slope(t, x) * x


def build(kind: Any, coupling: Any, model: Any, mu: float = 0.0) -> Any:
    schedule, preconditioning = DoublingCurriculum(steps=80), build_preconditioning("cm", 0.5, None)
    student: Any = SimpleNamespace(second_time=False)
    return kind(model, coupling(student, student, preconditioning, squared_l2, schedule, mu=mu))


def of_ic(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """E[x | x_t] of independent noise."""
    return C / (C + expand(t, x) ** 2) * x


def of_gc(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """E[x_hat | x_t] with x_hat = k (x* + t z), x_t = x_hat + t z: both are Gaussian."""
    k, t = slope(t, x), expand(t, x)
    return (C + k * t**2) / (C + t**2 + 2 * k * t**2) * x


@pytest.mark.statistical
@pytest.mark.parametrize("t", [0.1, 0.7, 5.0])
def test_the_error_of_the_exact_denoiser_is_the_discrepancy_in_closed_form(t: float) -> None:
    """docs/generator-induced-flows.md: R_t of ic and gc on Gaussian data."""
    generator = seeded()
    z = torch.randn(200_000, 1, 2, 2, generator=generator, dtype=torch.float64)
    images = C.sqrt() * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    k = torch.sqrt(C / (C + t**2))
    closed = {0.0: (C / (C + t**2)).sum(), 1.0: (C**2 / ((C + t**2) * (C + t**2 + 2 * k * t**2))).sum()}
    for mu, denoiser, wrong in ((0.0, of_ic, of_gc), (1.0, of_gc, of_ic)):
        objective = build(CoupledDenoising, Exact, None, mu)
        found, worse = (objective.discrepancy(D, images, None, z, t, seeded()).mean() for D in (denoiser, wrong))
        assert found.item() == pytest.approx(closed[mu].item(), rel=0.02)
        assert worse > found


def test_the_loss_is_edms_on_the_coupled_images() -> None:
    model = make_denoiser(0, img_resolution=2)
    objective = build(CoupledDenoising, Exact, model, mu=0.5)
    images = torch.randn(64, 1, 2, 2, generator=seeded(1))
    draws = objective.draw((64, 1, 2, 2), 0, seeded(), seeded())
    assert 10 < draws.generated.sum() < 54
    (term,) = objective.terms(images, None, draws)
    noised = images + expand(draws.t, images) * draws.z
    data = torch.where(draws.generated[:, None, None, None], slope(draws.t, images) * noised, images)
    x = data + expand(draws.t, images) * draws.z
    weight = (draws.t**2 + 0.25) / (0.5 * draws.t) ** 2
    expected = (expand(weight, x) * (model(x, draws.t) - data) ** 2).mean()
    torch.testing.assert_close(term.value, expected.to(term.value.dtype), rtol=1e-5, atol=0)
    assert term.evaluations == 4 * 64
    assert draws.t.min() >= 0.002 and draws.t.max() <= 80


def test_ot_exchanges_the_noise_of_the_whole_batch() -> None:
    model = make_denoiser(0)
    seen = []

    class Watched(TransportDenoising):
        def terms(self, images: Tensor, labels: Tensor | None, draws: Any) -> Any:
            seen.append(draws)
            return super().terms(images, labels, draws)

    objective = build(Watched, TransportTraining, model)
    images = torch.randn(16, 1, 4, 4, generator=seeded(1))
    stream = Stream(lambda step: (images, None), 16, 8, 0, "t")
    update = Update(model, torch.optim.Adam(model.parameters()), objective, stream)
    update.step(0)
    z = torch.cat([draws.z for draws in seen])
    assert torch.equal(assignment(images, z), torch.arange(16))
    assert len(seen) == 2
