"""What the tests of the losses share: fitted coefficients, and the passes of networks counted."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from consistency.nets.denoiser import Denoiser
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import log_grid

EPS, T = 0.002, 80.0


def fitted() -> GeneralizedODE:
    """Coefficients as of a fit."""
    times = log_grid(60, EPS, T)
    l = torch.sigmoid(torch.log(times))
    return GeneralizedODE(times, l, 4 * l - 2)


def passes(models: Iterable[Denoiser], run: Callable[[], object]) -> int:
    """Forward-pass equivalents that really happen in a run: a forward counts 1, a backward 2."""
    count = 0

    def add(worth: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal count
            count += worth

        return hook

    handles = [m.model.register_forward_hook(add(1)) for m in models]
    handles += [m.model.register_full_backward_hook(add(2)) for m in models]
    run()
    for handle in handles:
        handle.remove()
    return count
