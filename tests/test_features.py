"""Distances between feature sets against closed forms, and the extractors they are measured with."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from consistency.errors import UserError
from consistency.features import (
    INCEPTION_FILE,
    Extractor,
    Statistics,
    classifier_extractor,
    frechet_distance,
    inception_extractor,
    kernel_distance,
)
from consistency.layout import Layout
from consistency.nets.classifier import Classifier
from consistency.stages.extractor import _train_classifier, make_extractor
from consistency.study import Study
from consistency.training.data import load_images

CPU = torch.device("cpu")


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Statistics:
    return Statistics(mean, covariance, np.empty((0, len(mean))))


def random_covariance(seed: int, d: int = 6) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(d, 2 * d))
    return a @ a.T / d


def normal(count: int, seed: int, shift: float = 0.0) -> Statistics:
    return Statistics.of(np.random.default_rng(seed).normal(shift, 1, (count, 6)).astype(np.float32))


# --- Frechet distance


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    mean = np.array([0.0, 2.0, -1.0])
    expected = np.sum(mean**2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    found = frechet_distance(gaussian(np.zeros(3), np.diag(a)), gaussian(mean, np.diag(b)))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_is_the_symmetric_formula(seed: int) -> None:
    """|m|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, through eigenvalues of symmetric matrices only."""
    a, b = random_covariance(seed), random_covariance(seed + 10)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    mean = np.random.default_rng(seed).normal(size=6)
    expected = mean @ mean + np.trace(a) + np.trace(b) - 2 * cross
    there = frechet_distance(gaussian(np.zeros(6), a), gaussian(mean, b))
    back = frechet_distance(gaussian(mean, b), gaussian(np.zeros(6), a))
    assert there == pytest.approx(expected, rel=1e-7)
    assert back == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_to_itself_is_0() -> None:
    a = normal(500, 0)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_statistics_are_those_of_numpy_in_float64() -> None:
    features = np.random.default_rng(0).normal(1000, 1, (200, 4)).astype(np.float32)
    found = Statistics.of(features)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.covariance, np.cov(features.astype(np.float64).T), rtol=1e-12)
    np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(0), rtol=1e-12)


# --- kernel distance


def test_kernel_distance_is_the_unbiased_estimate_written_out() -> None:
    """One subset of everything: MMD^2 without the diagonal, kernel (x.y/d + 1)^3."""
    a, b = normal(20, 0), normal(20, 1, shift=0.5)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x.astype(np.float64) @ y.T.astype(np.float64) / 6 + 1) ** 3

    within = [(k.sum() - np.trace(k)) / (20 * 19) for k in (kernel(s.features, s.features) for s in (a, b))]
    expected = sum(within) - 2 * kernel(a.features, b.features).mean()
    assert kernel_distance(a, b, subsets=1, subset_size=20) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    """About 0 for two samples of one distribution, on both sides of it; far from 0 for another."""
    same = [kernel_distance(normal(200, 2 * i), normal(200, 2 * i + 1), 1, 200) for i in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(60)
    assert min(same) < 0 < max(same)
    assert kernel_distance(normal(200, 0), normal(200, 1, shift=1.0), 1, 200) > 20 * np.std(same)


def test_kernel_distance_is_a_function_of_its_seed_and_leaves_numpys_generator_alone() -> None:
    a, b = normal(100, 0), normal(100, 1)
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    first = kernel_distance(a, b, 5, 30)
    assert np.array_equal(np.random.random(3), expected)  # noqa: NPY002
    assert kernel_distance(a, b, 5, 30) == first
    assert kernel_distance(a, b, 5, 30, seed=1) != first


# --- the classifier


def test_features_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    extract = classifier_extractor(Classifier(1, 10, 8), CPU)
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    whole = extract(images)
    assert whole.shape == (50, 8)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(Extractor("other", extract.batch, 7)(images), whole, rtol=1e-5, atol=1e-6)


def test_the_trained_classifiers_features_have_mean_square_1(tiny: Callable[..., Study], first_results: Layout) -> None:
    data = load_images(first_results.dataset)
    model, accuracy = _train_classifier(tiny({"scores.classifier.steps": 60}), data, CPU)
    rows = np.arange(len(data)) % 5 > 0
    features = classifier_extractor(model, CPU)(np.array(data.images[rows]))
    assert np.square(features).mean() == pytest.approx(1, rel=1e-4)
    assert accuracy > 0.4  # by chance: 0.1


def test_the_extractor_stage_is_deterministic(tiny: Callable[..., Study], first_results: Layout) -> None:
    path = first_results.extractor / "features.npy"
    torch.manual_seed(1)
    make_extractor(tiny(), first_results, CPU)
    first = path.read_bytes()
    torch.manual_seed(2)
    make_extractor(tiny(), first_results, CPU)
    assert path.read_bytes() == first


# --- Inception, played by a small network of the same interface


class Layers(nn.Module):
    """[N, 3, 299, 299] to 2048 features that tell the channels apart."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3]).repeat(1, 683)[:, :2048]


class Inception(nn.Module):
    """The TorchScript's interface: it resizes and normalises by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        x = nn.functional.interpolate(x, size=[299, 299], mode="bilinear")
        return self.layers((x - 128) / 128)


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / INCEPTION_FILE
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Inception()).save(str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", ["legacy_tensorflow", "clean"])
def test_both_modes_give_2048_features_without_a_network(
    weights: tuple[Path, str], mode: str, no_network: None
) -> None:
    extract = inception_extractor(weights[0], mode, CPU, weights[1])
    assert extract.name == f"inception-{mode}"
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[0], images[1], images[2] = (255, 0, 0), (0, 255, 0), (128, 128, 128)
    features = extract(images)
    assert features.shape == (3, 2048)
    red, green, blue = 127 / 128, -1.0, -1.0
    np.testing.assert_allclose(features[0, :3], [red, green, blue], atol=1e-5)
    np.testing.assert_allclose(features[1, :3], [green, red, blue], atol=1e-5)
    np.testing.assert_allclose(features[2], 0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", ["legacy_tensorflow", "clean"])
def test_grey_images_are_repeated_to_three_channels(weights: tuple[Path, str], mode: str) -> None:
    extract = inception_extractor(weights[0], mode, CPU, weights[1])
    grey = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    assert np.array_equal(extract(grey), extract(np.repeat(grey, 3, axis=3)))


def test_missing_weights_are_named_with_the_verb_that_stages_them(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(UserError, match="is missing: run `python -m consistency stage-inception`") as error:
        inception_extractor(tmp_path / INCEPTION_FILE, "clean", CPU)
    assert str(tmp_path) in str(error.value)


def test_other_weights_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    path = tmp_path / INCEPTION_FILE
    path.write_bytes(b"not torchscript")
    with pytest.raises(UserError, match=r"has sha256 [0-9a-f]{64}, not f58cb9b6.*: delete it and stage it again"):
        inception_extractor(path, "clean", CPU)
