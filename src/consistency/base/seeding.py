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

    They are drawn on the CPU image by image, so neither the batch size nor the device changes them.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], label_dim: int = 0) -> None:
        self._generators = [generator(seed, "image") for seed in seeds]
        self.shape = shape
        self.latents = self.fresh()
        self.labels: Tensor | None = None
        if label_dim:
            self.labels = torch.cat([torch.randint(label_dim, (1,), generator=g) for g in self._generators])

    def fresh(self) -> Tensor:
        """Draw the next standard normal noise of every image, float32 [N, C, H, W]."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self._generators])
