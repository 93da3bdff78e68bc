"""The rule of thumb: nothing where the fit is ctm's, and the numbers of the jumps that a sampler makes."""

import numpy as np
import torch

from consistency.config.dataset import Noise
from consistency.evaluation.forecast import forecast
from consistency.theory.generalized_ode import GeneralizedODE
from consistency.theory.noise import log_grid, rho_grid


def test_a_gain_is_expected_where_g_is_below_ctms_and_nowhere_else() -> None:
    times = log_grid(60, 0.002, 80.0)
    l = torch.sigmoid(torch.log(times))
    zero = torch.zeros_like(l)
    centre = np.array([[[0.5, -0.5], [0.5, 0.5]]], np.float32)
    arrays = {"times": times, "l": l, "s": 4 * l - 2}
    fit = {name: value.numpy() for name, value in arrays.items()} | {"centre": centre}
    # The variance of all pixels is that around the mean image and that of the mean image itself: 0.25 - 0.25^2.
    lines = forecast(fit | {"s_centred": fit["s"]}, (0.5 + 0.25 - 0.0625) ** 0.5, Noise(), [1, 3])
    assert lines[0] == "The mean image has a mean square of 0.250, the pixels around it a variance of 0.500."
    grid = rho_grid(4, 0.002, 80.0)
    g = GeneralizedODE(times, l, 4 * l - 2).backward(grid[:-1], grid[1:])[1]
    below = float((1 - g / (1 - grid[1:] / grid[:-1])).max())
    assert below > 0.05
    assert f"{100 * below:.1f} % at NFE 3; expect a gain at NFE 3." in lines[1]
    ctm = {"times": fit["times"], "l": zero.numpy(), "s": zero.numpy() - 1, "s_centred": zero.numpy() - 1}
    assert forecast(ctm | {"centre": centre}, 0.5, Noise(), [1, 3])[1] == (
        "analytic: g is below ctm's by up to 0.0 % at NFE 1, 0.0 % at NFE 3; expect a gain nowhere."
    )
