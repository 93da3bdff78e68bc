"""The fit for anybody's denoiser: any shape, the same fit as the stage's, its file, its figure, and bad input."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import mistake
from tests.draws import seeded
from tests.nets.small import make_denoiser
from tests.processes import SOURCE, environment
from torch import Tensor, nn

from consistency import FittedODE, fit_preconditioning
from consistency.__main__ import main
from consistency.base.seeding import generator
from consistency.report.figures import close
from consistency.theory.estimators import fit_coefficients
from consistency.theory.noise import log_grid
from consistency.theory.oracles import GaussianTeacher

GAUSSIAN = GaussianTeacher(torch.tensor([0.01, 0.1, 0.25, 1.0, 2.0, 3.0]))
IMAGES = GAUSSIAN.sample(32, seeded())
NAMES = ("l", "l_se", "s", "s_se", "determined")


def fit(denoiser: Callable[..., Tensor] = GAUSSIAN, images: Tensor = IMAGES, **options: Any) -> FittedODE:
    return fit_preconditioning(denoiser, images, **{"times": 12, "progress": False, **options})


def same(one: FittedODE, other: FittedODE) -> bool:
    """Both fits are equal, around 0 and around the mean."""
    pairs = ((one.fit, other.fit), (one.fit.centred, other.fit.centred))
    return all(np.allclose(getattr(a, name), getattr(b, name), rtol=1e-5) for a, b in pairs for name in NAMES)


def test_torch_is_imported_with_the_first_name_that_needs_it() -> None:
    code = "import consistency, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(PYTHONPATH=SOURCE), check=False)
    assert done.returncode == 0
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from consistency import nothing  # noqa: F401


def test_it_is_the_fit_of_the_stage() -> None:
    found, noise = fit(seed=3), torch.randn(IMAGES.shape, generator=generator(3, "coefficients"))
    expected = fit_coefficients(
        *(lambda rows: GAUSSIAN, IMAGES, noise, log_grid(12, 0.002, 80.0), 1, generator(3, "probes"), 64),
        centre=IMAGES.mean(0),
    )
    for name in NAMES:
        np.testing.assert_array_equal(getattr(found.fit, name), getattr(expected, name))


def test_a_tolerance_decides_how_many_images_are_used() -> None:
    images = GAUSSIAN.sample(1024, seeded())
    near, far = (fit(images=images, tolerance=tolerance).fit for tolerance in (1e-9, 0.1))
    assert near.images == 1024 and 1e-9 < near.error < far.error <= 0.1
    assert far.images in (128, 256, 512)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (3, 2, 1, 1)])
def test_images_have_any_shape_and_range(shape: tuple[int, ...]) -> None:
    """Vectors, pictures that are not square, latents: the same numbers in another shape, 100 times as large."""

    def reshaped(x: Tensor, sigma: Tensor) -> Tensor:
        return 100 * GAUSSIAN(x.flatten(1) / 100, sigma / 100).reshape(x.shape)

    found = fit(reshaped, 100 * IMAGES.reshape(-1, *shape), sigma_min=0.2, sigma_max=8000, probes=None)
    assert np.allclose(found.fit.l, fit(probes=None).fit.l, rtol=1e-3)
    assert np.allclose(found.fit.s, fit(probes=None).fit.s, rtol=1e-3, atol=1e-3)
    assert found.mean.shape == shape


def test_conditions_follow_their_images() -> None:
    shifts = torch.arange(32.0)

    def denoiser(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        return GAUSSIAN(x - shift[:, None], sigma) + shift[:, None]

    moved = IMAGES + shifts[:, None]
    whole, parts, alone = (
        fit(denoiser, moved, shift=shifts, batch=n, samples=k) for n, k in ((32, None), (5, None), (5, 32))
    )
    assert same(whole, parts)
    order = torch.randperm(32, generator=generator(0, "coefficients"))
    assert np.allclose(alone.fit.l, fit(denoiser, moved[order], shift=shifts[order]).fit.l)


@pytest.mark.parametrize("centred", [False, True])
def test_a_file_gives_the_fit_again_to_the_bit(tmp_path: Path, centred: bool) -> None:
    ode, path = fit(images=IMAGES + 1, centred=centred), tmp_path / "below/fit.npz"
    ode.save(path)
    again = FittedODE.load(path, centred)
    assert same(ode, again) and torch.equal(ode.mean, again.mean)
    assert (again.centre is not None) == centred
    t = torch.tensor([80.0, 3.0], dtype=torch.float64)
    for form in ("forward", "backward"):
        assert torch.equal(*(torch.stack(getattr(each, form)(t, t / 2)) for each in (ode, again)))
    assert not torch.equal(FittedODE.load(path, not centred).backward(t, t / 2)[0], ode.backward(t, t / 2)[0])
    assert [each.name for each in path.parent.iterdir()] == ["fit.npz"]
    assert "written to a .npz" in mistake(ode.save, tmp_path / "fit.pt")
    np.savez(path, times=np.ones(3))
    assert "it has no array" in mistake(FittedODE.load, path)


def test_the_figure_has_the_fit_and_both_forms() -> None:
    figure = fit(sigma_min=0.3, sigma_max=14.0, centred=True).plot()
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels == ["$l_t$", "$s_t$", *["f(t,s) - s/t", "g(t,s) - (1 - s/t)"] * 2]
    assert [line.get_label() for line in figure.axes[2].get_lines()][:4] == [
        f"t = {t}" for t in ("14", "10", "2.5", "0.5")
    ]
    close(figure)


# --- bad input


class Net(nn.Module):
    """A network with dropout around the Gaussian."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return GAUSSIAN(self.dropout(x), sigma)


def nan_at_the_end(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.where(sigma[:, None] > 70, torch.nan, 1.0) * GAUSSIAN(x, sigma)


@pytest.mark.parametrize(
    ("denoiser", "said"),
    [
        (lambda x, sigma: GAUSSIAN(x, sigma)[:, :3], "returned shape [2, 3] for images of [2, 6]"),
        (lambda x, sigma: GAUSSIAN(x, sigma).double(), "returned dtype torch.float64 for images of torch.float32"),
        (lambda x, sigma: GAUSSIAN(x, sigma).to("meta"), "returned device meta for images of cpu"),
        (lambda x, sigma: (GAUSSIAN(x, sigma),), "returned tuple, not a tensor"),
        (lambda x, sigma: GAUSSIAN(x, sigma).detach(), "cannot be differentiated by x"),
        (lambda x, sigma: GAUSSIAN(x, sigma.detach()), "cannot be differentiated by sigma"),
        (torch.no_grad()(GAUSSIAN.__call__), "cannot be differentiated by x"),
        (Net(), "two results for one input (dropout in training mode?): call .eval() first"),
        (nan_at_the_end, "the denoiser returned NaN or infinity at t = 80"),
    ],
)
def test_a_denoiser_that_cannot_be_fitted_is_refused(denoiser: Callable[..., Tensor], said: str) -> None:
    assert said in mistake(fit, denoiser)
    assert isinstance(fit(Net().eval()), FittedODE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": IMAGES[:1]}, "at least 2 images, and samples of those given; got 1"),
        ({"samples": 33}, "got 32, samples 33"),
        ({"images": (255 * IMAGES).byte()}, "float32 or float64 tensor [N, ...]"),
        ({"images": IMAGES.numpy()}, "got ndarray"),
        ({"images": IMAGES / 0}, "the images have NaN or infinity"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max, got 0 and 80"),
        ({"sigma_max": 0.001}, "0 < sigma_min < sigma_max, got 0.002 and 0.001"),
        ({"times": 3}, "times must be 4 or more"),
        ({"mode": "backward"}, "mode reverse or forward; got 12, 64, 1 and backward"),
        ({"labels": torch.zeros(31)}, "labels is no option, and as a condition it must be a tensor of 32 rows"),
        ({"sigmamin": 0.01}, "sigmamin is no option"),
    ],
)
def test_values_that_cannot_be_used_are_said(options: dict[str, Any], said: str) -> None:
    assert said in mistake(fit, **options)


# --- the verb

MODULE = """
import torch

def denoiser(x, sigma):
    level = sigma.reshape(-1, 1, 1, 1)
    weight = torch.linspace(0.1, 1, 6).reshape(1, 2, 3)
    return weight / (weight + level**2) * x

def build():
    return denoiser

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The verb in a folder with a module and pictures, in a process that forgets the module again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_network", raising=False)
    Path("own_network.py").write_text(MODULE, encoding="utf-8")
    Path("pictures").mkdir()
    pixels = torch.randint(0, 256, (8, 2, 3), generator=seeded(), dtype=torch.uint8).numpy()
    for k, picture in enumerate(pixels):
        Image.fromarray(picture).save(f"pictures/{k}.png")
    np.save("pictures.npy", pixels[..., None])

    def run(name: str, images: str = "pictures", out: str = "fit.npz") -> int:
        words = ["fit", "--denoiser", name, "--images", images, "--out", out, "--times", "10", "--device", "cpu"]
        return main(words)

    return run


@pytest.mark.usefixtures("handlers")
def test_the_verb_fits_a_denoiser_of_the_working_directory(
    own: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert own("own_network:denoiser") == 0
    assert "analytic: g is below ctm's by up to" in capsys.readouterr().out
    assert own("own_network:build", "pictures.npy", "same.npz") == 0
    assert same(FittedODE.load("fit.npz"), FittedODE.load("same.npz"))


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("own_network",), "--denoiser is MODULE:ATTRIBUTE"),
        (("own_netwrok:build",), "No module named 'own_netwrok'; run the command where own_netwrok can be imported"),
        (("own_network:number",), "own_network has no function, class or module number"),
        (("own_network:build", "nowhere"), "neither a folder of images nor a .npy file"),
        (("own_network:build", "counts.npy"), "counts.npy is int64 [4, 2]"),
        (("own_network:build", "pictures", "fit.pt"), "a fit is written to a .npz"),
    ],
)
def test_the_verb_says_what_is_wrong(
    own: Callable[..., int], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    np.save("counts.npy", np.ones((4, 2), int))
    assert own(*words) == 2
    device, line = capsys.readouterr().err.splitlines()
    assert device.startswith("device: ") and said in line


def test_a_teacher_of_this_project_is_a_denoiser_like_any_other() -> None:
    teacher = make_denoiser(label_dim=3).eval()
    found = fit(teacher, torch.rand(8, 1, 4, 4) * 2 - 1, labels=torch.arange(8) % 3)
    assert np.isfinite(found.fit.s).all()
