"""Train a flow map in a plain PyTorch loop, with ctm's coefficients and with fitted ones: two minutes on a CPU.

    python examples/flow_map.py

takes the denoiser of your_own_denoiser.py as the teacher. A jump G = f x + g D_theta(x, t, s) follows the teacher's ODE
if dG/dlambda_s + G = D(G, s), lambda = -ln t (docs/flow-maps.md). Only the line of f and g differs between the two.
"""

import copy
import itertools
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import jvp
from your_own_denoiser import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, Digits, grid, heun, train

from consistency import fit_preconditioning

Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Student(nn.Module):
    """The teacher's network with a second time, which has no effect before training: D_theta(x, t, s)."""

    def __init__(self, teacher: Digits) -> None:
        super().__init__()
        self.net = copy.deepcopy(teacher)
        self.second = nn.Linear(64, self.net.layers[0].out_features)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        t, s = t[:, None], s[:, None]
        total = t**2 + SIGMA_DATA**2
        here, there = (u.log() / 4 * self.net.frequencies for u in (t, s))
        first, *others = self.net.layers
        hidden = first(torch.cat([x.flatten(1) / total.sqrt(), here.cos(), here.sin()], 1))
        hidden = hidden + self.second(torch.cat([there.cos(), there.sin()], 1))
        for layer in others:
            hidden = layer(hidden)
        return (SIGMA_DATA**2 / total * x.flatten(1) + t * SIGMA_DATA / total.sqrt() * hidden).reshape(x.shape)


def spread(value: Tensor, x: Tensor) -> Tensor:
    """Shape numbers [N] to multiply images x."""
    return value.to(x.dtype)[:, None, None, None]


def distil(teacher: Digits, images: Tensor, coefficients: Coefficients, steps: int) -> Student:
    """Train a flow map of the teacher."""
    student = Student(teacher)
    optimiser = torch.optim.RAdam(student.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    low, high = SIGMA_MIN ** (1 / 7), SIGMA_MAX ** (1 / 7)
    for _ in range(steps):
        x_0 = images[torch.randint(len(images), (128,))]
        t, s = (low + (high - low) * torch.rand(2, len(x_0)).sort(0, descending=True).values) ** 7
        x = x_0 + spread(t, x_0) * torch.randn_like(x_0)

        def jump(s: Tensor, x: Tensor = x, t: Tensor = t) -> Tensor:
            f, g = coefficients(t.double(), s.double())
            return spread(f, x) * x + spread(g, x) * student(x, t, s)

        G, rate = jvp(jump, (s,), (-s,))  # ds/dlambda = -s
        with torch.no_grad():
            target, denoised = teacher(G, s), teacher(x, t)
        flow, same = G + rate - target, student(x, t, t) - denoised  # at s = t the student is the denoiser
        # Pseudo-Huber, as far as it matters here: the norm of an image's error.
        loss = (flow.flatten(1).norm(dim=1) + 0.3 * same.flatten(1).norm(dim=1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return student.eval()


@torch.no_grad()
def sample(student: Student, x: Tensor, coefficients: Coefficients, jumps: int) -> Tensor:
    """Jump from SIGMA_MAX to SIGMA_MIN."""
    times = torch.tensor(grid(jumps)).clamp(SIGMA_MIN, SIGMA_MAX).double()
    for t, s in itertools.pairwise(times):
        t, s = t.expand(len(x)), s.expand(len(x))
        f, g = coefficients(t, s)
        x = spread(f, x) * x + spread(g, x) * student(x, t.to(x.dtype), s.to(x.dtype))
    return x


def main(teacher_steps: int = 2000, samples: int = 1000, steps: int = 600) -> dict[str, list[float]]:
    """Train both; returns the mean squared errors of 1, 2, 3 and 5 jumps by name."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    teacher = train(images, teacher_steps).requires_grad_(False)
    options = {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "samples": samples, "batch": 500}
    ode = fit_preconditioning(teacher, images, **options)
    noise = SIGMA_MAX * torch.randn(512, 1, 8, 8)
    exact = heun(teacher, noise, 200)
    forms = {"ctm": lambda t, s: (s / t, 1 - s / t), "fitted, forward": ode.forward}
    print("mean squared error to the exact solution after 1, 2, 3, 5 jumps")
    errors = {}
    for name, coefficients in forms.items():
        torch.manual_seed(1)
        started = time.time()
        student = distil(teacher, images, coefficients, steps)
        ends = [sample(student, noise, coefficients, count) for count in (1, 2, 3, 5)]
        errors[name] = [(end - exact).square().mean().item() for end in ends]
        print(f"{name:17}", *(f"{error:8.4f}" for error in errors[name]), f"  {time.time() - started:.0f} s")
    return errors


if __name__ == "__main__":
    main()
