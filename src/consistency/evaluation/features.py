"""Feature extractors and the distances between two sets of features, through clean-fid."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from consistency.data.prepared import to_signed
from consistency.nets.classifier import Classifier

Array = np.ndarray


@dataclass(frozen=True)
class Extractor:
    """A feature extractor. name: as in the score files; batch: uint8 [n, H, W, C] -> float32 [n, d]."""

    name: str
    batch: Callable[[Array], Array]
    batch_size: int = 256

    def __call__(self, images: Array) -> Array:
        """Return features float32 [N, d] of uint8 images [N, H, W, C]."""
        return np.concatenate(list(self.pieces([images])))

    def pieces(self, chunks: Iterable[Array]) -> Iterator[Array]:
        """Yield the features of images in chunks [n, H, W, C], batch by batch."""
        return map(self.batch, regrouped(chunks, self.batch_size))


def regrouped(chunks: Iterable[Array], size: int) -> Iterator[Array]:
    """Yield the rows of all chunks as copies of `size` rows, the last one shorter, whatever the size of the chunks."""
    waiting: list[Array] = []
    rows = 0
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            waiting.append(chunk[start : start + size])
            rows += len(waiting[-1])
            if rows >= size:
                whole = np.concatenate(waiting)
                yield whole[:size]
                waiting, rows = [whole[size:]], rows - size
    if rows:
        yield np.concatenate(waiting)


def classifier_extractor(model: Classifier, device: torch.device) -> Extractor:
    """Return the extractor of a trained classifier's features."""
    model = model.to(device).eval()

    @torch.inference_mode()
    def batch(images: Array) -> Array:
        return model.features(to_signed(torch.from_numpy(images)).to(device)).float().cpu().numpy()

    return Extractor("classifier", batch)


def inception_extractor(weights: Path, mode: str, device: torch.device) -> Extractor:
    """Return clean-fid's Inception in mode legacy_tensorflow or clean. weights: under clean-fid's name, INCEPTION."""
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    network = InceptionV3W(str(weights.parent), download=False, resize_inside=mode == "legacy_tensorflow")
    network = network.to(device).eval()
    resize = build_resizer(mode)

    @torch.inference_mode()
    def batch(images: Array) -> Array:
        colour = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
        resized = np.stack([resize(image) for image in colour]).transpose(0, 3, 1, 2)
        return network(torch.from_numpy(resized).to(device).float()).float().cpu().numpy()

    return Extractor(f"inception-{mode}", batch, batch_size=64)


@dataclass(frozen=True)
class Statistics:
    """Mean [d] and covariance [d, d] in float64 of all features, and a subset of the features [n, d] for KID."""

    mean: Array
    covariance: Array
    features: Array

    @classmethod
    def of(cls, features: Array) -> "Statistics":
        """Return the statistics of features [N, d] and keep all of them."""
        return cls.gather([features], len(features), len(features))

    @classmethod
    def gather(cls, pieces: Iterable[Array], total: int, keep: int) -> "Statistics":
        """Return the statistics of features that come in pieces [n, d], `total` rows in all, and keep `keep` evenly
        spread rows. Memory depends on `keep` and d alone.

        Sums are taken about the mean of the first rows, in float64: as accurate as two passes. Raises ValueError for
        fewer than two rows, or a number of rows other than `total`.
        """
        wanted = np.arange(min(keep, total), dtype=np.int64) * total // min(keep, total)
        kept: list[Array] = []
        seen, center, first, second = 0, np.empty(0), np.empty(0), np.empty(0)
        for piece in regrouped(pieces, _PIECE):
            rows = piece.astype(np.float64)
            if not seen:
                center = rows.mean(0)
                first, second = np.zeros_like(center), np.zeros((len(center), len(center)))
            rows -= center
            first += rows.sum(0)
            second += rows.T @ rows
            low, high = np.searchsorted(wanted, (seen, seen + len(piece)))
            kept.append(piece[wanted[low:high] - seen])
            seen += len(piece)
        if seen != total or total < 2:
            raise ValueError(f"statistics need at least two rows and as many as announced ({total}), got {seen}")
        covariance = (second - np.outer(first, first) / seen) / (seen - 1)
        return cls(center + first / seen, covariance, np.concatenate(kept))


_PIECE = 1024  # rows multiplied at once


class _Rows:
    """Features whose rows are read and converted to float64 on access."""

    def __init__(self, features: Array) -> None:
        self._features, self.shape = features, features.shape

    def __getitem__(self, rows: Array) -> Array:
        return self._features[rows].astype(np.float64)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return the Frechet distance of two feature distributions (FID if the features are Inception's).

    |m|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, by eigenvalues of symmetric matrices: clean-fid's value to ten
    digits, in a fifth of the time of its sqrtm at 2,048 features.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def kernel_distance(a: Statistics, b: Statistics, subsets: int, subset_size: int) -> float:
    """Return the KID of two feature sets (cubic kernel), by clean-fid; every call draws the same subsets."""
    from cleanfid.fid import kernel_distance

    before = np.random.get_state()  # noqa: NPY002 (clean-fid draws from numpy's global generator)
    np.random.seed(0)  # noqa: NPY002
    try:
        features = (_Rows(x.features) for x in (a, b))
        return float(kernel_distance(*features, num_subsets=subsets, max_subset_size=subset_size))
    finally:
        np.random.set_state(before)  # noqa: NPY002
