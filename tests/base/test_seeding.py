"""Seeds: functions of what they are for, and the same for ever."""

import itertools

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
    ImageNoise(range(3), (1, 2, 2), 10).fresh()
    assert torch.equal(torch.get_rng_state(), before)
