"""The library's Lion against its published rule: Chen et al. 2023, algorithm 2, without weight decay."""

import torch
from lion_pytorch import Lion


def test_a_step_is_the_sign_of_an_interpolation_and_the_momentum_another() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, dtype=torch.float64, generator=generator)
    weight = torch.nn.Parameter(start.clone())
    optimizer = Lion([weight], lr=1e-3)
    expected, momentum = start.clone(), torch.zeros(5, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.randn(5, dtype=torch.float64, generator=generator)
        weight.grad = gradient.clone()
        optimizer.step()
        expected -= 1e-3 * torch.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)
