"""The perceptron for vectors."""

import torch

from consistency.nets.mlp import MLP


def test_a_number_of_dimensions_means_a_vector() -> None:
    x = torch.randn(3, 5, 1, 1)
    assert MLP(1, 5, 5, width=16, depth=1)(x, torch.zeros(1)).shape == x.shape


def test_the_perceptron_starts_near_zero_with_gradients_everywhere() -> None:
    net = MLP(1, 6, 6, width=16, depth=2, label_dim=3)
    out = net(torch.randn(8, 6, 1, 1), torch.linspace(-1.5, 1.1, 8), torch.eye(3)[torch.arange(8) % 3])
    assert out.abs().max() < 1e-3
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_dropout_acts_in_training_only() -> None:
    net = MLP(1, 6, 6, width=16, depth=1, dropout=0.5)
    torch.nn.init.normal_(net.linear_out.weight)
    x, noise = torch.randn(4, 6, 1, 1), torch.zeros(4)
    assert not torch.equal(net(x, noise), net(x, noise))
    net.eval()
    assert torch.equal(net(x, noise), net(x, noise))
