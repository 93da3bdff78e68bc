"""l_t and s_t, fitted with derivatives, without them, and from a covariance alone: closed forms, and each other."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.draws import SEED, seeded
from tests.nets.small import ARCHITECTURES, make
from torch import Tensor, nn

from consistency.theory.derivative_free import fit_without_derivatives, gaussian_coefficients
from consistency.theory.estimators import (
    CoefficientFit,
    Mode,
    fit_coefficients,
    image_moments,
    jackknife,
    solve_moments,
)
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import log_grid
from consistency.theory.oracles import MIXTURE_1D, GaussianTeacher, MixtureTeacher, gaussian_fit, mixture_coefficients
from consistency.theory.solver import DenoiserFn
from consistency.training.objective import with_labels

VARIANCES = torch.tensor([0.01, 0.1, 0.25, 1.0, 2.0], dtype=torch.float64)
GAUSSIAN = GaussianTeacher(VARIANCES)
TIMES = log_grid(120, 0.002, 80.0)
MODES: tuple[Mode, Mode] = ("reverse", "forward")
ROTATION = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=seeded(3)))[0]


def turned(x: Tensor, t: Tensor) -> Tensor:
    """Denoise the rotated Gaussian: on its Jacobian Rademacher probes are not exact, as they are on a diagonal one."""
    return GAUSSIAN(x @ ROTATION, t) @ ROTATION.T


def draws(teacher: GaussianTeacher | MixtureTeacher, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and noise."""
    generator = seeded(seed)
    images = teacher.sample(count, generator)
    return images, torch.randn(images.shape, generator=generator, dtype=images.dtype)


def derived(
    denoiser: DenoiserFn, images: Tensor, noise: Tensor, times: Tensor, batch: int = 20_000, probes: int | None = 2
) -> CoefficientFit:
    return fit_coefficients(lambda rows: denoiser, images, noise, times, probes, seeded(1), batch)


def moved(denoiser: DenoiserFn, images: Tensor, noise: Tensor, times: Tensor, batch: int = 20_000) -> CoefficientFit:
    return fit_without_derivatives(lambda rows: denoiser, images, noise, times, batch)


Fit = Callable[..., CoefficientFit]
either = pytest.mark.parametrize("fit", [derived, moved])


def growth_of_h(l: np.ndarray, times: Tensor, moment: float) -> np.ndarray:
    """d/dlambda log E||h||^2 / 2, with E||h||^2 = d l (l (m + t^2) - t^2) and m = E||x_0||^2 / d."""
    t = times.numpy()
    return np.gradient(0.5 * np.log(l * (l * (moment + t**2) - t**2)), -np.log(t))


def test_s_is_the_growth_of_h() -> None:
    """AP (17) against h's second moment in closed form, from l and E||x_0||^2 alone."""
    times = log_grid(300, 0.01, 20.0)
    fit = mixture_coefficients(times)
    w, m, v = MIXTURE_1D.weights, MIXTURE_1D.means[:, 0], MIXTURE_1D.variances
    growth = growth_of_h(fit.l, times, float((w * (m**2 + v)).sum()))
    np.testing.assert_allclose(growth[5:-5], fit.s[5:-5], rtol=0, atol=2e-3)


# --- fits


@pytest.mark.statistical
def test_with_probes_it_is_the_closed_form() -> None:
    images, noise = draws(GAUSSIAN, 4096)
    fit = derived(turned, images @ ROTATION.T, noise, TIMES, batch=1000, probes=4)
    l, s = (v.numpy() for v in GAUSSIAN.coefficients(TIMES))
    # Five standard errors. s_t crosses zero: there its error is held against its range of 4 instead.
    assert abs(fit.l / l - 1).max() < 0.04
    assert (abs(fit.s - s) / np.maximum(abs(s), 0.5)).max() < 0.02
    assert bool((abs(fit.l - l) < 5 * fit.l_se).all())
    assert fit.l_se.max() > 0


@pytest.mark.statistical
def test_with_the_exact_trace_it_is_tighter() -> None:
    fit = gaussian_fit(VARIANCES.tolist(), TIMES, samples=4096, probes=None, seed=SEED)
    l, s = (v.numpy() for v in GAUSSIAN.coefficients(TIMES))
    assert abs(fit.l / l - 1).max() < 1e-7
    assert abs(fit.s - s).max() < 0.02
    assert bool(fit.determined.all())


@pytest.mark.statistical
def test_without_derivatives_it_is_the_closed_form() -> None:
    fit = moved(GAUSSIAN, *draws(GAUSSIAN, 8192), TIMES, batch=1000)
    l, s = (v.numpy() for v in GAUSSIAN.coefficients(TIMES))
    assert bool((abs(fit.l - l) < 5 * fit.l_se).all())
    assert bool((abs(fit.s - s) < 1e-3 + 5 * fit.s_se).all())
    assert abs(fit.l / l - 1).max() < 0.06
    assert abs(fit.s - s).max() < 0.06
    assert bool(fit.determined.all())


@pytest.mark.statistical
@either
def test_standard_errors_tell_the_spread_between_fits(fit: Fit) -> None:
    times = log_grid(12, 0.01, 20.0)
    fits = [fit(GAUSSIAN, *draws(GAUSSIAN, 512, seed), times) for seed in range(40)]
    # Probes are exact on a diagonal Jacobian: that l has no error.
    for value in ("s",) if fit is derived else ("l", "s"):
        spread = np.std([getattr(found, value) for found in fits], axis=0, ddof=1)
        ratio = np.mean([getattr(found, f"{value}_se") for found in fits], axis=0) / spread
        assert bool(((ratio > 0.6) & (ratio < 2)).all()), (value, ratio)


@pytest.mark.statistical
def test_two_standard_errors_hold_the_truth_in_95_of_100_fits() -> None:
    """l's error, and that of its slope, are most of s's below t = 10: with l taken as known it is 2 to 8 times less."""
    fits, size = 200, 256
    # The grid goes on below 0.011: at its end the slope of the spline errs by more than a standard error.
    times = log_grid(60, 0.006, 80.0)
    images, noise = draws(GAUSSIAN, fits * size)
    signs = torch.randint(0, 2, images.shape, generator=seeded(1)).double() * 2 - 1
    points = [(images @ ROTATION.T + t * noise, t) for t in times.tolist()]
    moments = np.stack([image_moments(turned, x, t, signs[None]) for x, t in points]).reshape(60, 6, fits, size)
    found = [solve_moments(times.numpy(), moments[:, :, k], 5, torch.float64) for k in range(fits)]
    for name, truth in zip("ls", GAUSSIAN.coefficients(times), strict=True):
        error = np.stack([(getattr(fit, name) - truth.numpy()) / getattr(fit, f"{name}_se") for fit in found])
        for t in (80, 10, 2, 0.5, 0.06, 0.011):
            here = error[:, np.abs(times.numpy() / t - 1).argmin()]
            # 5 standard errors of a proportion among 200 below 0.95, and of a standard deviation around 1.
            assert np.mean(abs(here) <= 2) > 0.87, (name, t)
            assert 0.75 < np.sqrt(np.mean(here**2)) < 1.25, (name, t)


@pytest.mark.statistical
def test_both_fits_agree_on_a_mixture_in_the_plane() -> None:
    teacher = MixtureTeacher(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-1.0, 0.2], [0.5, 0.0]], dtype=torch.float64),
        torch.tensor([0.1, 0.02], dtype=torch.float64),
    )
    images, noise = draws(teacher, 8192)
    times = log_grid(60, 0.01, 5.0)
    plain, exact = moved(teacher, images, noise, times), derived(teacher, images, noise, times, probes=None)
    assert bool((abs(plain.l - exact.l) < 5 * np.hypot(plain.l_se, exact.l_se)).all())
    # The spline's slope errs by some 1e-3 at the first and last times, where the standard error is less.
    assert bool((abs(plain.s - exact.s) < 5e-3 + 5 * np.hypot(plain.s_se, exact.s_se)).all())


@pytest.mark.statistical
@pytest.mark.parametrize("error", [0.1, 0.5])
def test_l_is_that_of_AP_15_for_any_denoiser(error: float) -> None:
    """A denoiser that is off: both fits see its Jacobian, exact or not."""
    images, noise = draws(GAUSSIAN, 20_000)
    times = log_grid(12, 0.01, 20.0)

    def off(x: Tensor, t: Tensor) -> Tensor:
        return GAUSSIAN(x, t) + error * torch.sin(3 * x) / (1 + t[:, None])

    plain, exact = moved(off, images, noise, times), derived(off, images, noise, times, probes=None)
    assert bool((abs(plain.l - exact.l) < 5 * np.hypot(plain.l_se, exact.l_se)).all())
    assert abs(exact.l - GAUSSIAN.coefficients(times)[0].numpy()).max() > 0.3 * error


precisions = pytest.mark.parametrize("precision", [torch.float32, torch.float64])


@pytest.mark.statistical
@either
@precisions
@pytest.mark.parametrize("dimension", [1, 4, 64])
@pytest.mark.parametrize("variance", [0.01, 0.25, 4.0])
def test_of_an_isotropic_gaussian_it_stays_finite_and_says_so(
    fit: Fit, precision: torch.dtype, dimension: int, variance: float
) -> None:
    teacher = GaussianTeacher(torch.full((dimension,), variance, dtype=precision))
    found = fit(teacher, *draws(teacher, 64), log_grid(40, 0.002, 80.0))
    assert all(np.isfinite(array).all() for array in vars(found).values() if isinstance(array, np.ndarray))
    if fit is derived:  # there h is 0 but for rounding
        assert not found.determined.any()
        assert bool((found.s == -1).all() and (found.s_se >= 2).all())


@pytest.mark.statistical
@either
@precisions
def test_rounding_undoes_no_time_of_a_gaussian_that_is_not_isotropic(fit: Fit, precision: torch.dtype) -> None:
    teacher = GaussianTeacher(VARIANCES.to(precision))
    found = fit(teacher, *draws(teacher, 2048), TIMES)
    assert bool(found.determined.all())
    assert abs(found.s - GAUSSIAN.coefficients(TIMES)[1].numpy()).max() < 0.2


@either
def test_a_denoiser_that_returns_nan_is_named_with_its_time(fit: Fit) -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] > 10, float("nan"), 0.5) * x

    with pytest.raises(ValueError, match="t = 80"):
        fit(denoiser, *torch.randn(2, 8, 3, generator=seeded()), log_grid(9, 0.1, 80.0), batch=4)


@either
def test_the_fit_does_not_depend_on_its_batch(fit: Fit) -> None:
    whole, parts = (fit(MIXTURE_1D, *draws(MIXTURE_1D, 50), log_grid(9, 0.1, 80.0), batch=n) for n in (50, 7))
    torch.testing.assert_close(vars(parts), vars(whole), rtol=1e-12, atol=0)


# --- how many images


@pytest.mark.statistical
def test_the_jackknife_tells_the_spread_of_g_between_fits() -> None:
    times, grid = log_grid(24, 0.01, 20.0), log_grid(6, 0.01, 20.0)

    def jumps(fit: CoefficientFit) -> np.ndarray:
        ode = GeneralizedODE(*(torch.from_numpy(values) for values in (fit.times, fit.l, fit.s)))
        return torch.cat(ode.backward(grid[:-1], grid[1:])).numpy()

    moments = [
        np.stack([image_moments(turned, images @ ROTATION.T + t * noise, t, signs) for t in times.tolist()])
        for images, noise, signs in (
            (
                *draws(GAUSSIAN, 256, seed),
                torch.randint(0, 2, (1, 256, 5), generator=seeded(seed + 99)).double() * 2 - 1,
            )
            for seed in range(40)
        )
    ]

    def values(some: np.ndarray) -> np.ndarray:
        return jumps(solve_moments(times.numpy(), some, 5, torch.float64))

    spread = np.std([values(each) for each in moments], axis=0, ddof=1)
    ratio = np.mean([jackknife(values, each) for each in moments], axis=0) / spread
    assert bool(((ratio > 0.6) & (ratio < 2)).all()), ratio


def test_a_fit_takes_images_until_the_tolerance_is_met() -> None:
    images, noise = draws(GAUSSIAN, 2048)
    times = log_grid(24, 0.01, 20.0)

    def fit(tolerance: float) -> CoefficientFit:
        inputs = (lambda rows: GAUSSIAN, images, noise, times, 1, seeded(1), 512)
        return fit_coefficients(*inputs, jumps=lambda found: found.s, tolerance=tolerance)

    few, every = fit(1.0), fit(0.0)
    enough = 0.6 * few.error  # some three times as many images
    more = fit(enough)
    assert few.images == 128 < more.images < every.images == 2048
    assert every.error < more.error <= enough
    first = fit_coefficients(lambda rows: GAUSSIAN, images[:128], noise[:128], times, 1, seeded(1), 512)
    np.testing.assert_allclose(few.s, first.s, rtol=1e-12)


# --- both modes of differentiation


class Exponential(nn.Module):
    """Overflows where its input is large."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 10).exp()


class SquareRoot(nn.Module):
    """Has no derivative at 0, its value for every input."""

    def forward(self, x: Tensor) -> Tensor:
        return (0 * x).sqrt()


class Network(nn.Module):
    """A denoiser with that layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.network = layer.double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        denoised: Tensor = self.network(x)
        return denoised


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_from_the_left_give_the_moments_of_products_from_the_right(name: str, conditional: bool) -> None:
    model = make(ARCHITECTURES[name], label_dim=3 * conditional).requires_grad_(False)
    label = torch.tensor([0, 1, 2]) if conditional else None
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        teacher = with_labels(model.to(dtype), label)
        x, centre = torch.randn(2, 3, *model.shape, dtype=dtype, generator=seeded())
        probes = torch.randint(0, 2, (2, *x.shape), generator=seeded(1)).to(dtype) * 2 - 1
        for memory in (torch.contiguous_format, torch.channels_last):
            for t in (0.01, 1.0, 50.0):
                inputs = (teacher, x.to(memory_format=memory), t, probes, centre[0])
                left, right = (image_moments(*inputs, mode) for mode in MODES)
                scale = np.abs(right).max(axis=1, keepdims=True)
                np.testing.assert_allclose(left / scale, right / scale, rtol=0, atol=tolerance, err_msg=f"t = {t}")


def test_under_bfloat16_both_modes_agree_to_its_rounding_and_sum_in_float64() -> None:
    model = make(ARCHITECTURES["ddpmpp"]).requires_grad_(False)
    x, centre = torch.randn(2, 3, *model.shape, generator=seeded())
    signs = torch.randint(0, 2, (2, *x.shape), generator=seeded(1)).float() * 2 - 1
    exact = image_moments(model, x, 1.0, signs, centre[0])
    model.compute_in("bfloat16")
    for mode in MODES:
        found = image_moments(model, x, 1.0, signs, centre[0], mode)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, exact, rtol=0, atol=0.05 * np.abs(exact).max())
        assert np.abs(found / exact - 1).max() > 1e-5  # the networks did compute in bfloat16


def test_a_compiled_network_has_the_moments_of_the_plain_one() -> None:
    model = make(ARCHITECTURES["mlp"]).requires_grad_(False)
    x, centre = torch.randn(2, 3, *model.shape, generator=seeded())
    signs = torch.randint(0, 2, (1, *x.shape), generator=seeded(1)).float() * 2 - 1
    # The backend traces the network and its derivatives, as the default does, but compiles no C++.
    compiled = torch.compile(model, backend="aot_eager")
    expected, found = (image_moments(each, x, 1.0, signs, centre[0]) for each in (model, compiled))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("layer", "where"),
    [
        (nn.Sequential(nn.Linear(5, 5), nn.Softplus(), Exponential()), "t = 500, first in its layer network.2"),
        (SquareRoot(), "t = 500, in no layer's output: in its derivatives, or outside its layers"),
    ],
)
def test_nan_is_named_with_its_time_and_its_layer(layer: nn.Module, where: str) -> None:
    images, noise = draws(GAUSSIAN, 8)
    with pytest.raises(ValueError, match=f"^the denoiser returned NaN or infinity at {where}$"):
        fit_coefficients(lambda part: Network(layer), images, noise, log_grid(8, 0.01, 500.0), 1, seeded(), 4)


def test_the_exact_trace_is_the_same_in_both_modes() -> None:
    x = draws(GAUSSIAN, 4)[0]
    left, right = (image_moments(turned, x, 0.5, None, None, mode) for mode in MODES)
    np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-12)
    trace = (VARIANCES / (VARIANCES + 0.25)).sum()
    np.testing.assert_allclose(left[0], np.full(4, trace), rtol=1e-10)


# --- centred


def around(mean: Tensor, variances: Tensor, centre: Tensor) -> CoefficientFit:
    """The fit of a Gaussian with that mean, around that centre, with the images and noise of a Gaussian around 0."""
    teacher = GaussianTeacher(variances)
    images, noise = draws(teacher, 64)

    def moved(x: Tensor, t: Tensor) -> Tensor:
        return mean + teacher(x - mean, t)

    return fit_coefficients(
        lambda rows: moved, images + mean, noise, log_grid(40, 0.01, 80.0), 1, seeded(1), 64, centre=centre
    )


MEAN = torch.linspace(-1, 2, 5, dtype=torch.float64)


def test_translated_data_have_the_centred_fit_of_the_data_around_0() -> None:
    still, moved = around(torch.zeros(5), VARIANCES, torch.zeros(5)), around(MEAN, VARIANCES, MEAN)
    assert still.centred is not None and moved.centred is not None
    np.testing.assert_array_equal(still.centred.s, still.s)  # a mean of 0 changes nothing
    for name in ("l", "l_se", "s", "s_se"):
        found, expected = getattr(moved.centred, name), getattr(still, name)
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7, err_msg=name)
    np.testing.assert_array_equal(moved.centred.l, moved.l)
    assert np.abs(moved.s - still.s).max() > 0.5  # uncentred, s follows the mean


def test_an_isotropic_gaussian_with_any_mean_is_ctm_only_when_centred() -> None:
    fit = around(MEAN, torch.full((5,), 0.3, dtype=torch.float64), MEAN)
    assert fit.centred is not None and not fit.centred.determined.any() and bool((fit.centred.s == -1).all())
    assert fit.determined.any() and np.abs(fit.s + 1).max() > 0.5


# --- of a covariance


def test_the_coefficients_of_a_gaussian_are_those_of_its_covariance_however_it_is_turned() -> None:
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=seeded()))[0]
    found = gaussian_coefficients(torch.zeros(5), turned @ torch.diag(VARIANCES) @ turned.T, TIMES)
    torch.testing.assert_close(found, GAUSSIAN.coefficients(TIMES), rtol=1e-9, atol=1e-9)


def test_the_mean_of_a_gaussian_counts_in_s_alone() -> None:
    times, mean = log_grid(4000, 0.01, 20.0), torch.tensor([0.5, -1.0, 0.2, 0.0, 0.1], dtype=torch.float64)
    l, s = gaussian_coefficients(mean, torch.diag(VARIANCES), times)
    torch.testing.assert_close(l, GAUSSIAN.coefficients(times)[0])
    growth = growth_of_h(l.numpy(), times, float((VARIANCES + mean.square()).mean()))
    np.testing.assert_allclose(s[5:-5].numpy(), growth[5:-5], rtol=0, atol=1e-4)
    assert float((s - GAUSSIAN.coefficients(times)[1]).abs().max()) > 0.1


def test_an_isotropic_covariance_gives_ctm() -> None:
    l, s = gaussian_coefficients(torch.zeros(4), 0.25 * torch.eye(4), TIMES)
    torch.testing.assert_close(l, TIMES**2 / (0.25 + TIMES**2))
    assert bool((s == -1).all())


def test_dimensions_without_variance_do_no_harm() -> None:
    """The digits' corners are white in all images; rounding makes their eigenvalues negative."""
    covariance = torch.diag(torch.tensor([1.0, 0.3, 0.0, -1e-17], dtype=torch.float64))
    l, s = gaussian_coefficients(torch.full((4,), 0.1), covariance, log_grid(50, 0.002, 80.0))
    assert bool((torch.isfinite(s) & (l > 0) & (l < 1)).all())


@pytest.mark.statistical
def test_the_covariance_alone_is_a_lower_bound_on_l() -> None:
    images, times = MIXTURE_1D.sample(20_000, seeded()), log_grid(20, 0.05, 20.0)
    l = gaussian_coefficients(images.mean(0), images.T.cov().reshape(1, 1), times)[0].numpy()
    own = mixture_coefficients(times).l
    # The covariance itself was sampled.
    assert bool((l < own + 0.05 * (1 - own)).all())
    assert np.max(own - l) > 0.05
