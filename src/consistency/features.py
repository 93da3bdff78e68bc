"""Feature extractors and the distances between two sets of features, through clean-fid."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from consistency.errors import UserError
from consistency.files import sha256
from consistency.nets.classifier import Classifier
from consistency.training.data import to_signed

Array = np.ndarray

#: the weights clean-fid uses (stylegan2-ada's TorchScript of the 2015 network), and their published digest
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


@dataclass(frozen=True)
class Extractor:
    """name: as the score files carry it; batch: uint8 [n, H, W, C] -> float32 [n, d]."""

    name: str
    batch: Callable[[Array], Array]
    batch_size: int = 256

    def __call__(self, images: Array) -> Array:
        """Features float32 [N, d] of uint8 images [N, H, W, C]."""
        starts = range(0, len(images), self.batch_size)
        return np.concatenate([self.batch(np.array(images[i : i + self.batch_size])) for i in starts])


def classifier_extractor(model: Classifier, device: torch.device) -> Extractor:
    """The features of a trained classifier."""
    model = model.to(device).eval()

    @torch.inference_mode()
    def batch(images: Array) -> Array:
        return model.features(to_signed(torch.from_numpy(images)).to(device)).float().cpu().numpy()

    return Extractor("classifier", batch)


def inception_extractor(weights: Path, mode: str, device: torch.device, digest: str = INCEPTION_SHA256) -> Extractor:
    """clean-fid's Inception in mode legacy_tensorflow or clean, on staged weights only.

    Raises UserError when the weights are missing or are not the ones of that sha256.
    """
    if not weights.exists():
        raise UserError(f"{weights} is missing: run `python -m consistency stage-inception` (or put it there by hand)")
    found = sha256(weights)
    if found != digest:
        raise UserError(f"{weights} has sha256 {found}, not {digest}: delete it and stage it again")
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
    """Mean [d] and covariance [d, d] in float64, and the features themselves [N, d] for KID."""

    mean: Array
    covariance: Array
    features: Array

    @classmethod
    def of(cls, features: Array) -> "Statistics":
        """Statistics of features [N, d]."""
        return cls(features.mean(0, dtype=np.float64), np.cov(features.astype(np.float64), rowvar=False), features)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Frechet distance of two feature distributions (FID where the features are Inception's), by clean-fid."""
    from cleanfid.fid import frechet_distance

    with warnings.catch_warnings():
        # clean-fid passes sqrtm an argument that SciPy 1.17 deprecates; SciPy is pinned below its removal.
        warnings.simplefilter("ignore", DeprecationWarning)
        return float(frechet_distance(a.mean, a.covariance, b.mean, b.covariance))


def kernel_distance(a: Statistics, b: Statistics, subsets: int, subset_size: int, seed: int = 0) -> float:
    """KID of two feature sets (cubic kernel), by clean-fid; its subsets are drawn from the given seed."""
    from cleanfid.fid import kernel_distance

    before = np.random.get_state()  # noqa: NPY002 (clean-fid draws from numpy's global generator)
    np.random.seed(seed)  # noqa: NPY002
    try:
        features = (x.features.astype(np.float64) for x in (a, b))
        return float(kernel_distance(*features, num_subsets=subsets, max_subset_size=subset_size))
    finally:
        np.random.set_state(before)  # noqa: NPY002
