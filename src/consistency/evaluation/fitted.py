"""The fit for anybody's denoiser: the checks of what is given, then `fit_coefficients`."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.base.errors import UserError
from consistency.base.seeding import generator
from consistency.nets.adapters import sigma_range
from consistency.theory.estimators import CoefficientFit, Mode, fit_coefficients
from consistency.theory.noise import log_grid, rho_grid
from consistency.theory.solver import DenoiserFn
from consistency.training.fits import NODES, jump_values

Progress = Callable[[Iterable[int]], Iterable[int]]


def fit_denoiser(
    denoiser: Callable[..., Tensor],
    images: Tensor,
    sigmas: tuple[float, float],
    times: int,
    samples: int | None,
    probes: int | None,
    batch: int,
    seed: int,
    mode: Mode,
    tolerance: float,
    centred: bool,
    progress: Progress,
    condition: dict[str, Any],
) -> tuple[CoefficientFit, Tensor]:
    """Return the fit, around 0 and around the mean image, and that image [...]: see `api.fit_preconditioning`."""
    count = _require_images(images, samples, condition)
    _require_numbers(denoiser, sigmas, times, probes, batch, mode, tolerance)
    draws = generator(seed, "coefficients")
    rows = (torch.randperm(len(images), generator=draws)[:count] if samples else torch.arange(count)).to(images.device)
    given = {name: value[rows.to(value.device)] for name, value in condition.items()}

    def of(part: slice) -> DenoiserFn:
        bound = {name: value[part] for name, value in given.items()}
        return lambda x, sigma: denoiser(x, sigma, **bound)

    chosen, centre = images[rows].detach(), images.detach().mean(0)
    noise = torch.randn(chosen.shape, generator=draws).to(chosen)
    grid = log_grid(times, *sigmas)
    some = slice(0, min(count, batch, 2))
    middle = grid[times // 2].to(chosen)
    _require_denoiser(of(some), chosen[some] + middle * noise[some], middle, mode)
    try:
        fit = fit_coefficients(
            of,
            chosen,
            noise,
            grid,
            probes,
            generator(seed, "probes", device=images.device),
            batch,
            lambda name, count, row: np.stack([row(k) for k in progress(range(count))]),
            centre,
            mode,
            jump_values(rho_grid(NODES, *sigmas), [(centred, 1.0, False)]) if tolerance else None,
            tolerance,
        )
    except ValueError as error:
        raise UserError(f"{error}: exclude such times by sigma_min and sigma_max, or mend the network there") from None
    return fit, centre


def _require_images(images: Any, samples: int | None, condition: dict[str, Any]) -> int:
    """Return the number of images to fit. Raises UserError for images or conditions that cannot be used."""
    if not isinstance(images, Tensor) or images.dtype not in (torch.float32, torch.float64) or images.ndim < 2:
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"images must be a float32 or float64 tensor [N, ...] in the network's units, got {found}")
    if not bool(images.isfinite().all()):
        raise UserError("the images have NaN or infinity in them: leave these out")
    count = len(images) if samples is None else samples
    if not 2 <= count <= len(images):
        raise UserError(
            f"a fit needs at least 2 images, and samples of those given; got {len(images)}, samples {count}"
        )
    for name, value in condition.items():
        if not isinstance(value, Tensor) or value.shape[:1] != images.shape[:1]:
            raise UserError(f"{name} is no option, and as a condition it must be a tensor of {len(images)} rows")
    return count


def _require_numbers(
    denoiser: object,
    sigmas: tuple[float, float],
    times: int,
    probes: int | None,
    batch: int,
    mode: str,
    tolerance: float,
) -> None:
    """Raise UserError for numbers out of range."""
    low, high = sigmas
    if not 0 < low < high < math.inf:
        raise UserError(f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    first, last = sigma_range(denoiser)  # type: ignore[arg-type]
    if not first <= low < high <= last:
        raise UserError(
            f"the denoiser knows sigma from {first} to {last}: choose sigma_min and sigma_max within, "
            f"not {low:g} and {high:g}"
        )
    if times < 4 or batch < 1 or (probes is not None and probes < 1) or mode not in ("reverse", "forward"):
        raise UserError(
            "times must be 4 or more, batch and probes (or None) 1 or more, mode reverse or forward; "
            f"got {times}, {batch}, {probes} and {mode}"
        )
    if not 0 <= tolerance < math.inf:
        raise UserError(f"tolerance must be 0 (use all images) or more, got {tolerance:g}")


def _require_denoiser(denoiser: DenoiserFn, x: Tensor, time: Tensor, mode: Mode) -> None:
    """Raise UserError if the denoiser is random, has no derivatives, or returns another shape, dtype or device."""
    point, sigma = x.clone().requires_grad_(), time.expand(len(x)).clone().requires_grad_()
    with torch.enable_grad():
        denoised = denoiser(point, sigma)
    if not isinstance(denoised, Tensor):
        raise UserError(f"the denoiser returned {type(denoised).__name__}, not a tensor D of the shape of x")
    for name, found, wanted in (
        ("shape", list(denoised.shape), list(x.shape)),
        ("dtype", denoised.dtype, x.dtype),
        ("device", denoised.device, x.device),
    ):
        if found != wanted:
            raise UserError(
                f"the denoiser returned {name} {found} for images of {wanted}: return D like x, or give other images"
            )
    with torch.no_grad():
        again = denoiser(x, sigma.detach())
    if bool(((denoised - again).abs() > 1e-3 * again.abs().amax()).any()):
        raise UserError(
            "the denoiser returned two results for one input (dropout in training mode?): call .eval() first"
        )
    if mode == "forward":
        return
    on: tuple[Tensor | None, ...] = (None, None)
    if denoised.requires_grad:
        on = torch.autograd.grad(denoised.sum(), (point, sigma), allow_unused=True)
    for name, each in zip(("x", "sigma"), on, strict=True):
        if each is None:
            raise UserError(
                f"the denoiser's output cannot be differentiated by {name}: take no_grad, detach, item, numpy and "
                f"rounding of {name} out of it"
            )
