"""The prepared dataset, memory-mapped so that any number of processes share one copy."""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consistency.base.arrays import read_array
from consistency.base.errors import UserError, command_of
from consistency.base.files import read_json


@dataclass(frozen=True)
class ImageData:
    """Output of the dataset stage. images: uint8 [N, H, W, C], memory-mapped; labels: int64 [N]."""

    images: np.ndarray
    labels: np.ndarray
    facts: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.facts["classes"])

    @property
    def class_counts(self) -> list[int]:
        """Number of images of each class."""
        return [int(count) for count in np.bincount(self.labels, minlength=self.classes)]

    def __len__(self) -> int:
        return len(self.images)

    def mean(self) -> np.ndarray:
        """Return the mean image, float32 [C, H, W] in [-1, 1]: exact, whatever the number of images."""
        total = sum(self.images[i : i + 4096].sum(0, dtype=np.int64) for i in range(0, len(self), 4096))
        mean = np.asarray(total / len(self) / 127.5 - 1, np.float32)
        return np.ascontiguousarray(mean.transpose(2, 0, 1))

    def take(self, rows: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Return images float32 [n, C, H, W] in [-1, 1] and labels int64 [n] of those rows."""
        rows = np.asarray(rows)
        return to_signed(torch.from_numpy(self.images[rows])), torch.from_numpy(self.labels[rows])


def to_signed(images: Tensor) -> Tensor:
    """Convert uint8 NHWC in [0, 255] to float32 NCHW in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(images: Tensor) -> np.ndarray:
    """Convert float NCHW in [-1, 1] to uint8 NHWC, rounded as in EDM: 127.5 x + 128, truncated."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def load_images(folder: Path) -> ImageData:
    """Open the dataset in a folder. Raises UserError if a file is missing, damaged or does not fit the others."""
    facts = read_json(folder / "dataset.json", "dataset")
    images: Any = read_array(folder / "images.npy", "dataset")
    labels = np.array(read_array(folder / "labels.npy", "dataset"))
    # Rows are drawn at random, so read-ahead (megabytes, on some machines) would fill the memory with unused rows.
    images.base.madvise(mmap.MADV_RANDOM)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != facts.get("count") or len(labels) != len(images):
        raise UserError(f"the dataset in {folder} does not match its dataset.json: run {command_of('dataset')} again")
    return ImageData(images, labels, facts)
