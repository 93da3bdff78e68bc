"""Denoisers of other libraries: the Gaussian written in each convention has the closed form, and the real libraries."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import mistake
from tests.draws import seeded
from torch import Tensor, nn

from consistency import fit_preconditioning
from consistency.nets.adapters import Adapted, from_diffusers, from_edm, from_flow, from_k_diffusion
from consistency.theory.estimators import Mode
from consistency.theory.oracles import GaussianTeacher

VARIANCES = torch.tensor([0.01, 0.1, 0.25, 1.0, 2.0], dtype=torch.float64)
GAUSSIAN = GaussianTeacher(VARIANCES)
#: DDPM's linear schedule
KEPT = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
RAMP = ((1 - KEPT) / KEPT).sqrt().log()
LOW, HIGH = 0.02, 80.0


def sigma_of(step: Tensor) -> Tensor:
    """The noise level at a real number of steps, linear in the logarithm between them."""
    low = step.detach().long().clamp(max=len(RAMP) - 2)
    return (RAMP[low] + (step - low) * (RAMP[low + 1] - RAMP[low])).exp()


def scheduler(kind: str, kept: Tensor = KEPT) -> Any:
    return SimpleNamespace(alphas_cumprod=kept, config=SimpleNamespace(prediction_type=kind))


def diffusers(kind: str) -> Adapted:
    """A network of diffusers that predicts that of the Gaussian's x_k = sqrt(a) x_0 + sqrt(1 - a) z."""

    def unet(x_k: Tensor, step: Tensor) -> SimpleNamespace:
        sigma = sigma_of(step)[:, None]
        kept = 1 / (1 + sigma**2)
        x_0 = GAUSSIAN(x_k / kept.sqrt(), sigma[:, 0])
        z = (x_k - kept.sqrt() * x_0) / (1 - kept).sqrt()
        outputs = {"epsilon": z, "sample": x_0, "v_prediction": kept.sqrt() * z - (1 - kept).sqrt() * x_0}
        return SimpleNamespace(sample=outputs[kind])

    return from_diffusers(unet, scheduler(kind))


def velocity(x_t: Tensor, t: Tensor) -> Tensor:
    """E[z - x_0 | x_t] of x_t = (1 - t) x_0 + t z, from the joint covariance of both with x_t."""
    near, far = 1 - t[:, None], t[:, None]
    return (far - near * VARIANCES) / (near**2 * VARIANCES + far**2) * x_t


def edm(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
    return GAUSSIAN(x, sigma.reshape(-1))


CONVENTIONS: dict[str, Callable[[], Adapted]] = {
    "epsilon": lambda: diffusers("epsilon"),
    "sample": lambda: diffusers("sample"),
    "v_prediction": lambda: diffusers("v_prediction"),
    "flow": lambda: from_flow(velocity),
    "flow backwards": lambda: from_flow(lambda x, t: -velocity(x, 1 - t), data_at=1),
    "edm": lambda: from_edm(edm),
    "k_diffusion": lambda: from_k_diffusion(edm),
}


@pytest.mark.statistical
@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_gaussian_written_in_a_convention_has_the_closed_form(name: str) -> None:
    images = GAUSSIAN.sample(2048, seeded())
    options: dict[str, Any] = {"sigma_min": LOW, "sigma_max": HIGH, "times": 80, "batch": 2048}
    ode, direct = (
        fit_preconditioning(each, images, **options, progress=False) for each in (CONVENTIONS[name](), GAUSSIAN)
    )
    l, s = (value.numpy() for value in GAUSSIAN.coefficients(ode.times))
    # Probes are exact on a diagonal Jacobian; s has the error of its images, and of the spline's slope at the ends.
    assert abs(ode.fit.l / l - 1).max() < 1e-6
    assert bool((abs(ode.fit.s - s) < 0.02 + 5 * ode.fit.s_se).all())
    # The same images and noise: the conventions agree with D itself far below that error.
    np.testing.assert_allclose(ode.fit.s, direct.fit.s, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_an_adapted_denoiser_can_be_differentiated_in_both_modes(name: str) -> None:
    options: dict[str, Any] = {"sigma_min": LOW, "sigma_max": HIGH, "times": 8, "progress": False}
    modes: tuple[Mode, Mode] = ("reverse", "forward")
    left, right = (
        fit_preconditioning(CONVENTIONS[name](), GAUSSIAN.sample(16, seeded()), **options, mode=mode) for mode in modes
    )
    np.testing.assert_allclose(left.fit.s, right.fit.s, rtol=0, atol=1e-9)


def test_what_cannot_be_adapted_is_refused() -> None:
    assert "quantize=False" in mistake(from_k_diffusion, SimpleNamespace(quantize=True))
    assert "0 or 1; got 2" in mistake(from_flow, velocity, 2)
    assert "for flow matching use from_flow" in mistake(from_diffusers, edm, SimpleNamespace())
    assert "the scheduler has 'flow_prediction'" in mistake(from_diffusers, edm, scheduler("flow_prediction"))


def test_a_denoiser_knows_the_noise_levels_of_its_schedule() -> None:
    ends = diffusers("epsilon")
    assert (round(ends.sigma_min, 4), round(ends.sigma_max, 1)) == (0.01, 157.4)
    said = mistake(fit_preconditioning, ends, GAUSSIAN.sample(4, seeded()))
    assert f"the denoiser knows sigma from {ends.sigma_min} to {ends.sigma_max}: choose sigma_min and" in said
    x, sigma = torch.ones(2, 5).double(), torch.tensor([ends.sigma_min, ends.sigma_max]).requires_grad_()  # rounded
    slopes = [torch.autograd.grad(each(x, sigma.double()).sum(), sigma)[0] for each in (ends, GAUSSIAN)]
    torch.testing.assert_close(*slopes)
    silent = from_diffusers(edm, scheduler("epsilon", torch.cat([KEPT, torch.zeros(1)])))  # zero terminal SNR
    assert silent.sigma_max == ends.sigma_max


# --- the real libraries


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_at_every_step_a_network_of_diffusers_is_what_its_scheduler_makes_of_it(kind: str) -> None:
    library = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = library.UNet2DModel(
        8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=3, **blocks
    ).eval()
    its = library.DDPMScheduler(prediction_type=kind, clip_sample=False)
    denoiser, x_0 = from_diffusers(unet, its), torch.randn(3, 1, 8, 8, generator=seeded())
    classes, noise = torch.tensor([0, 1, 2]), torch.randn(3, 1, 8, 8, generator=seeded(1))
    for step in (0, 1, 250, 998, 999):
        x_k = its.add_noise(x_0, noise, torch.tensor([step] * 3))
        kept = its.alphas_cumprod[step]
        with torch.no_grad():
            expected = its.step(unet(x_k, step, classes).sample, step, x_k).pred_original_sample
            sigma = ((1 - kept) / kept).sqrt().expand(3)
            found = denoiser(x_k / kept.sqrt(), sigma, class_labels=classes)
        scale = float(sigma[0]) if kind == "epsilon" else 1.0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(scale, 1))
    ode = fit_preconditioning(
        denoiser, x_0, sigma_min=0.02, sigma_max=80.0, times=8, progress=False, class_labels=classes
    )
    assert 0 < ode.fit.s_se.max() < math.inf


@pytest.mark.filterwarnings("ignore")
def test_a_denoiser_of_k_diffusion_has_the_closed_form() -> None:
    external = pytest.importorskip("k_diffusion").external

    class Noise(nn.Module):
        def forward(self, x_k: Tensor, step: Tensor) -> Tensor:
            sigma = sigma_of(step)
            x = x_k * (1 + sigma[:, None] ** 2).sqrt()
            return (x - GAUSSIAN(x, sigma)) / sigma[:, None]

    def adapted(quantize: bool) -> Adapted:
        return from_k_diffusion(external.DiscreteEpsDDPMDenoiser(Noise(), KEPT, quantize))

    assert "quantize=False" in mistake(adapted, True)
    images = GAUSSIAN.sample(256, seeded())
    ode, direct = (
        fit_preconditioning(each, images, sigma_min=LOW, sigma_max=HIGH, times=12, progress=False)
        for each in (adapted(False), GAUSSIAN)
    )
    np.testing.assert_allclose(ode.fit.s, direct.fit.s, rtol=0, atol=1e-6)
