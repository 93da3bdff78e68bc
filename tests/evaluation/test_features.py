"""Distances between feature sets against closed forms, and the extractors they are measured with."""

import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import fid
from tests.conftest import vouch_for
from tests.draws import numpy_draws
from torch import Tensor, nn

from consistency.base.errors import UserError
from consistency.config.job import Job
from consistency.config.paths import StudyPaths
from consistency.config.study import Study
from consistency.data.prepared import load_images
from consistency.data.resources import INCEPTION
from consistency.evaluation.extractor import open_extractor, read_data_statistics, train_classifier
from consistency.evaluation.features import (
    Extractor,
    Statistics,
    classifier_extractor,
    frechet_distance,
    inception_extractor,
    kernel_distance,
    regrouped,
)
from consistency.nets.classifier import Classifier
from consistency.stages.extractor import make_extractor

CPU = torch.device("cpu")


def normal(count: int, seed: int, shift: float = 0.0) -> Statistics:
    return Statistics.of(numpy_draws(seed).normal(shift, 1, (count, 6)).astype(np.float32))


# --- Frechet distance


@pytest.mark.parametrize("rank", [6, 300])
def test_frechet_distance_is_clean_fids(rank: int) -> None:
    """Also of covariances of fewer directions than features, as of few images."""
    features = numpy_draws().normal(size=(2, 400, rank)) @ numpy_draws(1).normal(size=(2, rank, 64))
    a, b = (Statistics.of(each) for each in features + np.array([0.0, 0.3])[:, None, None])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10 if rank > 64 else 1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-7)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("piece", [1, 64, 1000, 5000])
def test_statistics_gathered_piece_by_piece_are_those_of_numpy(piece: int) -> None:
    """Correlated features far from 0, as Inception's are not, so that sums about 0 would lose nine digits."""
    draws = numpy_draws()
    features = (30 + draws.normal(0, 0.01, (3000, 12)) @ draws.normal(size=(12, 12))).astype(np.float32)
    pieces = (features[i : i + piece] for i in range(0, 3000, piece))
    found = Statistics.gather(pieces, 3000, 100)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    expected = np.cov(features.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).min())
    np.testing.assert_allclose(found.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    whole = Statistics.of(features)
    assert np.array_equal(found.covariance, whole.covariance)  # the pieces do not even change the last bit


def test_some_features_are_kept_evenly_spread() -> None:
    features = np.arange(2000, dtype=np.float32)[:, None].repeat(2, 1)

    def kept(keep: int) -> np.ndarray:
        return Statistics.gather((features[i : i + 7] for i in range(0, 2000, 7)), 2000, keep).features[:, 0]

    assert np.array_equal(kept(10), np.arange(0, 2000, 200))
    assert np.array_equal(kept(2000), kept(5000))
    assert np.array_equal(kept(2000), features[:, 0])
    gaps = np.diff(kept(1500))
    assert len(gaps) == 1499
    assert set(gaps) == {1.0, 2.0}


def test_memory_depends_on_what_is_kept_alone() -> None:
    def peak(total: int) -> int:
        pieces = (np.ones((1000, 16), np.float32) for _ in range(total // 1000))
        tracemalloc.start()
        Statistics.gather(pieces, total, 100)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(200_000) < peak(2_000) + 1_000_000  # bytes; the features alone are 12.8 MB


@pytest.mark.parametrize("said", [9, 11, 1])
def test_statistics_of_fewer_images_than_announced_are_refused(said: int) -> None:
    with pytest.raises(ValueError, match="as many as announced"):
        Statistics.gather([np.ones((10, 2), np.float32)[: 1 if said == 1 else 10]], said, 5)


def test_rows_are_regrouped_whole_and_in_order() -> None:
    chunks = [np.arange(0, 3), np.arange(3, 17), np.arange(17, 17), np.arange(17, 20)]
    found = list(regrouped(chunks, 8))
    assert [len(group) for group in found] == [8, 8, 4]
    assert np.array_equal(np.concatenate(found), np.arange(20))
    assert list(regrouped([], 8)) == []


# --- kernel distance


def test_kernel_distance_is_the_unbiased_estimate_written_out() -> None:
    """One subset of everything: MMD^2 without the diagonal, kernel (x.y/d + 1)^3."""
    a, b = normal(20, 0), normal(20, 1, shift=0.5)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x.astype(np.float64) @ y.T.astype(np.float64) / 6 + 1) ** 3

    within = [(k.sum() - np.trace(k)) / (20 * 19) for k in (kernel(s.features, s.features) for s in (a, b))]
    expected = sum(within) - 2 * kernel(a.features, b.features).mean()
    assert kernel_distance(a, b, subsets=1, subset_size=20) == pytest.approx(expected, rel=1e-9)


@pytest.mark.statistical
def test_kernel_distance_is_unbiased() -> None:
    """About 0 for two samples of one distribution, on both sides of it; far from 0 for another."""
    same = [kernel_distance(normal(200, 2 * i), normal(200, 2 * i + 1), 1, 200) for i in range(60)]
    assert abs(np.mean(same)) < 5 * np.std(same) / np.sqrt(60)
    assert min(same) < 0 < max(same)
    assert kernel_distance(normal(200, 0), normal(200, 1, shift=1.0), 1, 200) > 20 * np.std(same)


def test_kernel_distance_reads_only_the_rows_it_needs_and_leaves_numpys_generator_alone(tmp_path: Path) -> None:
    """From float32 on disk, with the numbers of float64 in memory, and always of the same subsets."""
    from cleanfid.fid import kernel_distance as whole

    a, b = normal(100, 0), normal(100, 1)
    np.save(tmp_path / "a.npy", a.features)
    mapped = Statistics(a.mean, a.covariance, np.load(tmp_path / "a.npy", mmap_mode="r"))
    np.random.seed(5)  # noqa: NPY002
    found = kernel_distance(mapped, b, 3, 20)
    drawn = np.random.random(3)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    assert np.array_equal(np.random.random(3), drawn)  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert found == whole(*(s.features.astype(np.float64) for s in (a, b)), num_subsets=3, max_subset_size=20)


# --- the classifier


def test_features_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    extract = classifier_extractor(Classifier(1, 10, 8), CPU)
    images = numpy_draws().integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    whole = extract(images)
    assert whole.shape == (50, 8)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(Extractor("other", extract.batch, 7)(images), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.statistical
def test_the_trained_classifiers_features_have_mean_square_1(
    tiny: Callable[..., Study], first_results: StudyPaths
) -> None:
    data = load_images(first_results.dataset)
    model, accuracy = train_classifier(tiny({"scores.classifier.steps": 60}), data, CPU)
    rows = np.arange(len(data)) % 5 > 0
    features = classifier_extractor(model, CPU)(np.array(data.images[rows]))
    assert np.square(features).mean() == pytest.approx(1, rel=1e-4)
    assert accuracy > 0.4  # by chance: 0.1


def test_the_extractor_stage_is_deterministic_and_keeps_some_features_and_the_statistics_of_all(
    tiny: Callable[..., Study], first_results: StudyPaths, tmp_path: Path
) -> None:
    shutil.copytree(first_results.dataset, tmp_path / "results/tiny/dataset")
    layout = StudyPaths("tiny", tmp_path / "results")

    def made(study: Study, seed: int) -> Statistics:
        torch.manual_seed(seed)
        make_extractor(Job(study, layout), CPU)
        return read_data_statistics(Job(study, layout))

    some = tiny({"scores.kid_images": 50})
    whole, again, found = made(tiny(), 1), made(tiny(), 2), made(some, 3)
    assert np.array_equal(again.features, whole.features) and len(whole.features) == 200
    assert np.array_equal(found.features, whole.features[::4])
    for other in (again, found):
        assert np.array_equal(other.mean, whole.mean)
        assert np.array_equal(other.covariance, whole.covariance)
    (layout.extractor / "statistics.npz").write_bytes(b"PK")
    with pytest.raises(
        UserError,
        match=r"statistics\.npz is damaged .*: delete it and run `python -m consistency extractor --study FILE` again",
    ):
        read_data_statistics(Job(some, layout))


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
def weights(tmp_path: Path) -> Path:
    path = tmp_path / INCEPTION
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Inception()).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", ["legacy_tensorflow", "clean"])
def test_both_modes_give_2048_features_without_a_network(weights: Path, mode: str, no_network: None) -> None:
    """Of colour images and of grey ones, which are repeated."""
    extract = inception_extractor(weights, mode, CPU)
    assert extract.name == f"inception-{mode}"
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[0], images[1], images[2] = (255, 0, 0), (0, 255, 0), (128, 128, 128)
    features = extract(images)
    assert features.shape == (3, 2048)
    red, green, blue = 127 / 128, -1.0, -1.0
    np.testing.assert_allclose(features[0, :3], [red, green, blue], atol=1e-5)
    np.testing.assert_allclose(features[1, :3], [green, red, blue], atol=1e-5)
    np.testing.assert_allclose(features[2], 0, atol=1e-5)
    grey = numpy_draws().integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    assert np.array_equal(extract(grey), extract(np.repeat(grey, 3, axis=3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_study_opens_the_weights_only_after_their_digest_was_checked(
    weights: Path,
    tiny: Callable[..., Study],
    first_results: StudyPaths,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_network: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    vouch_for(weights)
    Path("resources").mkdir()
    staged = weights.rename(Path("resources") / INCEPTION)
    study, data = tiny({"scores.extractor": "inception"}), load_images(first_results.dataset)
    assert open_extractor(Job(study, first_results), data, CPU)(np.array(data.images[:2])).shape == (2, 2048)
    staged.write_bytes(b"not torchscript")
    with pytest.raises(UserError, match=r"has sha256 [0-9a-f]{64}, not "):
        open_extractor(Job(study, first_results), data, CPU)
