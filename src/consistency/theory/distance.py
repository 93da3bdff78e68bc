"""Distances between two batches of images, one number per image."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def squared_l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference. a, b: [N, ...]; returns [N]."""
    return (a - b).flatten(1).square().mean(1)


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """Pseudo-Huber distance sqrt(||a - b||^2 + c^2) - c with c = 0.00054 sqrt(d) (iCT). a, b: [N, ...]; returns [N]."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return torch.sqrt((a - b).flatten(1).square().sum(1) + c**2) - c


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """||a - b|| (ECT), whose gradient is 0 where the two are equal. a, b: [N, ...]; returns [N]."""
    return torch.linalg.vector_norm((a - b).flatten(1), dim=1)
