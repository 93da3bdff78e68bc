"""The perceptron for vectors."""

from __future__ import annotations

import pytest
import torch

from consistency.nets.mlp import MLP


def test_shape_is_restored() -> None:
    x = torch.randn(3, 2, 4, 4)
    assert MLP((2, 4, 4), width=16, depth=1)(x, torch.zeros(3)).shape == x.shape


def test_a_number_of_dimensions_means_a_vector() -> None:
    x = torch.randn(3, 5, 1, 1)
    assert MLP(5, width=16, depth=1)(x, torch.zeros(1)).shape == x.shape


def test_starts_near_zero_with_gradients_everywhere() -> None:
    net = MLP(6, width=16, depth=2, label_dim=3)
    out = net(torch.randn(8, 6, 1, 1), torch.linspace(-1.5, 1.1, 8), torch.eye(3)[torch.arange(8) % 3])
    assert out.abs().max() < 1e-3
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_dropout_acts_in_training_only() -> None:
    net = MLP(6, width=16, depth=1, dropout=0.5)
    torch.nn.init.normal_(net.linear_out.weight)
    x, noise = torch.randn(4, 6, 1, 1), torch.zeros(4)
    assert not torch.equal(net(x, noise), net(x, noise))
    net.eval()
    assert torch.equal(net(x, noise), net(x, noise))


def test_one_time_for_the_batch_equals_a_time_per_sample() -> None:
    net = MLP(6, width=16, depth=2)
    torch.nn.init.normal_(net.linear_out.weight)
    x = torch.randn(4, 6, 1, 1)
    torch.testing.assert_close(net(x, torch.full([1], 0.3)), net(x, torch.full([4], 0.3)))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("class_labels", "label_dim"),
        ("augment_labels", "augment_dim"),
        ("second_noise_labels", "second_time"),
    ],
)
def test_condition_the_network_lacks_is_an_error(condition: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(2, width=8, depth=1)(torch.zeros(1, 2, 1, 1), torch.zeros(1), **{condition: torch.zeros(1)})


def test_odd_embedding_is_an_error() -> None:
    with pytest.raises(ValueError, match="even number"):
        MLP(2, embedding=15)
