"""Noise levels: time grids and the noise distributions of the losses."""

import torch
from torch import Tensor


def rho_grid(nodes: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Descending time grid of EDM, uniform in t^(1/rho).

    Returns a float64 tensor [nodes] that starts at exactly sigma_max and ends at exactly sigma_min.
    Raises ValueError for fewer than two nodes or an empty range. Karras et al. 2022, eq. (5).
    """
    if nodes < 2:
        raise ValueError(f"a time grid needs at least 2 nodes, got {nodes}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"a time grid needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    ramp = torch.linspace(0, 1, nodes, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid = (high + ramp * (low - high)) ** rho
    # The roots round: the ends must be the study's own numbers, or s = sigma_min would fall outside the fit.
    grid[0], grid[-1] = sigma_max, sigma_min
    return grid


def log_grid(nodes: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Descending time grid, uniform in ln t. Returns a float64 tensor [nodes] with exact ends."""
    if nodes < 2:
        raise ValueError(f"a time grid needs at least 2 nodes, got {nodes}")
    grid = torch.exp(
        torch.linspace(
            torch.log(torch.tensor(sigma_max, dtype=torch.float64)).item(),
            torch.log(torch.tensor(sigma_min, dtype=torch.float64)).item(),
            nodes,
            dtype=torch.float64,
        )
    )
    grid[0], grid[-1] = sigma_max, sigma_min
    return grid


def lognormal_sigma(count: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Noise levels with ln sigma ~ N(mean, std^2). Returns float32 [count]. EDM's training distribution."""
    return torch.exp(mean + std * torch.randn(count, generator=generator, device=generator.device))


def ctm_dsm_sigma(
    count: int, sigma_min: float, sigma_max: float, generator: torch.Generator, rho: float = 7.0
) -> Tensor:
    """Noise levels of CTM's denoising score matching term.

    Half are EDM's lognormal(-1.2, 1.2); half are rho-grid values at U(0, 0.7), that is the large levels
    a jump starts from. Returns float32 [count] in (0, sigma_max].
    """
    half = count // 2
    ramp = 0.7 * torch.rand(count - half, generator=generator, device=generator.device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    large = (high + ramp * (low - high)) ** rho
    return torch.cat([lognormal_sigma(half, -1.2, 1.2, generator), large])


def edm_weight(t: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight (t^2 + sigma_data^2) / (t sigma_data)^2, in the shape of t."""
    return (t**2 + sigma_data**2) / (t * sigma_data) ** 2
