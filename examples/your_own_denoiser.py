"""Fit the preconditioning of a denoiser of your own, and jump with it: about a minute on a CPU.

    python examples/your_own_denoiser.py

trains a small denoiser on the digits, fits l_t and s_t, saves the fit and its figure in the working directory, and
compares jumps with ctm's and the fitted coefficients. Replace `images` and `denoiser` by your own;
`from_diffusers`, `from_k_diffusion`, `from_flow` and `from_edm` of `consistency` make a denoiser of other networks.
"""

import itertools
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from consistency import FittedODE, fit_preconditioning

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


class Digits(nn.Module):
    """A perceptron in EDM's preconditioning: D(x, sigma) = c_skip x + c_out F(c_in x, ln sigma / 4)."""

    def __init__(self, pixels: int = 64, width: int = 512) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(4 * torch.randn(32), requires_grad=False)
        self.layers = nn.Sequential(
            *(nn.Linear(pixels + 64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)),
            *(nn.SiLU(), nn.Linear(width, pixels)),
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma[:, None]
        total = sigma**2 + SIGMA_DATA**2
        angles = sigma.log() / 4 * self.frequencies
        features = torch.cat([x.flatten(1) / total.sqrt(), angles.cos(), angles.sin()], 1)
        denoised = SIGMA_DATA**2 / total * x.flatten(1) + sigma * SIGMA_DATA / total.sqrt() * self.layers(features)
        return denoised.reshape(x.shape)


def train(images: Tensor, steps: int) -> Digits:
    """Train with EDM's loss."""
    network = Digits()
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x_0 = images[torch.randint(len(images), (256,))]
        sigma = (-1.2 + 1.2 * torch.randn(len(x_0))).exp()
        x = x_0 + sigma[:, None, None, None] * torch.randn_like(x_0)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        loss = (weight * (network(x, sigma) - x_0).square().flatten(1).mean(1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def grid(steps: int) -> list[float]:
    """EDM's times from SIGMA_MAX to SIGMA_MIN."""
    ends = SIGMA_MAX ** (1 / 7), SIGMA_MIN ** (1 / 7)
    return [(ends[0] + k / steps * (ends[1] - ends[0])) ** 7 for k in range(steps + 1)]


@torch.no_grad()
def heun(denoiser: Digits, x: Tensor, steps: int) -> Tensor:
    """Solve the ODE dx/dt = (x - D) / t with Heun's method."""
    for t, s in itertools.pairwise(grid(steps)):
        slope = (x - denoiser(x, torch.full((len(x),), t))) / t
        ahead = x + (s - t) * slope
        x = x + (s - t) / 2 * (slope + (ahead - denoiser(ahead, torch.full((len(x),), s))) / s)
    return x


@torch.no_grad()
def jumps(denoiser: Digits, x: Tensor, steps: int, coefficients, centre: Tensor | float = 0.0) -> Tensor:
    """Jump from time to time: f(t,s) x + g(t,s) D(x, t), and (1 - f - g) centre with a fit around the mean image."""
    for t, s in itertools.pairwise(grid(steps)):
        f, g = coefficients(torch.tensor([t], dtype=torch.float64), torch.tensor([s], dtype=torch.float64))
        x = f.item() * x + g.item() * denoiser(x, torch.full((len(x),), t)) + (1 - f - g).item() * centre
    return x


def main(steps: int = 2000, samples: int = 1000) -> dict[str, list[float]]:
    """Train, fit and compare; returns the mean squared errors of 1, 2, 3 and 5 jumps by name."""
    torch.manual_seed(0)
    started = time.time()
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8] in [-1, 1]
    denoiser = train(images, steps)
    print(f"trained in {time.time() - started:.0f} s")

    started = time.time()
    options = {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "samples": samples, "batch": 500}
    ode = fit_preconditioning(denoiser, images, **options)
    print(f"fitted in {time.time() - started:.0f} s")
    ode.save("your_own_denoiser.npz")
    ode.plot().savefig("your_own_denoiser.png")

    around = FittedODE.load("your_own_denoiser.npz", centred=True)  # the same fit, around the mean image

    noise = SIGMA_MAX * torch.randn(512, 1, 8, 8)
    exact = heun(denoiser, noise, 200)
    forms = {
        "ctm": (lambda t, s: (s / t, 1 - s / t), 0.0),
        "backward": (ode.backward, 0.0),
        "forward": (ode.forward, 0.0),
        "backward, centred": (around.backward, around.centre),
        "forward, centred": (around.forward, around.centre),
    }
    print("mean squared error to the exact solution after 1, 2, 3, 5 jumps")
    errors = {}
    for name, form in forms.items():
        ends = [jumps(denoiser, noise, count, *form) for count in (1, 2, 3, 5)]
        errors[name] = [(end - exact).square().mean().item() for end in ends]
        print(f"{name:17}", *(f"{error:8.4f}" for error in errors[name]))
    return errors


if __name__ == "__main__":
    main()
