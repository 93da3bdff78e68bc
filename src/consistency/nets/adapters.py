"""Denoisers of other conventions as D(x, sigma, **condition) = E[x_0 | x], with x = x_0 + sigma z.

x: [N, ...], sigma: [N], and so every condition: a row for each image. The network stays as it is, on its device and in
its mode: call its .eval() first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consistency.base.errors import UserError
from consistency.theory.solver import expand

# A network of another library: its classes are not imported.
Network = Callable[..., Any]


@dataclass(frozen=True)
class Adapted:
    """A denoiser D(x, sigma, **condition), and the range of sigma that its network knows."""

    denoiser: Callable[..., Tensor]
    sigma_min: float = 0.0
    sigma_max: float = float("inf")

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """Return D, of the shape of x [N, ...]; sigma: [N]."""
        return self.denoiser(x, sigma, **condition)


def sigma_range(denoiser: Network) -> tuple[float, float]:
    """Return sigma_min and sigma_max, the attributes of a denoiser that has them, else 0 and infinity."""
    low, high = getattr(denoiser, "sigma_min", 0.0), getattr(denoiser, "sigma_max", float("inf"))
    return float(low), float(high)


def from_edm(module: Network) -> Adapted:
    """Adapt a module of EDM or EDM2, module(x, sigma, class_labels=one-hot [N, K]), which is D itself.

    Karras et al. 2022, eq. (7). Such modules return float32 whatever the dtype of x: give float32.
    """
    return Adapted(module, *sigma_range(module))


def from_k_diffusion(model: Network) -> Adapted:
    """Adapt a denoiser of k-diffusion, model(x, sigma, **condition), which is D itself.

    Raises UserError for one that rounds sigma to the steps of its training, and so has no derivative along the ODE.
    """
    if getattr(model, "quantize", False):
        raise UserError("the k-diffusion model rounds sigma to its steps: build it with quantize=False")
    return Adapted(model, *sigma_range(model))


def from_flow(velocity: Network, data_at: int = 0) -> Adapted:
    """Adapt a flow matching or rectified flow network velocity(x_t, t, **condition), t [N] from 0 to 1.

    data_at 0: x_t = (1 - t) x_0 + t z and velocity E[z - x_0 | x_t]. With sigma = t / (1 - t), x = x_t / (1 - t):
        t = sigma / (1 + sigma),  x_t = x / (1 + sigma),  D = x_t - t velocity(x_t, t).
    data_at 1: time runs the other way, x_t = t x_0 + (1 - t) z with velocity E[x_0 - z | x_t]. A network that counts
    time to 1000 needs `lambda x, t: network(x, 1000 * t)`. Raises UserError for another data_at.
    """
    if data_at not in (0, 1):
        raise UserError(f"data_at is the time of the data, 0 or 1; got {data_at}")

    def denoiser(x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        t = sigma / (1 + sigma)
        x_t = x / expand(1 + sigma, x)
        v = velocity(x_t, t, **condition) if data_at == 0 else -velocity(x_t, 1 - t, **condition)
        return x_t - expand(t, x) * v

    return Adapted(denoiser)


def from_diffusers(unet: Network, scheduler: Any) -> Adapted:
    """Adapt a network of diffusers, unet(x_k, k, **condition).sample, trained with a scheduler that has alphas_cumprod.

    Step k is x_k = sqrt(a_k) x_0 + sqrt(1 - a_k) z, so sigma_k = sqrt((1 - a_k) / a_k) and x_k = x / sqrt(1 + sigma^2).
    Between steps k is a real number, linear in log sigma. By the scheduler's prediction_type,
        epsilon: D = x - sigma unet    sample: D = unet    v_prediction: D = (x_k - sigma unet) / sqrt(1 + sigma^2).
    The scheduler's clipping and thresholding are left out. Raises UserError for a scheduler without alphas_cumprod
    and for another prediction_type.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"{type(scheduler).__name__} has no alphas_cumprod: for flow matching use from_flow")
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise UserError(f"prediction_type is epsilon, sample or v_prediction; the scheduler has {kind!r}")
    kept = scheduler.alphas_cumprod.double()
    sigmas = ((1 - kept) / kept).sqrt()
    sigmas = sigmas[sigmas.isfinite()]  # of a schedule that ends in pure noise, all but the end
    ramp = sigmas.log()

    def step(sigma: Tensor) -> Tensor:
        grid, log = ramp.to(sigma.device), sigma.double().log()
        low = (torch.searchsorted(grid, log.detach()) - 1).clamp(0, len(grid) - 2)
        # Not clamped: an end in float32 may lie beyond the grid's by rounding, and a clamp would take its derivative.
        return (low + (log - grid[low]) / (grid[low + 1] - grid[low])).to(sigma.dtype)

    def denoiser(x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        level, scale = expand(sigma, x), expand((1 + sigma.square()).rsqrt(), x)
        output = unet(scale * x, step(sigma), **condition).sample
        if kind == "sample":
            return output
        return x - level * output if kind == "epsilon" else scale * (scale * x - level * output)

    return Adapted(denoiser, sigmas[0].item(), sigmas[-1].item())
