"""Seeds are functions of what they are for, and the same for ever; the noise of an image is its own."""

import itertools

import pytest
import torch

from consistency.base.seeding import ImageNoise, derived_seed, generator


def test_seeds_are_63_bits_and_all_different() -> None:
    purposes = ("image", "student", "distillation", "dropout", "teacher")
    seeds = [derived_seed(*p) for p in itertools.product(range(20), purposes, range(20))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_the_parts_of_a_seed_cannot_be_confused() -> None:
    assert derived_seed(1, "a", 23) != derived_seed(12, "a", 3)
    assert derived_seed(0, "a", 11) != derived_seed(0, "a/1", 1)


def test_seeds_stay_what_they_are() -> None:
    """Changing one changes every result and breaks every resumed training: bump the version if it must be."""
    assert derived_seed(0, "image") == 7512138834953151250
    assert derived_seed(1, "distillation", 7) == 5197240993927874692


def test_a_generator_is_a_function_of_its_purpose_alone() -> None:
    first = torch.rand(3, generator=generator(3, "test", 5))
    torch.manual_seed(9)
    assert torch.equal(first, torch.rand(3, generator=generator(3, "test", 5)))
    assert not torch.equal(first, torch.rand(3, generator=generator(3, "test", 6)))


def test_image_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    ImageNoise(range(3), (1, 2, 2), [1] * 10).fresh()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("classes", [[], [1] * 10, [90, 10]])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_latents_labels_and_fresh_noise_are_each_images_own(batch: int, classes: list[int]) -> None:
    shape = (3, 4, 4)
    whole = ImageNoise(range(64), shape, classes)
    parts = [ImageNoise(range(i, min(i + batch, 64)), shape, classes) for i in range(0, 64, batch)]
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    for _ in range(3):
        assert torch.equal(whole.fresh(), torch.cat([part.fresh() for part in parts]))
    assert (whole.labels is None) == (not classes)
    if whole.labels is not None:
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))


def test_latents_are_standard_normal_and_unlike_each_other() -> None:
    latents = ImageNoise(range(2000), (1, 4, 4)).latents.flatten(1)
    assert latents.mean().item() == pytest.approx(0, abs=0.02)
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    # Neighbouring seeds must not be correlated, in pixels or in images.
    assert (latents[:-1] * latents[1:]).mean().abs() < 0.02


def test_conditional_labels_are_uniform_and_beside_the_same_latents() -> None:
    labelled = ImageNoise(range(2000), (1, 1, 1), [1] * 10)
    assert torch.bincount(labelled.labels, minlength=10).min() > 150  # type: ignore[arg-type]
    assert torch.equal(labelled.latents, ImageNoise(range(2000), (1, 1, 1)).latents)


def test_balanced_labels_stay_what_they_are() -> None:
    """A draw of the image's generator after its latents; changing it changes every image of a conditional network."""
    shape = (1, 4, 4)
    noise, drawn = ImageNoise(range(50), shape, [1] * 10), []
    for seed in range(50):
        own = generator(seed, "image")
        torch.randn(shape, generator=own)
        drawn.append(int(torch.randint(10, (1,), generator=own)))
    assert noise.labels is not None and noise.labels.tolist() == drawn
    # The fresh noise after them does not depend on the proportions.
    assert torch.equal(noise.fresh(), ImageNoise(range(50), shape, [900, 0, 100]).fresh())


def test_labels_have_the_proportions_of_the_classes() -> None:
    labels = ImageNoise(range(4000), (1, 1, 1), [900, 0, 100]).labels
    assert labels is not None
    first, none, last = torch.bincount(labels, minlength=3).tolist()
    error = (4000 * 0.9 * 0.1) ** 0.5
    assert none == 0 and first + last == 4000 and abs(first - 3600) < 5 * error
