"""The couplings of data and noise: exact assignment, generated endpoints, and who is replaced."""

import itertools

import numpy as np
import pytest
import torch
from tests.draws import numpy_draws, seeded
from torch import Tensor

from consistency.theory.coupling import assignment, generated, generator_mask
from consistency.theory.solver import expand


def cost(images: Tensor, noise: Tensor) -> float:
    return (images - noise).square().sum().item()


@pytest.mark.parametrize("seed", range(5))
def test_the_assignment_is_the_best_of_all_permutations(seed: int) -> None:
    images, noise = torch.randn(2, 6, 1, 2, 2, generator=seeded(seed))
    best = min(cost(images, noise[list(order)]) for order in itertools.permutations(range(6)))
    assert cost(images, noise[assignment(images, noise)]) == pytest.approx(best, rel=1e-6)


def test_in_one_dimension_the_assignment_sorts() -> None:
    images, noise = torch.randn(2, 100, 1, generator=seeded())
    paired = noise[assignment(images, noise)]
    order = images[:, 0].argsort()
    assert torch.equal(paired[order, 0], noise[:, 0].sort().values)


@pytest.mark.statistical
def test_labelled_noise_stays_standard_normal_within_a_class() -> None:
    """The reason for assigning within classes: over all classes, a class's noise would lean towards its images."""
    generator = seeded()
    labels = torch.arange(2).repeat(32)
    means = {True: [], False: []}
    for _ in range(50):
        images = torch.where(labels[:, None] == 0, -1.0, 1.0) + 0.1 * torch.randn(64, 1, generator=generator)
        noise = torch.randn(64, 1, generator=generator)
        for by_class in means:
            means[by_class].append(noise[assignment(images, noise, labels if by_class else None)][labels == 1].mean())
    assert abs(np.mean(means[True])) < 0.125  # 5 standard errors of 1,600 draws
    assert np.mean(means[False]) > 0.5


@pytest.mark.statistical
@pytest.mark.parametrize("mu", [0.3, 0.7])
def test_mu_is_the_probability_of_a_generated_image(mu: float) -> None:
    mask = generator_mask(20_000, mu, seeded())
    assert mask.float().mean().item() == pytest.approx(mu, abs=0.02)  # 6 standard errors


def test_generated_images_are_the_predictor_s_endpoints_where_the_mask_says_so() -> None:
    images, noise = torch.randn(2, 5, 1, 2, 2, generator=seeded())
    u = torch.tensor([0.1, 1.0, 2.0, 3.0, 50.0], dtype=torch.float64)
    mask = torch.tensor([True, False, True, False, True])
    weight = torch.ones((), requires_grad=True)

    def predictor(x: Tensor, t: Tensor) -> Tensor:
        return weight * x / (1 + expand(t, x))

    found = generated(predictor, images, noise, u, mask)
    assert not found.requires_grad
    for i in range(5):
        endpoint = (images[i] + u[i].float() * noise[i]) / (1 + u[i].float())
        torch.testing.assert_close(found[i], endpoint if mask[i] else images[i])


# --- laws, at any size


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_an_assignment_is_a_permutation_that_none_of_many_others_beats(seed: int, labelled: bool) -> None:
    generator, draws = seeded(seed), numpy_draws(seed)
    count, shape = int(draws.integers(1, 60)), tuple(draws.integers(1, 5, 3).tolist())
    images = float(draws.uniform(0.1, 30)) * torch.randn(count, *shape, generator=generator)
    noise = torch.randn(count, *shape, generator=generator)
    labels = torch.randint(int(draws.integers(1, 8)), (count,), generator=generator) if labelled else None
    chosen = assignment(images, noise, labels)
    assert torch.equal(chosen.sort().values, torch.arange(count))
    classes = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    members = [(classes == label).nonzero()[:, 0] for label in classes.unique()]
    for rows in members:
        assert torch.equal(chosen[rows], rows[assignment(images[rows], noise[rows])])
    least = cost(images.double(), noise[chosen].double())
    for _ in range(50):
        other = torch.arange(count)
        for rows in members:
            other[rows] = rows[torch.randperm(len(rows), generator=generator)]
        assert least <= cost(images.double(), noise[other].double()) * (1 + 1e-12)
    assert least <= cost(images.double(), noise.double()) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_who_is_paired_with_whom_does_not_depend_on_the_order(seed: int) -> None:
    generator = seeded(seed)
    images, noise = torch.randn(2, 3 + 5 * seed, 4, generator=generator)
    labels = torch.randint(3, (len(images),), generator=generator)
    rows, others = (torch.randperm(len(images), generator=generator) for _ in range(2))
    for own in (None, labels):
        paired = noise[assignment(images, noise, own)]
        assert torch.equal(
            noise[rows][assignment(images[rows], noise[rows], None if own is None else own[rows])], paired[rows]
        )
    # Without classes the noise may come in any order of its own.
    assert torch.equal(noise[others][assignment(images, noise[others])], noise[assignment(images, noise)])


@pytest.mark.parametrize("seed", range(10))
def test_the_masks_of_any_sweep_are_nested(seed: int) -> None:
    """The arms of a sweep over mu differ in as few images as they can."""
    draws = numpy_draws(seed)
    count, sweep = int(draws.integers(1, 3000)), [0.0, *np.sort(draws.uniform(size=4)).tolist(), 1.0]
    masks = [generator_mask(count, mu, seeded(seed)) for mu in sweep]
    assert not masks[0].any() and masks[-1].all()
    for fewer, more in itertools.pairwise(masks):
        assert bool((more | ~fewer).all())
