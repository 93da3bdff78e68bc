"""l_t and s_t that a student carries: from the data's moments, and from its own average."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.draws import numpy_draws, seeded
from tests.nets.small import make_denoiser
from torch import Tensor

from consistency.base.errors import UserError
from consistency.data.prepared import ImageData
from consistency.nets.checkpoint import load_denoiser, save_denoiser
from consistency.nets.denoiser import Denoiser
from consistency.nets.own_preconditioning import own_preconditioning
from consistency.runtime.distributed import Ranks
from consistency.theory.derivative_free import fit_without_derivatives, gaussian_coefficients
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import log_grid
from consistency.theory.oracles import GaussianTeacher
from consistency.training import own_fit
from consistency.training.own_fit import Refits, covariance_fit, diagonal_fit

TIMES = log_grid(40, 0.002, 80.0)
VARIANCES = torch.tensor([0.05, 0.3, 1.2, 0.6], dtype=torch.float64)


def gaussian_fit(scale: float = 1.0) -> Tensor:
    l, s = gaussian_coefficients(torch.zeros(4), torch.diag(VARIANCES * scale), TIMES)
    return torch.stack([TIMES, l, s])


def network() -> Denoiser:
    return make_denoiser(img_resolution=2, second_time=True).eval().requires_grad_(False)


class Exact(Denoiser):
    """D(x, t, t) is the exact denoiser of a Gaussian of 2x2 pixels."""

    def forward(self, x, t, s=None, labels=None, augment_labels=None):  # type: ignore[no-untyped-def]
        """See the class."""
        assert torch.equal(s, t)
        return GaussianTeacher(VARIANCES)(x.flatten(1), t).reshape(x.shape)


def exact() -> Denoiser:
    model = network()
    model.__class__ = Exact
    model.set_own_fit(gaussian_fit(2.0))
    return model


def draws(count: int) -> tuple[Tensor, Tensor]:
    generator = seeded()
    images = GaussianTeacher(VARIANCES).sample(count, generator).reshape(-1, 1, 2, 2)
    return images, torch.randn(images.shape, generator=generator, dtype=torch.float64)


def image_data(count: int) -> ImageData:
    pixels = numpy_draws().integers(0, 256, (count, 2, 2, 1), dtype=np.uint8)
    pixels[:, 0, 0] //= 4  # darker, so that its variance is another
    return ImageData(pixels, np.zeros(count, np.int64), {"classes": ["0"]})


@pytest.mark.parametrize("count", [50, 5000])
def test_the_data_s_fit_is_of_its_moments_in_one_part_or_several(count: int) -> None:
    data = image_data(count)
    flat = data.take(np.arange(count))[0].flatten(1).double().numpy()
    covariance = torch.from_numpy(np.cov(flat, rowvar=False, bias=True))
    l, s = gaussian_coefficients(torch.from_numpy(flat.mean(0)), covariance, TIMES)
    torch.testing.assert_close(covariance_fit(data, TIMES), torch.stack([TIMES, l, s]), rtol=1e-9, atol=1e-9)


def test_of_large_data_it_takes_images_from_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_fit, "IMAGES", 100)
    taken: list[int] = []
    data, take = image_data(1000), ImageData.take

    def noted(self: ImageData, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        taken.extend(rows.tolist())
        return take(self, rows)

    monkeypatch.setattr(ImageData, "take", noted)
    covariance_fit(data, TIMES)
    assert len(taken) == len(set(taken)) == 100
    assert (taken[0], taken[-1]) == (0, 999)


@pytest.mark.parametrize("name", ["analytic", "analytic-forward"])
def test_what_a_model_carries_is_its_preconditioning(name: str) -> None:
    model = network()
    model.set_own_fit(gaussian_fit())
    own, fixed = own_preconditioning(name, model), GeneralizedODE(*gaussian_fit())
    t, s = torch.tensor([80.0, 3.0, 0.5]).double(), torch.tensor([0.002, 0.1, 0.5]).double()
    form = fixed.backward if name == "analytic" else fixed.forward
    torch.testing.assert_close(own.coefficients(t, s), form(t, s), rtol=0, atol=0)
    x = torch.randn(3, 1, 2, 2, generator=seeded())
    assert torch.equal(own.jump(model, x, s, s), x)


def test_it_follows_what_is_carried_later_or_loaded() -> None:
    model, t, s = network(), torch.tensor([5.0]).double(), torch.tensor([0.002]).double()
    model.set_own_fit(gaussian_fit())
    own = own_preconditioning("analytic", model)
    before, state = own.coefficients(t, s), copy.deepcopy(model.state_dict())
    model.set_own_fit(gaussian_fit(2.0))
    after = own.coefficients(t, s)
    assert after != before
    assert after == GeneralizedODE(*gaussian_fit(2.0)).backward(t, s)
    model.load_state_dict(state)
    assert own.coefficients(t, s) == before


def test_it_is_kept_with_the_weights_to_the_bit(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "student.safetensors"
    model.set_own_fit(gaussian_fit())
    save_denoiser(path, model, {"key": "k"})
    read, _ = load_denoiser(path, "k")
    assert torch.equal(read.fit, gaussian_fit())
    assert read.fit.dtype == torch.float64
    assert "fit" not in network().state_dict()
    assert "own_fit" not in network().architecture


@pytest.mark.statistical
def test_the_fit_of_an_exact_denoiser_is_the_closed_form() -> None:
    images, noise = draws(8192)
    times, l, s = diagonal_fit(exact(), images, None, noise, TIMES, 1000)
    assert torch.equal(times, TIMES)
    torch.testing.assert_close(l, gaussian_fit()[1], rtol=0.05, atol=0)
    torch.testing.assert_close(s, gaussian_fit()[2], rtol=0, atol=0.05)


def refits(student: Denoiser, average: Denoiser) -> Refits:
    images, noise = draws(256)
    fitted = {"images": images, "labels": None, "noise": noise, "times": TIMES, "batch": 100}
    return Refits(lambda step: step // 10, student, [average], **fitted, ranks=Ranks())


def test_it_is_fitted_again_where_a_stage_begins_and_nowhere_else() -> None:
    student, average = network(), exact()
    student.set_own_fit(gaussian_fit(3.0))
    hook = refits(student, average)
    assert hook(0) == 0 and torch.equal(student.fit, gaussian_fit(3.0))
    made = {step: hook(step) for step in range(35)}
    assert {step for step, evaluations in made.items() if evaluations} == {10, 20, 30}
    assert made[10] == 2 * len(TIMES) * 256
    images, noise = draws(256)
    expected = fit_without_derivatives(lambda rows: lambda x, t: average(x, t, t), images, noise, TIMES, 100)
    for model in (student, average):
        assert torch.equal(model.fit, torch.from_numpy(np.stack([expected.times, expected.l, expected.s])))


def test_a_fit_that_is_none_says_what_to_change_and_leaves_the_old_one() -> None:
    student, average = network(), network()
    for model in (student, average):
        model.set_own_fit(gaussian_fit())
    next(average.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"coefficients at step 10: the denoiser returned NaN .* use fit: data"):
        refits(student, average)(10)
    assert torch.equal(student.fit, gaussian_fit())
