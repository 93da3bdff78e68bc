"""Randomness as a function of its purpose, so that a resumed run needs no generator state."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derived_seed(seed: int, purpose: str, index: int = 0) -> int:
    """Return a 63-bit seed for one purpose and index (a step, an image), unrelated to its neighbours."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, index: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded with `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, index))


class ImageNoise:
    """Latents, labels and fresh noise of images; image i depends on seed i alone.

    They are drawn on the CPU image by image, so neither the batch size nor the device changes them. classes: the
    relative frequency of each class, whole numbers such as the data's class counts; none: there are no labels.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], classes: Sequence[int] = ()) -> None:
        self._generators = [generator(seed, "image") for seed in seeds]
        self.shape = shape
        self.latents = self.fresh()
        self.labels: Tensor | None = None
        if classes:
            # A row of data that is sorted by class; with one row a class, the label is its number.
            ends = torch.tensor(classes).cumsum(0)
            rows = torch.cat([torch.randint(sum(classes), (1,), generator=g) for g in self._generators])
            self.labels = torch.searchsorted(ends, rows, right=True)

    def fresh(self) -> Tensor:
        """Draw the next standard normal noise of every image, float32 [N, C, H, W]."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self._generators])
