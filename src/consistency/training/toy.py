"""The paper's toy in the plane: two tight Gaussians learnt by consistency training (GC and its released notebook)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consistency.base.seeding import derived_seed, generator
from consistency.nets.denoiser import init_denoiser
from consistency.theory.curriculum import DoublingCurriculum
from consistency.theory.distance import squared_l2
from consistency.theory.flows import Coupling, Pairs, coupled, drawn_pairs
from consistency.theory.noise import rho_grid
from consistency.theory.oracles import MixtureTeacher
from consistency.theory.preconditioning import build_preconditioning
from consistency.theory.solver import every
from consistency.training.consistency_training import ConsistencyTraining, TransportTraining
from consistency.training.ema import Ema
from consistency.training.update import Stream, Update

#: modes at (0, -0.5) and (0, 0.5), standard deviation 0.01
TWO_GAUSSIANS = MixtureTeacher(
    torch.tensor([0.5, 0.5]), torch.tensor([[0.0, -0.5], [0.0, 0.5]]), torch.tensor([1e-4, 1e-4])
)
SIGMA_MIN, SIGMA_MAX = 0.001, 5.0


@dataclass(frozen=True)
class Toy:
    """A trained toy, seen by its EMA's f.

    times [T], ascending; data, noise [n, 2]: the pairs followed, noise re-paired if the coupling is ot; endpoints
    [T, n, 2]: f(x + t z, t); paths [T, n, 2]: x_t of the coupling, bent for gc, straight otherwise; samples [n, 2]:
    f(sigma_max z, sigma_max), in one jump from noise alone. cost [T]: E||x - z||^2 of the coupling at each time,
    cost_se its standard error, over many more pairs; loss [steps].
    """

    times: np.ndarray
    data: np.ndarray
    noise: np.ndarray
    endpoints: np.ndarray
    paths: np.ndarray
    samples: np.ndarray
    cost: np.ndarray
    cost_se: np.ndarray
    loss: np.ndarray


def train_toy(
    coupling: Coupling,
    seed: int,
    *,
    mu: float = 1.0,
    steps: int = 4000,
    batch: int = 256,
    learning_rate: float = 5e-4,
    width: int = 64,
    points: int = 10_000,
    followed: int = 64,
    measured: int = 2048,
) -> Toy:
    """Train ic, ot or gc (each image generated with probability mu) and follow it through time.

    As in the released notebook: cm's preconditioning with sigma_data 0.5, levels from 10 to 100 intervals, squared
    distance with weight 1 / (t - u), average of rate 0.9999 with its warm-up. Ours: our perceptron, and a learning rate
    and length that take under a minute on one core (there 5e-5 and 10,000).
    """
    draws = generator(seed, "toy data")
    images = TWO_GAUSSIANS.sample(points, draws)[:, :, None, None]
    network = {"network": "mlp", "img_resolution": 1, "img_channels": 2, "width": width, "depth": 2, "embedding": 32}
    student = init_denoiser(network, derived_seed(seed, "toy student")).train()
    ema = Ema(student, 0.9999, warm_up=2 / 3)
    objective = (TransportTraining if coupling == "ot" else ConsistencyTraining)(
        student,
        ema.model if coupling == "gc" else None,
        build_preconditioning("cm", sigma_data=0.5),
        squared_l2,
        DoublingCurriculum(steps, SIGMA_MIN, SIGMA_MAX, first=10, last=100),
        (SIGMA_MIN, SIGMA_MAX),
        mu if coupling == "gc" else 0.0,
    )

    def batches(step: int) -> tuple[Tensor, None]:
        return images[torch.randint(points, (batch,), generator=generator(seed, "toy batch", step))], None

    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)
    update = Update(student, optimizer, objective, Stream(batches, batch, batch, seed, "toy"))
    losses = torch.empty(steps)
    for step in range(steps):
        losses[step] = update.step(step)[0]["loss"]
        ema.update(step + 1)
    draws = generator(seed, "toy pairs")
    pairs = coupled("ot" if coupling == "ot" else "ic", drawn_pairs(TWO_GAUSSIANS.sample(measured, draws), draws), 0.0)
    return _follow(coupling == "gc", objective, ema, losses, pairs, followed)


@torch.no_grad()
def _follow(
    generates: bool, objective: ConsistencyTraining, ema: Ema, losses: Tensor, pairs: Pairs, followed: int
) -> Toy:
    """Follow fresh pairs through the trained toy, at the times of its last grid."""
    data, noise = pairs.data[:, :, None, None], pairs.noise[:, :, None, None]
    times = rho_grid(101, SIGMA_MIN, SIGMA_MAX).flip(0)

    def endpoint(x: Tensor, t: float) -> Tensor:
        return objective.endpoint(ema.model, x, every(t, x), None)

    endpoints = torch.stack([endpoint(data + t * noise, t) for t in times.tolist()])
    sources = endpoints if generates else data.expand_as(endpoints)
    each = (sources - noise).square().flatten(2).sum(2)  # [T, measured]
    paths = sources + times.float()[:, None, None, None, None] * noise
    kept = slice(followed)
    return Toy(
        times=times.numpy(),
        data=data[kept].flatten(1).numpy(),
        noise=noise[kept].flatten(1).numpy(),
        endpoints=endpoints[:, kept].flatten(2).numpy(),
        paths=paths[:, kept].flatten(2).numpy(),
        samples=endpoint(SIGMA_MAX * noise[kept], SIGMA_MAX).flatten(1).numpy(),
        cost=each.mean(1).numpy(),
        cost_se=(each.std(1) / len(data) ** 0.5).numpy(),
        loss=losses.numpy(),
    )
