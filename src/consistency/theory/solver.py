"""Solvers of the teacher's probability-flow ODE dx/dt = (x - D(x, t)) / t."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# A denoiser with its labels bound: (x [N, ...], t [N]) -> E[x_0 | x_t = x] [N, ...].
DenoiserFn = Callable[[Tensor, Tensor], Tensor]


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times [N] to multiply x [N, ...], in the dtype of x."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def every(time: float, x: Tensor) -> Tensor:
    """Return one time for all of x [N, ...]: float64 [N], created on its device."""
    return torch.full((len(x),), time, dtype=torch.float64, device=x.device)


def heun_step(denoiser: DenoiserFn, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """Take one step of Heun's second-order method from time t to time u > 0 (2 evaluations).

    x: [N, ...]; t, u: [N]; returns [N, ...]. Karras et al. 2022, algorithm 1 without churn.
    """
    step = expand(u - t, x)
    slope = (x - denoiser(x, t)) / expand(t, x)
    ahead = x + step * slope
    return x + step * 0.5 * (slope + (ahead - denoiser(ahead, u)) / expand(u, x))


def heun_solve(denoiser: DenoiserFn, x: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate from times[0] to times[-1] with one Heun step per interval, in the precision of x.

    x: [N, ...]; times: numbers, so that no step waits for a GPU. A final time of exactly 0 is reached by an Euler
    step, since the slope is not defined there: NFE = 2 (len(times) - 1) - 1 then.
    """
    for t, u in itertools.pairwise(times):
        here, there = (every(time, x) for time in (t, u))
        # At u = 0 the Euler step x + (0 - t)(x - D)/t is D itself.
        x = heun_step(denoiser, x, here, there) if u else denoiser(x, here)
    return x
