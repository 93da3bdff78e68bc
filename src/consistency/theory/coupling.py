"""Couplings of data and noise in consistency training: independent, by optimal transport, by a generator.

ic, the independent coupling, pairs each image with the noise drawn for it and needs no function here. Issenhuth et al.
2025 (GC) and its released code.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from consistency.theory.solver import expand

# The endpoint predictor: (x [N, ...], t [N]) -> an estimate of where x ends, [N, ...].
Predictor = Callable[[Tensor, Tensor], Tensor]


def assignment(images: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return ot's noise index of each image, int64 [N]: the exact minimum of sum_i ||x_i - z_assignment(i)||^2.

    images, noise: [N, ...]; labels: int64 [N] of a conditional model, None otherwise. With labels, noise is exchanged
    within a class only: the images of a class then still meet exactly standard normal noise, as the sampler draws it
    for that class. An assignment over all classes would tie noise to class, and the sampler's distribution would differ
    from that of training. The price is a weaker coupling, none at all with one image per class. The cost is computed in
    float64 on the images' device, the assignment on the CPU, which has to wait for a GPU.
    """
    if labels is None:
        # Up to terms that no assignment changes, ||x - z||^2 is -2 x . z.
        gain = images.flatten(1).double() @ noise.flatten(1).double().T
        return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]).to(images.device)
    chosen = torch.empty(len(images), dtype=torch.int64, device=images.device)
    classes = labels.cpu().numpy()
    for label in np.unique(classes):
        rows = torch.from_numpy(np.flatnonzero(classes == label)).to(images.device)
        chosen[rows] = rows[assignment(images[rows], noise[rows])]
    return chosen


def generator_mask(count: int, mu: float, generator: torch.Generator) -> Tensor:
    """Draw the mask of images to replace by generated ones, bool [count]: each is True with probability mu.

    mu is the paper's: the probability of gc. The released code's mix_gen_induced_traj is the probability of ic, 1 - mu
    (its README says otherwise; at 0.5 both agree).
    """
    return torch.rand(count, generator=generator, device=generator.device) < mu


def generated(predictor: Predictor, images: Tensor, noise: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """Apply gc: x_hat = f(x* + u z, u) where mask [N] is True, the image elsewhere, without gradient. GC (13).

    u [N]: the lower of the two levels; both levels then use x_hat and the same noise. The predictor sees all images:
    a batch whose size changes from step to step would be slower on a GPU than the evaluations it saves.
    """
    with torch.no_grad():
        endpoints = predictor(images + expand(u, images) * noise, u)
    return torch.where(mask.reshape(-1, *[1] * (images.dim() - 1)), endpoints, images)
